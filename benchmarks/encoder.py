"""Claim: the compiled encoder gives the same ids as the package `tokenizers`, many times faster.

    python benchmarks/encoder.py                             tekken (needs mistral-common), 16 MB
    python benchmarks/encoder.py --tokenizer tiny --megabytes 4
    python benchmarks/encoder.py --text FILE ...             other text

The text is made of the sources of Python's standard library and of the help texts in it, cut into segments of about
the length of a chat message, and each segment is there once. All tiers encode the same segments in one process, one
after the other, on one thread, and their ids are compared.

- CPU seconds: `time.process_time`, median over the repeats. On a machine that is shared, this is steadier than the time on the wall.
- ready: CPU seconds to build and try the tier, once with tables derived (and compiled code loaded from disk, if an
  earlier run left it there), once with tables from the cache.
- first: the first pass, with an empty memo. again: the median of the later passes, on the same text.
"""

import argparse
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the package is loaded: every tier gets one thread

import numpy as np

from nemotron_nb.core import UserError
from nemotron_nb.data.encoder import TIERS, make_encoder
from nemotron_nb.data.tokenizer import load_tokenizer


def library_files() -> Iterator[Path]:
    """The sources and texts of the standard library, in a fixed order that mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*") if path.suffix in (".py", ".txt", ".rst") and "site-packages" not in path.parts]
    yield from sorted(files, key=lambda path: (path.name, str(path)))


def segments(files: list[Path], num_bytes: int, length: int) -> list[str]:
    """Text of about `num_bytes`, in segments of about `length` characters that end with a line."""
    out, size = [], 0
    for path in files:
        text, part = path.read_text(encoding="utf-8", errors="ignore"), ""
        for line in text.splitlines(keepends=True):
            part += line
            if len(part) >= length:
                out.append(part)
                size, part = size + len(part.encode()), ""
        if size >= num_bytes:
            break
    return out


def seconds(call: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds of a call, and what it gives."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(name: str, tier: str, texts: list[str], repeats: int, cache: str) -> dict[str, object]:
    """One tier on all texts."""
    tokenizer = load_tokenizer(name)
    derived, _ = seconds(lambda: make_encoder(tokenizer, tier, cache_dir=cache))
    cached, encoder = seconds(lambda: make_encoder(tokenizer, tier, cache_dir=cache))
    passes = [seconds(lambda: encoder.encode(texts)) for _ in range(repeats + 1)]
    ids, offsets = passes[0][1]
    return {"derived": derived, "cached": cached, "first": passes[0][0], "again": statistics.median(s for s, _ in passes[1:]), "ids": ids, "offsets": offsets}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="tekken")
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--segment", type=int, default=1500, help="characters a segment")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", nargs="*", type=Path, help="files to read instead of the standard library")
    options = parser.parse_args()
    texts = segments(options.text or list(library_files()), int(options.megabytes * 1e6), options.segment)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {len(texts)} segments, {size:.1f} MB; tokenizer {options.tokenizer}")
    print(f"{'tier':<12}{'ready':>8}{'cached':>8}{'first':>8}{'again':>8}   {'first MB/s':>10}{'Mtok/s':>8}   {'again MB/s':>10}{'Mtok/s':>8}   {'ratio first':>11}{'again':>7}   ids")
    reference = None
    with tempfile.TemporaryDirectory() as cache:
        for tier in reversed(TIERS):
            try:
                row = measure(options.tokenizer, tier, texts, options.repeats, cache if tier == "numba" else f"{cache}/{tier}")
            except UserError as error:
                print(f"{tier:<12}{error.what}")
                continue
            reference = reference or row
            same = np.array_equal(row["ids"], reference["ids"]) and np.array_equal(row["offsets"], reference["offsets"])
            tokens = len(row["ids"]) / 1e6
            first, again = row["first"], row["again"]
            print(
                f"{tier:<12}{row['derived']:8.2f}{row['cached']:8.2f}{first:8.2f}{again:8.2f}   {size / first:10.1f}{tokens / first:8.2f}   {size / again:10.1f}{tokens / again:8.2f}"
                f"   {reference['first'] / first:10.1f}x{reference['again'] / again:6.1f}x   {'equal' if same else 'DIFFERENT'}"
            )
    print(f"{len(reference['ids']) / 1e6:.2f} M tokens, {size * 1e6 / len(reference['ids']):.2f} bytes a token")


if __name__ == "__main__":
    main()
