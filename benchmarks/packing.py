"""Claim: packing a million sequences takes less than 0.3 CPU seconds with the packs of the plain double loop, and best fit decreasing fills 99.9 % or more.

    python benchmarks/packing.py                       10 thousand, 100 thousand, a million
    python benchmarks/packing.py --counts 10000        a quick look
    python benchmarks/packing.py --repeats 1

Lengths are lognormal with mean 1500 and sigma 1, clipped at the size of a pack, from a fixed seed. For each algorithm:

- by hand: the double loop (quadratic), run up to 10 thousand sequences only; the ratio is against the compiled packer
- python and numba: this library's two ways, which must give equal packs; by hand must give the same packs too
  (concatenative has no kernel: both columns run the same code)
- CPU seconds: `time.process_time`, median over the repeats, after one warm-up that loads numba's machine code
"""

import argparse
import importlib.util
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nemotron_nb.data.pack import ALGORITHMS, Packing, best_fit_by_hand, first_fit_by_hand, next_fit_by_hand, pack

BY_HAND = {"first": first_fit_by_hand, "best": best_fit_by_hand, "concatenative": next_fit_by_hand}


def by_hand(lengths: list[int], capacity: int, algorithm: str) -> Packing:
    """The order in plain Python, then the double loop."""
    order = list(range(len(lengths)))
    if algorithm.endswith("shuffle"):
        random.Random(42).shuffle(order)
    if algorithm.endswith("decreasing"):
        order.sort(key=lambda i: lengths[i], reverse=True)
    return Packing.from_bins(BY_HAND[algorithm.split("_")[0]](lengths, capacity, order))


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median CPU seconds of a call, and its last result."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def main() -> None:
    """Measure, compare the packs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--capacities", type=int, nargs="+", default=[4096, 262_144])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    numba = importlib.util.find_spec("numba") is not None
    if numba:
        for algorithm in ALGORITHMS:
            pack(list(range(1, 100)), 128, algorithm, compiled=True)
    print(f"{platform.machine()}, python {platform.python_version()}, median CPU seconds of {options.repeats}; numba {'compiled before' if numba else 'not installed'}\n")
    print(f"{'pack size':>9} {'sequences':>10}  {'algorithm':22} {'by hand':>9} {'python':>8} {'numba':>8} {'by hand / numba':>16} {'packs':>8} {'least':>8} {'fill':>8}")
    for capacity in options.capacities:
        for count in options.counts:
            lengths = np.clip(np.random.default_rng(0).lognormal(math.log(1500) - 0.5, 1.0, count).astype(int), 1, capacity)
            least = -(-int(lengths.sum()) // capacity)
            for algorithm in ALGORITHMS:
                plain, packing = timed(lambda: pack(lengths, capacity, algorithm, compiled=False), options.repeats if count < 1_000_000 else 1)
                fast, same = timed(lambda: pack(lengths, capacity, algorithm, compiled=True), options.repeats) if numba else (math.nan, packing)
                slow, oracle = timed(lambda: by_hand(lengths.tolist(), capacity, algorithm), 1) if count <= 10_000 else (math.nan, packing)
                assert packing == same == oracle, f"{algorithm}: the packs differ"
                ratio = f"{slow / fast:15.0f}x" if slow == slow and numba else f"{'':>16}"
                hand = f"{slow:9.3f}" if slow == slow else f"{'':>9}"
                print(f"{capacity:>9,} {count:>10,}  {algorithm:22} {hand} {plain:8.3f} {fast:8.4f} {ratio} {len(packing):>8,} {least:>8,} {packing.fill(lengths, capacity):8.3%}", flush=True)


if __name__ == "__main__":
    main()
