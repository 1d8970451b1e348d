"""Run jobs that need Megatron: import it once, then fork a process for each rank of each job. python zygote.py JOBS.json RESULTS.json

A job is {"name", "do" (a function of jobs.py), "ranks", ...its arguments}. The result of a job is what its function returned on the
last rank (the one that has the loss), or {"error": text}. Imports take longer than the jobs, so they are done once.
"""

import json
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(job, rank, port, sender, log):
    """One rank of a job, in its own process, which leads a group: Megatron's checkpoint writers are spawned into it and outlive it otherwise."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import jobs

    options = {name: value for name, value in job.items() if name not in ("name", "do", "ranks")}
    try:
        result = getattr(jobs, job["do"])(**options)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    sender.send(result)
    sender.close()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def run(job, folder):
    """All ranks of a job; the result of the last one, or the first error."""
    port, context = free_port(), mp.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(job["ranks"])]
    processes = [context.Process(target=_rank, args=(job, r, port, pipes[r][1], f"{folder}/{job['name']}.{r}.log")) for r in range(job["ranks"])]
    for process in processes:
        process.start()
    deadline, results = time.monotonic() + 300, {}
    while len(results) < job["ranks"] and time.monotonic() < deadline and not any("error" in r for r in results.values()):
        ready = mp.connection.wait([receiver for rank, (receiver, _) in enumerate(pipes) if rank not in results], 1)
        results |= {rank: receiver.recv() for rank, (receiver, _) in enumerate(pipes) if receiver in ready}
    results = [results.get(rank, {"error": "no answer"}) for rank in sorted(results)] or [{"error": "no answer in 300 seconds"}]
    for process in processes:
        process.join(5 if all("error" not in r for r in results) else 0.5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return next((r for r in results if "error" in r), results[-1])


def main(jobs_path, results_path):
    """Import, then job after job."""
    import jobs

    jobs.prepare()
    results = {}
    for job in json.loads(Path(jobs_path).read_text()):
        started = time.monotonic()
        results[job["name"]] = run(job, str(Path(results_path).parent)) | {"seconds": time.monotonic() - started}
        print(job["name"], f"{time.monotonic() - started:.1f} s", results[job["name"]].get("error", "")[:200], flush=True)
        Path(results_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
