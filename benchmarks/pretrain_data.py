"""Claim: text becomes the .bin and .idx of NVIDIA's public data preparation, byte for byte, in a fraction of its CPU time.

    git clone https://github.com/NVIDIA-NeMo/Nemotron
    python benchmarks/pretrain_data.py --reference Nemotron                     both sides, one core
    python benchmarks/pretrain_data.py --reference Nemotron --tokenizer tiny    a tokenizer that needs no package
    python benchmarks/pretrain_data.py                                          ours alone

Both sides read the same JSONL file, made of the sources and texts of Python's standard library, one file a document,
each in a process of its own that is bound to one core.

- The reference runs its own shard function, unmodified. Its pipeline around it (Ray, downloads) does not run, and its
  package files that would import it are stepped over.
- Ours runs `prepare_documents`, from the file to the finished folder: once with compat=nvidia, whose bytes are compared,
  and once as it is by default, where special tokens in a text stay text.
- CPU seconds: user and system time of the process and its children. Set-up (imports, loading the tokenizer, building
  the encoder's tables) does not grow with the text. The reference's is outside its measured function; ours happens in
  the same process on a file of one document first, and is shown on a line of its own.
- peak: the largest resident memory. It does not grow with the file; --megabytes 8 and 64 show that.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the package is loaded: both sides get one thread


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def write_text(path: Path, num_bytes: int) -> tuple[int, int]:
    """(documents, bytes of text) of a JSONL file of about that many bytes of text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in root.rglob("*") if p.suffix in (".py", ".txt", ".rst", ".pyi", ".md") and p.is_file()]
    count = size = 0
    with open(path, "w", encoding="utf-8") as file:
        for source in sorted(found, key=lambda p: (p.name, str(p))):
            text = source.read_bytes().decode("utf-8", "ignore")
            if text.strip() and size < num_bytes:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text.encode())
    return count, size


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each .bin and .idx."""
    paths = sorted(p for p in folder.rglob("shard_*") if p.suffix in (".bin", ".idx"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in paths}


# --- the two sides, each in a process of its own ---------------------------------------------------------------------


def run_reference(options: argparse.Namespace) -> dict[str, Any]:
    """The reference's shard function. Packages above it get empty stand-ins, so that their imports do not run."""
    source = Path(options.reference) / "src"
    if not (source / "nemotron/data_prep/core/shard_processor.py").is_file():
        raise SystemExit(f"{options.reference}: no checkout of https://github.com/NVIDIA-NeMo/Nemotron")
    names = ("nemotron", *(f"nemotron.data_prep{p}" for p in ("", ".core", ".utils", ".formats")))
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    core = importlib.import_module("nemotron.data_prep.core.shard_processor")
    providers = importlib.import_module("nemotron.data_prep.core.providers")
    filesystem = importlib.import_module("nemotron.data_prep.utils.filesystem")
    section = {"type": "huggingface", "model": options.folder, "resolved_revision": None, "add_bos": False, "add_eos": True}
    tokenize = providers.create_tokenizer(section)
    files = [{"path": options.text, "local_path": options.text, "size": os.path.getsize(options.text)}]
    out, _ = f"{options.output}/reference", Path(f"{options.output}/reference").mkdir()
    given = {"text_field": "text", "min_doc_chars": None, "max_doc_tokens": None, "dtype": "int32", "max_rows": None}
    system, _ = filesystem.get_filesystem(out)
    place = {"shard_index": 0, "assignment": {"files": files}, "output_dir": out, "output_fs": system}
    cpu, wall = cpu_seconds(), time.perf_counter()
    core.process_binidx_shard_files_core(tokenize=tokenize, **given, **place)
    return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "digests": digests(Path(out))}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """`prepare_documents`, from the file to the finished folder."""
    from nemotron_nb.pretrain.documents import DocumentsConfig, prepare_documents
    from nemotron_nb.pretrain.tokens import DocumentTokenizer

    out = f"{options.output}/ours-{options.compat}-{Path(options.text).stem}"
    shared = {"num_shards": 1, "valid_shards": 0, "test_shards": 0, "workers": 1, "encoder": options.tier}
    section = DocumentTokenizer(model=options.folder)
    config = DocumentsConfig(path=options.text, output_dir=out, tokenizer=section, compat=options.compat, **shared)
    begun = cpu_seconds()
    prepare_documents(dataclasses.replace(config, path=options.one, output_dir=f"{out}-one"))
    cpu, wall = cpu_seconds(), time.perf_counter()
    manifest = prepare_documents(config)
    return {
        "set_up": cpu - begun,
        "cpu": cpu_seconds() - cpu,
        "wall": time.perf_counter() - wall,
        "digests": digests(Path(out)),
        "tokenized": manifest.tokenized,
        "tokens": manifest["tokens"],
    }


def in_process(side: str, options: argparse.Namespace, **given: str) -> dict[str, Any]:
    """One side in a process of its own, bound to one core; what it measured, and its peak of memory in MB."""
    values = vars(options) | given
    flags = [f"--{k}={values[k]}" for k in ("reference", "folder", "text", "output", "compat", "tier", "one") if values.get(k)]
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, sys.executable, __file__, "--side", side, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# --- the table -------------------------------------------------------------------------------------------------------


def print_row(name: str, cpu: float, wall: float, peak: float, size: int, beside: float | None) -> None:
    """One line of the table."""
    faster = f"{beside / cpu:6.1f} x" if beside else " " * 8
    print(f"{name:44}{cpu:9.2f}{wall:9.2f}{size / 1e6 / cpu:9.1f}{faster}{peak:9.0f}")


def compare(options: argparse.Namespace) -> None:
    """Both sides on the same text."""
    from nemotron_nb.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as work:
        options.output, options.folder = work, str(load_tokenizer(options.tokenizer).save(Path(work) / "tokenizer", None))
        options.text, options.one = f"{work}/text.jsonl", f"{work}/one.jsonl"
        count, size = write_text(Path(options.text), int(options.megabytes * 1e6))
        write_text(Path(options.one), 10)
        print(f"{count:,} documents, {size / 1e6:.1f} MB of text, tokenizer {options.tokenizer}, {platform.processor() or platform.machine()}")
        print(f"{'':44}{'CPU s':>9}{'wall s':>9}{'MB/CPU s':>9}{'':8}{'peak MB':>9}")
        theirs = in_process("reference", options) if options.reference else None
        if theirs:
            print_row("NVIDIA's shard function", theirs["cpu"], theirs["wall"], theirs["peak"], size, None)
        for compat in ("nvidia", "fixed"):
            ours = in_process("ours", options, compat=compat)
            beside = theirs["cpu"] if theirs else None
            print_row(f"ours, compat={compat}", ours["cpu"], ours["wall"], ours["peak"], size, beside)
            print(f"{'  set-up before that, once a process':44}{ours['set_up']:9.2f}")
            if theirs and compat == "nvidia":
                same = ours["digests"] == theirs["digests"]
                print(f"the .bin and .idx are the same bytes: {same}; {ours['tokens']:,} tokens, {ours['tokenized']}")
                if not same:
                    raise SystemExit(f"reference {theirs['digests']}, ours {ours['digests']}")


def main() -> None:
    """Print the table, or run one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="a checkout of https://github.com/NVIDIA-NeMo/Nemotron")
    parser.add_argument("--tokenizer", default="tekken", help="tekken needs mistral-common")
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--tier", default="numba", help="of our encoder: numba, tiktoken or tokenizers")
    for name in ("side", "folder", "text", "one", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--compat", default="fixed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.side:
        return compare(options)
    found = {"reference": run_reference, "ours": run_ours}[options.side](options)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(json.dumps(found | {"peak": peak}))


if __name__ == "__main__":
    main()
