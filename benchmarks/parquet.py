"""Claim: a random pack of 256 k tokens is read in about ten milliseconds, because row groups are sized by tokens.

    python benchmarks/parquet.py                       50 million tokens
    python benchmarks/parquet.py --tokens 5000000      a quick look

The same packs are written twice: with a thousand packs in a row group, as the published recipe does, and with 131,072
tokens in one. Then random packs are read, each time from a row group that is not in memory:

- as lists: one row group read and one row of it turned into Python lists, what Megatron-Bridge's reader does
- PackReader: this library, which checks the row group and gives slices of its memory

Milliseconds of CPU (`time.process_time`) per pack, median over the reads; the file is in the page cache. Writing is
given in CPU seconds and beside it a writer that goes through Python objects, as the published one does.
"""

import argparse
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemotron_nb.data.pack import pack
from nemotron_nb.data.shards import REFERENCE_LAYOUT, PackReader, Sequences, write_shard


def store(tokens: int, capacity: int) -> Sequences:
    """About so many tokens in sequences of lognormal lengths; small ids are frequent, as those of words are."""
    r = np.random.default_rng(0)
    lengths = np.clip(r.lognormal(math.log(1500) - 0.5, 1.0, max(8, tokens // 1400)).astype(int), 1, capacity)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = (131_072 * r.random(offsets[-1]) ** 6).astype(np.int32)
    mask = (np.arange(offsets[-1]) % 700 > 400).astype(np.uint8)
    count = len(lengths)
    return Sequences(ids, mask, offsets, np.arange(count, dtype=np.int32), [f"c{i}" for i in range(count)], ["chats.jsonl"] * count)


def through_objects(path: Path, s: Sequences, packing: Any) -> None:
    """A thousand packs a row group, through lists of arrays."""
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8())), ("seq_start_id", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(packing), 1000):
            columns: list[list[np.ndarray]] = [[], [], []]
            for b in range(start, min(start + 1000, len(packing))):
                spans = [(int(s.offsets[i]), int(s.offsets[i + 1])) for i in packing[b]]
                columns[0].append(np.concatenate([s.input_ids[a:e] for a, e in spans]))
                columns[1].append(np.concatenate([np.append(s.loss_mask[a + 1 : e], np.uint8(0)) for a, e in spans]))
                columns[2].append(np.cumsum([0, *(e - a for a, e in spans[:-1])], dtype=np.int32))
            writer.write_table(pa.table([pa.array(c, kind) for c, kind in zip(columns, schema.types)], schema))


def cpu(call: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def as_lists(file: pq.ParquetFile, sizes: np.ndarray, number: int) -> None:
    """One row group of an open file read, one row of it as Python lists."""
    group = int(np.searchsorted(sizes, number, "right")) - 1
    table = file.read_row_group(group, columns=["input_ids", "loss_mask", "seq_start_id"])
    for name in table.column_names:
        table.column(name)[number - int(sizes[group])].as_py()


def read_times(path: Path, chosen: list[int]) -> tuple[float, float]:
    """Median CPU milliseconds to read one of the chosen packs: as lists, and with PackReader."""
    file = pq.ParquetFile(path)
    sizes = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
    lists = [cpu(lambda: as_lists(file, sizes, b)) for b in chosen]
    reader = PackReader(path, keep=0)
    ours = [cpu(lambda: reader[b]) for b in chosen]
    return 1e3 * statistics.median(lists), 1e3 * statistics.median(ours)


def main() -> None:
    """Write both layouts, read random packs of each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--capacities", type=int, nargs="+", default=[4096, 262_144])
    parser.add_argument("--reads", type=int, default=15)
    options = parser.parse_args()
    print(f"{platform.machine()}, pyarrow {pa.__version__}, {options.tokens:,} tokens, zstd, median of {options.reads} random packs\n")
    print(f"{'pack size':>9}  {'row group':16} {'groups':>7} {'file MB':>8} {'write s':>8} {'as lists ms':>12} {'PackReader ms':>14}")
    for capacity in options.capacities:
        s = store(options.tokens, capacity)
        packing = pack(s.lengths, capacity)
        layouts: dict[str, Callable[[Path], Any]] = {
            "through objects": lambda path: through_objects(path, s, packing),
            "1000 packs": lambda path: write_shard(path, s, packing, **REFERENCE_LAYOUT),
            "131,072 tokens": lambda path: write_shard(path, s, packing),
        }
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{k}.parquet" for k in range(len(layouts))]
            for path, (name, write) in zip(paths, layouts.items()):
                written = cpu(lambda: write(path))
                lists, ours = read_times(path, np.random.default_rng(1).integers(0, len(packing), options.reads).tolist())
                groups, size = pq.read_metadata(path).num_row_groups, path.stat().st_size / 1e6
                print(f"{capacity:>9,}  {name:16} {groups:>7,} {size:8.1f} {written:8.2f} {lists:12.2f} {ours:14.2f}", flush=True)
            same = paths[0].read_bytes() == paths[1].read_bytes()
            print(f"{'':>9}  the first two files are {'equal to the byte' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
