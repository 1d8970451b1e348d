"""The kernels of the loss on GPUs that are not here: what their compiled code takes, what fits on an SM, and a bound on the time.

    python benchmarks/kernel_space.py                               bounds of both strategies by chip and shape, and the choice of the model
    python benchmarks/kernel_space.py --space --chips b200-192      every choice: registers, spills, shared memory, blocks on an SM
    python benchmarks/kernel_space.py --tokens 8192 --hidden 2688 --trained 0.5
    python benchmarks/kernel_space.py --check 4                     compile four rows of the table again and compare
    python benchmarks/kernel_space.py --compile                     make benchmarks/kernel_space.json anew (minutes; needs triton, no GPU)

Nothing here is measured on a GPU. Registers, spills and shared memory are read from compiled code and exact; blocks on an SM
follow from published limits; seconds are MODELLED: a bound from data sheets, and an estimate with one assumed figure, the rate
of the level-2 cache. What is measured, where there is a GPU: `python benchmarks/loss.py --device cuda`.
"""

import argparse
import itertools
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nemotron_nb.loss.bound import (
    CHIPS,
    Chip,
    Sizes,
    floor_parts,
    memory_parts,
    ranked,
    slice_words,
    speed_parts,
    total,
)
from nemotron_nb.loss.compiled import Choice, Compiled, compiled, read_space, space, space_text
from nemotron_nb.loss.occupancy import occupancy

TABLE = Path(__file__).with_suffix(".json")


def one(job: tuple[str, Choice, int]) -> Compiled:
    """A row of the table, in a process of its own."""
    return compiled(*job)


def compile_all(processes: int) -> None:
    """Every choice for every compute capability of the chips, into the table."""
    capabilities = sorted({chip.capability for chip in CHIPS.values()})
    jobs = [(name, choice, capability) for capability in capabilities for name, choice in space()]
    with ProcessPoolExecutor(processes) as pool:
        rows = list(pool.map(one, jobs, chunksize=4))
    TABLE.write_text(space_text(rows), encoding="utf-8")
    print(f"{len(rows)} rows in {TABLE}; {sum(row.needs is None for row in rows)} do not compile")


def check(rows: Sequence[Compiled], count: int, seed: int) -> None:
    """Compile some rows again. Another version of Triton may differ, and that is said."""
    differ = 0
    for row in random.Random(seed).sample(rows, count):
        again = compiled(row.kernel, row.choice, row.capability)
        differ += again != row
        print("same" if again == row else "DIFFERS", row.kernel, row.capability, dict(row.choice))
    if differ:
        raise SystemExit(f"{differ} of {count} rows differ from {TABLE}: make it anew with --compile")


def show_choice(choice: Choice) -> str:
    """Short: 128x256x64 w8 s3."""
    size = "x".join(str(number) for key, number in choice.items() if not key.startswith("num_"))
    return f"{size} w{choice['num_warps']}" + (f" s{choice['num_stages']}" if "num_stages" in choice else "")


def print_space(chip: Chip, rows: Iterable[Compiled], ours: dict[str, Choice]) -> None:
    """What each choice takes on a chip."""
    print(
        f"\n{chip.name}, compute capability {chip.capability / 10}: read from compiled code; blocks on an SM modelled"
    )
    print(
        f"{'kernel':10}{'choice':22}{'regs':>5}{'spilled':>8}{'shared':>9}{'tensor':>7}{'warps':>7}  blocks on an SM, bounded by"
    )
    for row in rows:
        if row.capability == chip.capability:
            mark = " <- the library's" if row.choice == ours.get(row.kernel) else ""
            if row.needs is None:
                print(f"{row.kernel:10}{show_choice(row.choice):22}{row.verdict()}{mark}")
                continue
            needs, warps = row.needs, occupancy(row.capability, row.needs).warps
            print(
                f"{row.kernel:10}{show_choice(row.choice):22}{needs.registers:5}{row.spilled:8}{needs.shared:9,}{needs.tensor_columns:7}{warps:4}/64  {row.verdict()}{mark}"
            )


def library(capability: int) -> dict[str, Choice]:
    """What the library launches in bfloat16, by kernel."""
    import torch

    from nemotron_nb.loss.kernel import _row_blocks, tile_shape

    tile = {key: number for key, number in tile_shape(torch.bfloat16, capability).items() if key != "GROUP"}
    return {"lse": tile, "gradient": tile, "rows": _row_blocks(131072)}


def print_bounds(
    chip: Chip, rows: Sequence[Compiled], ours: dict[str, Choice], shapes: Iterable[tuple[int, int, float]]
) -> None:
    """Floor, both strategies with the library's choices, and what the model would choose."""
    resident = {
        name: occupancy(
            chip.capability,
            next(r.needs for r in rows if (r.kernel, r.capability, r.choice) == (name, chip.capability, choice)),
        ).blocks
        for name, choice in ours.items()
    }
    print(
        f"\n{chip.name}: MODELLED milliseconds, forward and backward, vocabulary 131,072, bfloat16; nothing was measured"
    )
    print(
        f"{'tokens':>7}{'hidden':>7}{'trained':>8}{'floor':>8}{'speed':>8}{'x':>6}{'memory':>8}{'x':>6}{'+cache':>8}{'x':>6}   the model's tiles, forward / gradient"
    )
    for tokens, hidden, trained in shapes:
        s = Sizes(round(tokens * trained), hidden)
        floor, speed = total(floor_parts(chip, s))[0], total(speed_parts(chip, s, resident["rows"]))[0]
        memory, estimate = total(
            memory_parts(chip, s, (ours["lse"], resident["lse"]), (ours["gradient"], resident["gradient"]))
        )
        figures = "".join(f"{1e3 * t:8.2f}{t / floor:6.2f}" for t in (speed, memory, estimate))
        picks = []
        for name, n in (("lse", s.V), ("gradient", slice_words(s))):
            found = ranked(chip, rows, name, s.M, n, hidden)
            mine = next(part for row, _, part in found if row.choice == ours[name])
            best, _, part = found[0]
            picks.append(
                "the library's"
                if mine.estimate <= 1.001 * part.estimate
                else f"{show_choice(best.choice)}, {part.estimate / mine.estimate:.3f} of its time"
            )
        print(f"{tokens:7}{hidden:7}{trained:8.0%}{1e3 * floor:8.2f}{figures}   {' / '.join(picks)}")


def main() -> None:
    """Read the options, print or make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="make the table anew")
    parser.add_argument("--processes", type=int, default=2, help="for --compile")
    parser.add_argument("--check", type=int, metavar="N", help="compile N rows again and compare")
    parser.add_argument("--seed", type=int, default=0, help="which rows --check takes")
    parser.add_argument("--space", action="store_true", help="every choice, not the bounds")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2688, 4096])
    parser.add_argument(
        "--trained", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="part of the tokens that is trained"
    )
    options = parser.parse_args()
    if options.compile:
        return compile_all(options.processes)
    version, rows = read_space(TABLE)
    if options.check:
        return check(rows, options.check, options.seed)
    print(f"compiled by triton {version}; times are modelled from data sheets, none is a measurement")
    for chip in map(CHIPS.__getitem__, options.chips):
        ours = library(chip.capability)
        if options.space:
            print_space(chip, rows, ours)
        else:
            print_bounds(chip, rows, ours, itertools.product(options.tokens, options.hidden, options.trained))
    if not options.space:
        print(
            "\nfloor: three products of the trained rows at the peak. x: over the floor. memory: a bound with the library's tiles;"
        )
        print(
            "+cache: the same with the assumed rate of the level-2 cache. The model's tiles: the library's where they are within a thousandth of the best."
        )


if __name__ == "__main__":
    main()
