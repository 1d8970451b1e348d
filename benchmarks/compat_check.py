"""Claim: `compat=nvidia` makes of each row the tokens, masks and losses that NVIDIA's own code makes of it.

    git clone https://github.com/NVIDIA-NeMo/Nemotron
    python benchmarks/compat_check.py --reference Nemotron --rows 5000
    python benchmarks/compat_check.py --reference Nemotron --rows 5000 --tokenizer tekken --seed 1

Random rows, most of them broken in some way, go one by one through the reference's own spool function, unmodified, and
through `reference_drafts` and `plain_reference_drafts`. Compared: ids and masks of every sequence, their number and order, which
rows are lost, and under which of the reference's counters. Plans of shards and their splits are compared as well. Ends with 1 on any difference.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep import reference_core

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from nasty_rows import nasty_row

from nemotron_nb.core import UserError
from nemotron_nb.data.nvidia_prep import (
    SpecialTokens,
    path,
    plain_reference_drafts,
    reference_drafts,
    shard_plan,
    split_shards,
)
from nemotron_nb.data.mask import Draft, encode_drafts
from nemotron_nb.data.tokenizer import ChatTokenizer, load_tokenizer

Sequences = list[tuple[list[int], list[int]]]

# The reference's counters that a lost row raises; rows that stop it have no counters.
COUNTERS = {
    **dict.fromkeys(("used_in", "no_messages"), {"num_filtered"}),
    "invalid_conversation": {"num_filtered", "num_validation_errors"},
    **dict.fromkeys(("bad_message", "bad_arguments", "template_failed", "mask_failed"), {"num_filtered", "num_errors"}),
    "nothing_trained": {"num_filtered", "num_empty_after_masking"},
    "encode_failed": {"num_errors"},
    "nothing_rendered": set(),
}


def reference_of(core: ModuleType, tokenizer: Any, folder: str) -> Callable[[str, str], tuple[Sequences, set[str]] | None]:
    """The reference as a function of (line, used_in filter) to (sequences, counters raised); None where it raises."""
    import fsspec
    import numpy as np
    from nemotron.data_prep.packing.spool import SequenceSpoolPaths, SequenceSpoolReader

    files, source = fsspec.filesystem("file"), f"{folder}/row.jsonl"
    fixed = {"shard_index": 0, "output_fs": files, "tokenizer": tokenizer, "messages_field": "messages", "tools_field": "tools", "pack_size": 4096, "algorithm": "first_fit_shuffle"}
    fixed |= {"dtype": np.int32, "chat_template": None, "max_doc_tokens": None, "max_rows": None, "seed": 42, "used_in_field": "used_in"}

    def run(line: str, used_in: str) -> tuple[Sequences, set[str]] | None:
        """One row through the spool function."""
        Path(source).write_text(line + "\n", encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=folder) as out:
            info = core.FileInfo(path=source, local_path=source, size=len(line))
            places = {"files": [info], "output_dir": f"{out}/o", "receipts_dir": f"{out}/r", "spool_dir": f"{out}/s"}
            try:
                stats = core.process_chat_sft_spool_core(**places, **fixed, used_in_filter=used_in or None)
            except Exception:  # whatever stops it stops the shard
                return None
            reader = SequenceSpoolReader(fs=files, paths=SequenceSpoolPaths.for_root(f"{out}/s"))
            count = len(reader.load_offsets_and_lengths()[1])
            found = [tuple(column.tolist() for column in reader.read_sequence(i)) for i in range(count)]
            reader.close()
        return found, {name for name, n in stats.items() if n and name not in ("num_input_rows", "num_output_sequences")}

    return run


def encoded(found: list[Draft] | str, tokenizer: ChatTokenizer) -> Sequences | str:
    """(ids, mask) of each sequence."""
    if isinstance(found, str):
        return found
    e = encode_drafts(found, tokenizer)
    return [(e.input_ids[a:b].tolist(), e.loss_mask[a:b].tolist()) for a, b in zip(e.offsets, e.offsets[1:])]


def agrees(theirs: tuple[Sequences, set[str]] | None, ours: Sequences | str) -> bool:
    """Is this what the reference made of the row?"""
    if theirs is None or isinstance(ours, str):
        return ours == "shard_failed" if theirs is None else theirs == ([], COUNTERS.get(ours))
    return theirs[0] == ours


def check_rows(core: ModuleType, options: argparse.Namespace, folder: str) -> int:
    """Compare rows; gives the number of differences."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    foreign = AutoTokenizer.from_pretrained(tokenizer.save(f"{folder}/tokenizer", None))
    core._apply_chat_template(foreign, "nano3")
    reference, r, special = reference_of(core, foreign, folder), random.Random(options.seed), SpecialTokens(tokenizer.special_ids)
    ways, sequences, tokens, differences = Counter(), 0, 0, 0
    for _ in range(options.rows):
        line, used_in = json.dumps(nasty_row(r)), "nano_v3" if r.random() < 0.1 else ""
        row, theirs = json.loads(line), reference(line, used_in)
        ours = [encoded(find(row, used_in_filter=used_in), tokenizer) for find in (plain_reference_drafts, reference_drafts)]
        ours.append(encoded(reference_drafts(row, used_in_filter=used_in, special=special), tokenizer))
        ways[path(row, used_in_filter=used_in)] += 1
        sequences, tokens = sequences + len(theirs[0] if theirs else ()), tokens + sum(len(ids) for ids, _ in (theirs[0] if theirs else ()))
        if not all(agrees(theirs, found) for found in ours):
            differences += 1
            print(f"DIFFERENT: {line}\n  there: {theirs}\n  here: {ours}"[:2000])
    print(f"{options.rows} rows, {sequences} sequences, {tokens} tokens ({options.tokenizer}): {differences} rows differ")
    print("\n".join(f"{count:8} {way}" for way, count in sorted(ways.items())))
    return differences


def check_plans(seed: int) -> int:
    """Compare 2000 plans of shards and as many splits; gives the number of differences."""
    from nemotron.data_prep.config import FileInfo
    from nemotron.data_prep.core.planning import create_size_balanced_assignments
    from nemotron.data_prep.utils.splits import distribute_shards_to_splits

    r, differences, errors = random.Random(seed), 0, 0
    for _ in range(2000):
        files = [(f"file_{i}", r.choice((0, 1, 10, 1000, r.randrange(10**6)))) for i in range(r.randint(1, 8))]
        shards, held_out = r.randint(1, 12), r.choice((0.0, 0.01, 0.1, 0.3))
        try:
            plan = create_size_balanced_assignments([FileInfo(path=p, local_path=p, size=size) for p, size in files], shards)
            theirs: Any = [[(f.path, f.row_modulus or 1, f.row_remainder or 0) for f in a.files] for a in plan]
        except IndexError:
            theirs, errors = None, errors + 1
        try:
            ours: Any = shard_plan(files, shards)
        except UserError:
            ours = None
        here = split_shards([f"x_{i:06d}" for i in range(shards)], shards, valid_ratio=held_out, test_ratio=held_out, seed=seed)
        there = distribute_shards_to_splits(["1.0", "x"], shards, valid_shards=len(here["valid"]), test_shards=len(here["test"]), seed=seed)
        differences += theirs != ours or here != {name: paths[1::2] for name, paths in there.items()}
    print(f"2000 plans ({errors} of them an IndexError there, a UserError here) and splits: {differences} differ")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="a checkout of https://github.com/NVIDIA-NeMo/Nemotron")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="tiny")
    given = parser.parse_args()
    the_core = reference_core(given.reference)
    logging.disable(logging.CRITICAL)  # the reference warns about each row
    with tempfile.TemporaryDirectory(prefix="compat_check_") as place:
        sys.exit(1 if check_rows(the_core, given, place) + check_plans(given.seed) else 0)
