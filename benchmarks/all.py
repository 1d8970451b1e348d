"""Every benchmark after the other: its table, or why there is none.

    make bench                                             what needs nothing but this project
    make bench ARGS="--nemotron CHECKOUT --trl FOLDER"     beside NVIDIA's preparation and TRL's trainer
    python benchmarks/all.py --only data_prep scale --save FOLDER

--nemotron is a checkout of https://github.com/NVIDIA-NeMo/Nemotron, --nemo-rl one of https://github.com/NVIDIA-NeMo/RL; --trl and
--trl-dpo are folders with trl==1.16.0 and trl==0.13.0 (pip install --no-deps --target FOLDER trl==VERSION). --save keeps what each
benchmark printed as FOLDER/NAME.txt, so that two days can be laid side by side. A benchmark that fails is named at the end, and the
others run all the same. Run it on a machine that does nothing else; its load is printed before each.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
NOT_BENCHMARKS = ("all", "chats")  # this file, and what the others import


class Benchmark(NamedTuple):
    """How a script is called."""

    peer: str = ""  # the option that gives its --reference
    must: bool = False  # without the peer it does not run
    by_hand: str = ""  # why it is not part of the round


BENCHMARKS = {
    "house": Benchmark(),
    "compat_check": Benchmark("nemotron", must=True),
    "data_prep": Benchmark("nemotron"),
    "pretrain_data": Benchmark("nemotron"),
    "encoder": Benchmark(),
    "packing": Benchmark(),
    "parquet": Benchmark(),
    "scale": Benchmark(),
    "clean": Benchmark(),
    "synth": Benchmark(),
    "endpoint": Benchmark(),
    "loss": Benchmark(),
    "kernel_space": Benchmark(),
    "train_step": Benchmark(),
    "peers": Benchmark("trl"),
    "step_profile": Benchmark(),
    "rl_rollout": Benchmark(),
    "rl_oracles": Benchmark("nemo_rl", must=True),
    "dpo_trl": Benchmark("trl_dpo", must=True),
    "plan": Benchmark(),
    "runs": Benchmark(),
    "recipe": Benchmark(by_hand="trains the whole recipe once a seed, minutes each"),
    "pretrain_gain": Benchmark(by_hand="needs the base model of a run: python benchmarks/pretrain_gain.py RUN/model"),
    "rl_learn": Benchmark(by_hand="needs the start of a run: python benchmarks/rl_learn.py RUN/model"),
}


def not_run(benchmark: Benchmark, options: argparse.Namespace) -> str:
    """Why a benchmark is passed over; empty if it runs."""
    if benchmark.must and not getattr(options, benchmark.peer):
        return f"needs --{benchmark.peer.replace('_', '-')}"
    return benchmark.by_hand


def call_of(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of a benchmark, the interpreter first."""
    benchmark = BENCHMARKS[name]
    peer = getattr(options, benchmark.peer) if benchmark.peer else None
    return [sys.executable, str(HERE / f"{name}.py"), *(["--reference", str(peer)] if peer else [])]


def run(name: str, options: argparse.Namespace) -> int:
    """Run one, show what it prints as it comes, and keep it. Its exit status."""
    call, lines = call_of(name, options), []
    print(f"== benchmarks/{' '.join([f'{name}.py', *call[2:]])}   (load {os.getloadavg()[0]:.1f})", flush=True)
    begun = time.perf_counter()
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    lines.append(f"({time.perf_counter() - begun:.0f} s)\n")
    print(lines[-1], flush=True)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return process.returncode


def main(options: argparse.Namespace) -> None:
    """The round, and at its end what is missing from it."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    passed_over = {name: why for name in options.only if (why := not_run(BENCHMARKS[name], options))}
    failed = [name for name in options.only if name not in passed_over and run(name, options)]
    alone = [name for name in options.only if BENCHMARKS[name].peer and name not in passed_over and not getattr(options, BENCHMARKS[name].peer)]
    said = [f"not run: {name}: {why}" for name, why in passed_over.items()]
    said += [f"without its peer: {name}: give --{BENCHMARKS[name].peer.replace('_', '-')}" for name in alone]
    print("".join(f"{line}\n" for line in said), end="")
    print(f"{len(options.only) - len(passed_over)} benchmarks, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("nemotron", "nemo-rl", "trl", "trl-dpo"):
        parser.add_argument(f"--{peer}", type=Path)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--save", type=Path, help="keep what each benchmark prints in this folder")
    main(parser.parse_args())
