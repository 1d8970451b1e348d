"""Making rows: how fast is each pipeline that asks no model, each verifier of its rows, and one start of the sandbox?

    python benchmarks/synth.py [--repeats 3] [--only sql search ...]

Processor time of this process and its children, median of the repeats; the clock where a server works, and for starts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from shutil import which

from nemotron_nb.rl.code import run_command, run_program, run_tests
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.sql_servers import ENGINES, why_absent
from nemotron_nb.synth.steps import Fallen, Workshop, make_row

# name -> rows begun, settings
BEGUN = {
    "sql": (300, {}), "search": (300, {}), "finance": (600, {}), "instructions": (600, {}), "tool_world": (150, {}),
    "terminal": (6, {}),
    "long_context": (3, {}),
}  # fmt: skip
TARGETS = {"sql": "250 rows/s", "search": "300 rows/s", "long_context": "120,000 tokens/s", "sandbox start": "60 ms"}


def processor() -> float:
    """Seconds of the processor, children included."""
    return sum(use.ru_utime + use.ru_stime for use in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def spent(act, clock):
    """(seconds, result)."""
    before = clock()
    found = act()
    return clock() - before, found


def median_of(repeats, act, clock):
    """Median of the seconds, and the last result."""
    runs = [spent(act, clock) for _ in range(repeats)]
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def measured(name, repeats, title=None, clock=processor, **more):
    """A line of the table: making, then judging."""
    count, given = BEGUN[name]
    count, pipeline = more.pop("count", count), PIPELINES[name]
    workshop = Workshop(pipeline.part("settings")(**given, **more))
    make_row(name, pipeline.part("steps"), workshop, 0, "recipe")  # what is loaded once is loaded

    def make():
        made = (make_row(name, pipeline.part("steps"), workshop, i, "recipe") for i in range(count))
        return [row for row in made if not isinstance(row, Fallen)]

    seconds, rows = median_of(repeats, make, clock)
    if not rows:
        return [title or name, f"{count} begun, none kept", "", TARGETS.get(name, "")]
    rows = json.loads(json.dumps(rows))
    judging, _ = median_of(repeats, lambda: [pipeline.part("judge")(row) for row in rows], clock)
    tokens = [row["synth"]["check"].get("tokens") for row in rows]
    speed = f"{len(rows) / seconds:,.1f} rows/s" if None in tokens else f"{sum(tokens) / seconds:,.0f} tokens/s"
    return [title or name, speed, f"{len(rows) / judging:,.1f} rows/s", TARGETS.get(title or name, "")]


def milliseconds(repeats, act):
    """Median of milliseconds of the clock."""
    found = []
    for _ in range(repeats):
        before = time.perf_counter()
        act()
        found.append(1000 * (time.perf_counter() - before))
    return statistics.median(found)


def sandbox_lines(repeats):
    """Where the time of a start goes."""
    many = 10 * repeats
    alone = milliseconds(many, lambda: run_command(["/bin/true"], {}))
    python = milliseconds(many, lambda: subprocess.run([sys.executable, "-I", "-S", "-c", ""]))
    program = milliseconds(many, lambda: run_program("print(1)"))
    tests = milliseconds(many, lambda: run_tests("print(input())", ["1"] * 6))
    ballast = b"x" * (1 << 30)  # as a process has that holds a model
    beside = milliseconds(many, lambda: run_program("print(1)"))
    return [
        ["sandbox start", f"{program:.0f} ms", "a program that prints", TARGETS["sandbox start"]],
        ["of it: the box", f"{alone:.0f} ms", "/bin/true in it", ""],
        ["of it: Python", f"{python:.0f} ms", "without a box", ""],
        ["a start, full memory", f"{beside:.0f} ms", f"beside {len(ballast) >> 30} GiB", ""],
        ["six tests, one start", f"{tests:.0f} ms", "", ""],
    ]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[*BEGUN, "engines", "sandbox"])
    asked = parser.parse_args()
    lines = [measured(name, asked.repeats) for name in BEGUN if name in asked.only]
    for engine in ENGINES if "engines" in asked.only else ():
        missing = why_absent(engine)[1]
        if engine != "sqlite":
            title = f"{engine}, by the clock"
            more = {"engine": engine, "count": 20}
            absent = [title, missing, "", ""]
            lines.append(absent if missing else measured("sql", asked.repeats, title, time.perf_counter, **more))
    lines += sandbox_lines(asked.repeats) if "sandbox" in asked.only and which("bwrap") else []
    for line in [["what", "making", "judging", "target"], *lines]:
        print("{:<22} {:>24} {:>24}   {}".format(*line))


if __name__ == "__main__":
    main()
