"""Claim: `nemotron runs` lists 500 run folders in less than a second of wall time, the start of Python included.

    python benchmarks/runs.py                     500 runs of 40 steps, and 500 of 2,000 steps
    python benchmarks/runs.py --runs 5000         more of them
    python benchmarks/runs.py --root output       the runs that are there

The folders are made up: complete, failed, preempted, queued, running, and one in fifty is damaged. Each command runs in
a process of its own, as people start it; the median of five, after one that warms the disk cache. Every run must be in
the table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemotron_nb.core import write_json
from nemotron_nb.viz import table

STATES = ("done", "done", "done", "failed", "preempted", "queued", "running")


def make_run(folder: Path, number: int, steps: int) -> None:
    """A run folder with the files that the list reads, and their usual sizes."""
    folder.mkdir(parents=True)
    state = STATES[number % len(STATES)]
    now = "2026-03-14T09:26:53Z"
    status = {"state": state, "attempt": 1, "started": now, "host": "elsewhere", "pid": 1, "changed": now}
    write_json(folder / "status.json", status | {"attempts": [{"attempt": 1}]})
    (folder / "config.yaml").write_text("family: nano3\n" + "".join(f"setting_{i}: value\n" for i in range(200)))
    line = {"kind": "train", "stage": "token", "loss": 2.5, "loss_token": 2.5, "loss_sample": 2.6, "lr": 1e-5}
    line |= {"grad_norm": 1.0, "tokens": 900, "trained_tokens": 300, "seconds": 0.1}
    lines = "".join(json.dumps(line | {"step": s}) + "\n" for s in range(1, steps + 1))
    (folder / "metrics.jsonl").write_text('{"kind": "start"}\n' + ("{" if number % 50 == 49 else lines))
    if state == "done":
        write_json(folder / "evaluation_after.json", {"loss_token": 1.25, "example": {"nll": [1.0] * 2000}})
        (folder / "report.html").write_text("<html></html>")


def seconds(root: Path, expected: int) -> list[float]:
    """Wall seconds of the command, five times; it must list every run."""
    took = []
    for _ in range(6):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "nemotron_nb", "runs", str(root)], capture_output=True, text=True)
        took.append(time.perf_counter() - begun)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == expected + 1, done.stderr[-2000:]
    return took[1:]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--root", help="list this folder instead of made-up runs")
    asked = parser.parse_args()
    if asked.root:
        cases = {asked.root: (Path(asked.root), len(list(Path(asked.root).glob("*/*/*/status.json"))))}
        measured = {name: seconds(*case) for name, case in cases.items()}
    else:
        measured = {}
        with tempfile.TemporaryDirectory() as folder:
            for steps in (40, 2_000):
                root = Path(folder) / str(steps)
                for number in range(asked.runs):
                    make_run(root / "nano3" / "sft" / f"20260314T092653Z-tiny-{number:06}", number, steps)
                measured[f"{asked.runs:,} runs of {steps:,} steps"] = seconds(root, asked.runs)
            measured["no runs: the start alone"] = seconds(Path(folder) / "40" / "nano3", 0)
    rows = [[name, f"{statistics.median(took):.2f} s", f"{max(took):.2f} s"] for name, took in measured.items()]
    print(table(rows, header=["nemotron runs", "median", "longest"]).text)


if __name__ == "__main__":
    main()
