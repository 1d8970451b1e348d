"""Claim: data preparation gives the packs of NVIDIA's public data preparation, byte for byte, in a fraction of its CPU time.

    git clone https://github.com/NVIDIA-NeMo/Nemotron
    python benchmarks/data_prep.py --reference Nemotron                 the claim: 5000 chats, both sides, one core
    python benchmarks/data_prep.py --reference Nemotron --tier tokenizers
    python benchmarks/data_prep.py --reference Nemotron --rows 500      a quick look
    python benchmarks/data_prep.py                                      without a checkout: our own plain oracle, on a sample

Both sides read the same file, each in a process of its own that is bound to one core.

- The reference runs its own shard functions, unmodified: chats to a spool, spool to Parquet, one shard. Its pipeline
  around them (Ray, downloads) does not run, and its package files that would import it are stepped over.
- Ours runs `prepare(compat="nvidia")`, from the file to the finished folder, several times, each into a new folder.
- CPU seconds: user and system time of the process and its children, median over the repeats.
- Set-up (imports, loading the tokenizer, building the encoder's tables) does not grow with the chats. The reference's is
  outside its measured functions. Ours is inside `prepare`, so it is measured on a file of two chats and both numbers
  are shown: the whole, and the whole less that.
- Compared: the three columns of the packs, and the bytes of the file.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import chats

COLUMNS = ("input_ids", "loss_mask", "seq_start_id")
ROW_GROUP_PACKS = 1000  # packs in a row group, the reference's default
SAMPLE_ROWS = 100  # of the oracle, where there is no reference


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds, seconds on the wall, result) of a call."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = work()
    return cpu_seconds() - cpu, time.perf_counter() - wall, result


def peak_megabytes() -> float:
    """The largest resident memory of this process or of one of its children so far."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_core(checkout: str) -> types.ModuleType:
    """The reference's module of shard functions. Packages above it get empty stand-ins, so that their imports do not run."""
    source = Path(checkout) / "src"
    if not (source / "nemotron/data_prep/core/chat_sft_shard_core.py").is_file():
        raise SystemExit(f"{checkout}: no checkout of https://github.com/NVIDIA-NeMo/Nemotron (src/nemotron/data_prep is missing)")
    for name in ("nemotron", "nemotron.data_prep", *(f"nemotron.data_prep.{p}" for p in ("core", "packing", "utils"))):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("nemotron.data_prep.core.chat_sft_shard_core")


def run_reference(options: argparse.Namespace) -> dict[str, Any]:
    """Chats to a spool, spool to Parquet, with the reference's functions."""
    import fsspec
    import numpy as np
    from transformers import AutoTokenizer

    core, files = reference_core(options.reference), fsspec.filesystem("file")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_folder)
    out = f"{options.output}/reference"
    shared = {"shard_index": 0, "output_dir": out, "spool_dir": f"{out}/spool", "output_fs": files}
    packing = {"pack_size": options.pack_size, "algorithm": "first_fit_shuffle", "dtype": np.int32, "seed": 42}
    source = core.FileInfo(path=options.chats, local_path=options.chats, size=os.path.getsize(options.chats))
    rows = {"messages_field": "messages", "tools_field": "tools", "chat_template": "nano3", "max_doc_tokens": None, "max_rows": None, "used_in_filter": None, "used_in_field": "used_in"}

    def work() -> None:
        core.process_chat_sft_spool_core(files=[source], receipts_dir=f"{out}/receipts", tokenizer=tokenizer, **shared, **packing, **rows)
        core.process_chat_sft_parquet_from_spool_core(**shared, **packing, parquet_row_group_size=ROW_GROUP_PACKS)

    before = cpu_seconds()
    cpu, wall, _ = timed(work)
    return {"cpu": [cpu], "wall": [wall], "set_up": before, "files": [f"{out}/shard_000000.parquet"]}


# --- ours ------------------------------------------------------------------------------------------------------------


def prepared(options: argparse.Namespace, chats_file: str, tier: str, folder: str) -> list[str]:
    """Prepare a file of chats into a new folder with our code; gives the Parquet files of the training split."""
    from nemotron_nb.data.prep import PrepConfig, TokenizerSection, prepare

    prepare(
        PrepConfig(
            path=chats_file,
            output_dir=folder,
            tokenizer=TokenizerSection(model=options.tokenizer),
            pack_size=options.pack_size,
            algorithm="first_fit_shuffle",
            seed=42,
            compat="nvidia",
            num_shards=1,
            workers=options.workers,
            encoder=tier,
            train_ratio=1.0,
            valid_ratio=0.0,
            test_ratio=0.0,
            parquet_row_group_tokens=ROW_GROUP_PACKS * options.pack_size,
            max_bad_fraction=1.0,
        )
    )
    return sorted(map(str, Path(folder, "splits", "train").glob("*.parquet")))


def tier_used(options: argparse.Namespace) -> tuple[str, str]:
    """(the encoder that runs, why that one)."""
    from nemotron_nb.data.encoder import make_encoder
    from nemotron_nb.data.tokenizer import load_tokenizer

    encoder = make_encoder(load_tokenizer(options.tokenizer), options.tier, num_bytes=os.path.getsize(options.chats))
    return encoder.tier, encoder.note


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """`prepare` on two chats, twice, then on all of them, several times."""
    few = f"{options.output}/few.jsonl"
    with open(options.chats, encoding="utf-8") as f:
        Path(few).write_text(f.readline() + f.readline(), encoding="utf-8")
    tier, note = tier_used(options)
    runs = []
    for i, source in enumerate([few, few, *[options.chats] * options.repeats]):
        runs.append(timed(lambda: prepared(options, source, tier, f"{options.output}/ours_{i}")))
    (first, *_), (later, *_), *whole = runs
    return {"cpu": [r[0] for r in whole], "wall": [r[1] for r in whole], "set_up": later, "first_set_up": first, "files": whole[-1][2], "tier": f"{tier} ({note})"}


# --- without a checkout: the oracle ----------------------------------------------------------------------------------


def run_oracle(options: argparse.Namespace) -> dict[str, Any]:
    """The first rows, found and encoded in the plain way. No packing: what is compared are the sequences."""
    from nemotron_nb.data.nvidia_prep import paths, plain_reference_drafts, reference_drafts
    from nemotron_nb.data.mask import encode_drafts
    from nemotron_nb.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    with open(options.chats, encoding="utf-8") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(SAMPLE_ROWS))]

    def plain() -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of each sequence, one call of the tokenizer for each chunk."""
        result = []
        for draft in (d for row in rows for d in plain_reference_drafts(row)):
            ids = [tokenizer.encode(c.text, special=True) for c in draft.chunks]
            result.append(([i for chunk in ids for i in chunk], [int(on) for chunk, on in zip(ids, draft.trained) for _ in chunk]))
        return result

    def fast() -> list[tuple[list[int], list[int]]]:
        """The same by the fast way."""
        e = encode_drafts([d for row in rows for d in reference_drafts(row)], tokenizer)
        return [(e.input_ids[a:b].tolist(), e.loss_mask[a:b].tolist()) for a, b in zip(e.offsets, e.offsets[1:])]

    (cpu, wall, sequences), (fast_cpu, _, same) = timed(plain), timed(fast)
    tokens = sum(len(ids) for ids, _ in sequences)
    return {"cpu": [cpu], "wall": [wall], "rows": len(rows), "tokens": tokens, "fast_cpu": fast_cpu, "equal": sequences == same, "paths": paths(rows)}


# --- comparison ------------------------------------------------------------------------------------------------------


def columns_digest(files: Iterable[str]) -> dict[str, str]:
    """For each of the three columns the SHA-256 of its lists: their lengths, then their values, whatever the row groups."""
    import pyarrow.parquet as pq

    digests = {}
    for name in COLUMNS:
        lengths, values = hashlib.sha256(), hashlib.sha256()
        for path in files:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=[name]):
                column = batch.column(0)
                lengths.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                values.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        digests[name] = hashlib.sha256(lengths.digest() + values.digest()).hexdigest()[:16]
    return digests


def contents(files: list[str]) -> dict[str, Any]:
    """Packs, tokens, layout and digests of a folder's Parquet files."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    opened = [pq.ParquetFile(path) for path in files]
    groups = [tuple(f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)) for f in opened]
    tokens = sum(pc.sum(pc.list_value_length(b.column(0))).as_py() for f in opened for b in f.iter_batches(columns=["input_ids"]))
    sha = [hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in files]
    return {"packs": sum(f.metadata.num_rows for f in opened), "tokens": tokens, "layout": [opened[0].schema_arrow.names, groups], "columns": columns_digest(files), "bytes": sha}


def compare(reference: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What is the same, in sentences."""
    lines = [f"{name}: {'the same' if reference['columns'][name] == ours['columns'][name] else 'DIFFERENT'} ({ours['columns'][name]})" for name in COLUMNS]
    if reference["layout"] == ours["layout"]:
        return [*lines, f"bytes of the file: {'the same' if reference['bytes'] == ours['bytes'] else 'DIFFERENT'} ({ours['bytes'][0]})"]
    return [*lines, f"bytes of the file: not compared, the layout differs: columns and packs per row group are {ours['layout']}, there {reference['layout']}"]


# --- the table -------------------------------------------------------------------------------------------------------


def side(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own, bound to as many cores as it may use, and give what it reports."""
    report = f"{options.output}/{name}.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false" if options.workers == 1 else "true", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, __file__, "--side", name, "--report", report, *(f"--{k.replace('_', '-')}={v}" for k, v in vars(options).items() if v is not None and k not in ("side", "report"))]
    subprocess.run(call, check=True, env=environment)
    return json.loads(Path(report).read_text())


def row(name: str, result: dict[str, Any], cpu: float, rows: int, tokens: int, megabytes: float, base: float) -> str:
    """One line of the table."""
    rates = f"{rows / cpu:9.0f} {tokens / cpu / 1e6:8.2f} {megabytes / cpu:7.2f}"
    return f"{name:<28} {cpu:8.2f} {rates} {base / cpu:7.1f}x {result['peak']:9.0f}"


def main(options: argparse.Namespace) -> None:
    """Write the chats, run the sides, print the table."""
    from nemotron_nb.data.tokenizer import load_tokenizer

    options.chats, options.tokenizer_folder = f"{options.output}/chats.jsonl", f"{options.output}/tokenizer"
    size = chats.write_chats(options.chats, options.rows, options.seed) / 1e6
    load_tokenizer(options.tokenizer).save(options.tokenizer_folder, None)
    print(f"{options.rows} chats, {size:.1f} MB, sha256 {hashlib.sha256(Path(options.chats).read_bytes()).hexdigest()[:16]}; tokenizer {options.tokenizer}, packs of {options.pack_size}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if not options.reference:
        return print_oracle(options, size)
    reference = side("reference", options)
    there = contents(reference["files"])
    heading = f"{'':<28} {'CPU s':>8} {'rows/s':>9} {'Mtok/s':>8} {'MB/s':>7} {'ratio':>8} {'peak MB':>9}"
    first = row("reference", reference, reference["cpu"][0], options.rows, there["tokens"], size, reference["cpu"][0])
    print(heading, first, sep="\n", flush=True)
    if options.only_reference:
        return None
    ours = side("ours", options)
    here = contents(ours["files"])
    whole = statistics.median(ours["cpu"])
    for name, cpu in (("ours, whole", whole), ("ours, less set-up", max(whole - ours["set_up"], 1e-9))):
        print(row(name, ours, cpu, options.rows, here["tokens"], size, reference["cpu"][0]))
    print(f"set-up: reference {reference['set_up']:.1f} s, not in the table; ours {ours['set_up']:.1f} s, the first time {ours['first_set_up']:.1f} s; repeats {', '.join(f'{cpu:.2f}' for cpu in ours['cpu'])} s")
    print(f"encoder: {ours['tier']}; workers: {options.workers}; on the wall: reference {reference['wall'][0]:.1f} s, ours {statistics.median(ours['wall']):.1f} s")
    print(f"packs: {there['packs']} there, {here['packs']} here; tokens: {there['tokens']} there, {here['tokens']} here")
    print("\n".join(compare(there, here)))


def print_oracle(options: argparse.Namespace, size: float) -> None:
    """The table without a reference."""
    found = side("oracle", options)
    cpu, share = found["cpu"][0], found["rows"] / options.rows
    print(f"no --reference given: this is our own plain oracle on the first {found['rows']} rows, without packing, not NVIDIA's code")
    print(f"{'plain oracle':<28} {cpu:8.2f} s {found['rows'] / cpu:9.0f} rows/s {found['tokens'] / cpu / 1e6:8.2f} Mtok/s {size * share / cpu:7.2f} MB/s")
    print(f"{'fast way, tokenizers':<28} {found['fast_cpu']:8.2f} s {cpu / found['fast_cpu']:9.1f}x; ids and masks {'the same' if found['equal'] else 'DIFFERENT'}; rows: {found['paths']}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", help="a checkout of https://github.com/NVIDIA-NeMo/Nemotron")
    parser.add_argument("--only-reference", type=int, default=0, choices=(0, 1), help="measure the reference and stop")
    parser.add_argument("--tokenizer", default="tekken")
    parser.add_argument("--pack-size", type=int, default=4096)
    parser.add_argument("--tier", default="auto", choices=("auto", "numba", "tiktoken", "words", "tokenizers"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("output", "side", "report", "chats", "tokenizer-folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.side:
        cores = 1 if given.side != "ours" else given.workers
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        result = {"reference": run_reference, "ours": run_ours, "oracle": run_oracle}[given.side](given)
        Path(given.report).write_text(json.dumps({"peak": peak_megabytes()} | result))
    else:
        with tempfile.TemporaryDirectory(prefix="data_prep_") as folder:
            given.output = folder
            main(given)
