"""Claims: two workers prepare data at least 1.8 times as fast as one, and neither memory nor open files grow with the number of chats.

    python benchmarks/scale.py                          5,000 and 50,000 chats, one and two workers
    python benchmarks/scale.py --rows 1000 5000         smaller

Each preparation runs in a process of its own, into a new folder, with the `tekken` tokenizer and packs of 4096 tokens.
Memory is the largest resident memory of the process and of each of its workers, without the files that are mapped
into memory and can be dropped at any time (RssAnon of /proc, read 20 times a second).
No process may have more than 256 files open (ulimit -n 256), whatever the number of units.
The time on the wall is compared, less what every run pays whatever its size (imports, tokenizer, encoder): a run on ten chats.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import chats

RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from nemotron_nb.data.prep import PrepConfig, TokenizerSection, prepare
prepare(PrepConfig(path=sys.argv[1], output_dir=sys.argv[2], tokenizer=TokenizerSection("tekken"), encoder=sys.argv[4], workers=int(sys.argv[3])))
"""


def anonymous_megabytes(pid: int) -> float:
    """Resident memory of a process that is not a mapped file; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return [pid]


def measured(source: Path, workers: int, tier: str) -> tuple[float, float]:
    """(seconds on the wall, largest resident megabytes of any one process) of a preparation."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        job = subprocess.Popen([sys.executable, "-c", RUN, str(source), f"{folder}/out", str(workers), tier])
        peak, ended = [0.0], threading.Event()

        def watch() -> None:
            """Note the largest memory until the job ends."""
            while not ended.wait(0.05):
                peak[0] = max([peak[0], *map(anonymous_megabytes, family(job.pid))])

        watcher = threading.Thread(target=watch)
        watcher.start()
        failed = job.wait()
        seconds = time.perf_counter() - begun
        ended.set()
        watcher.join()
        assert not failed, "the preparation failed"
        return seconds, peak[0]


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 50_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tier", default="numba", choices=("numba", "tiktoken", "words", "tokenizers"))
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, encoder {options.tier}")
    print(f"{'chats':>8}{'MB':>8}{'workers':>9}{'seconds':>10}{'less start':>12}{'speed-up':>10}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        chats.write_chats(few, 10, 0)
        start = min(measured(few, 1, options.tier)[0] for _ in range(3))
        for rows in options.rows:
            source = Path(folder) / f"{rows}.jsonl"
            size = chats.write_chats(source, rows, 0) / 1e6
            alone = None
            for workers in options.workers:
                runs = [measured(source, workers, options.tier) for _ in range(options.repeats)]
                seconds, peak = statistics.median(s for s, _ in runs), max(p for _, p in runs)
                alone = alone or seconds - start
                print(f"{rows:>8}{size:>8.1f}{workers:>9}{seconds:>10.2f}{seconds - start:>12.2f}{alone / (seconds - start):>9.2f}x{peak:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
