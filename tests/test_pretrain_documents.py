"""Text to bin/idx: which rows are documents, which tokens they have, the same bytes however they are made, no row lost."""

import dataclasses
import gzip
import importlib.util
import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotron_nb.core import UserError
from nemotron_nb.data.blend import Dataset
from nemotron_nb.data.nvidia_prep import shard_plan
from nemotron_nb.data.encoder import make_encoder, table_folder
from nemotron_nb.data.files import BadJson, Reject
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.pretrain.documents import (
    DocumentsConfig,
    DocumentsManifest,
    prepare_documents,
    read_megatron_blend,
    read_size,
)
from nemotron_nb.pretrain.indexed import IndexedReader
from nemotron_nb.pretrain.text import document_files, document_units, read_texts, row_parser
from nemotron_nb.pretrain.tokens import (
    DocumentSettings,
    DocumentTokenizer,
    _loosely,
    _python_rows,
    encode_recognising,
    frame,
    keep_first,
)

TEXTS = ["A lamp.", "Two\nlines.", "caf\u00e9 \U0001f600", "<s>[INST] hi </s><|im_end|>", "x" * 300, "\t tab", "a\u0000b"]
TOKENIZER = load_tokenizer("tiny")
END = TOKENIZER.special_ids["<|im_end|>"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(path, field="text", **options):
    return [found for unit in document_units(path, 64) for _, found in read_texts(unit, field, **options)]


def contents(folder):
    """The bytes of all shards and lists, by name."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "blend.json")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def prepare(tmp_path, name="out", force=False, **given):
    given.setdefault("workers", 1)
    return prepare_documents(DocumentsConfig(output_dir=str(tmp_path / name), **given), force=force)


def documents_of(manifest, split):
    readers = [IndexedReader(path) for _, path in manifest.prefixes(split)]
    return [reader[i].tolist() for reader in readers for i in range(len(reader))]


# --- which rows are documents ----------------------------------------------------------------------------------------


def test_every_form_of_file_gives_the_same_texts(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
    plain = jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        assert texts_of(path) == TEXTS, path


def test_a_plain_text_is_one_document(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = "\ufeffTwo\nlines \u00e9.\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.rst.zst").write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    (tmp_path / "brackets.txt").write_text('{"text": 1}\n')
    assert document_files(Dataset("x", str(tmp_path)), tmp_path) == sorted(tmp_path.iterdir())
    for name in ("a.txt", "b.md.gz", "c.rst.zst"):
        assert texts_of(tmp_path / name) == [text.removeprefix("\ufeff")]
    assert texts_of(tmp_path / "brackets.txt") == ['{"text": 1}\n']
    jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])  # now it is a folder of data, and the texts are about it
    assert document_files(Dataset("x", str(tmp_path)), tmp_path) == [tmp_path / "rows.jsonl"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "not_utf8"), (b"  \n ", "empty"), (gzip.compress(b"A lamp." * 99)[:-9], "truncated_file"), (gzip.compress(b"lamp" * 99, mtime=0)[:-8] + bytes(8), "damaged_file")],
    ids=["not_utf8", "empty", "truncated", "damaged"],
)
def test_a_plain_text_that_is_none(tmp_path, content, reason):
    path = tmp_path / ("a.txt.gz" if content[:2] == b"\x1f\x8b" else "a.txt")
    path.write_bytes(content)
    (found,) = texts_of(path)
    assert isinstance(found, Reject) and found.reason == reason and found.line == 1


def test_a_row_that_is_no_document_has_a_reason_and_a_line(tmp_path):
    lines = ['{"text": "a"}', '{"text": null}', '{"txt": "a"}', "[1]", '{"text": " "}', '{"text": 7}', "{", '{"text": "a", "text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = [(line, f.reason) for u in document_units(tmp_path / "a.jsonl") for line, f in read_texts(u) if isinstance(f, Reject)]
    reasons = ["text_is_null", "no_text", "not_an_object", "empty", "text_not_text", "not_json", "duplicate_key"]
    assert found == list(zip(range(2, 9), reasons))
    assert texts_of(tmp_path / "a.jsonl", anything=True)[5] == "7"


def test_parquet_without_the_column_and_with_bytes_that_are_no_text(tmp_path):
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "a.parquet")
    assert [f.detail for f in texts_of(tmp_path / "a.parquet")] == ["no field 'text'; known: body"] * 2
    raw = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff", b"fine"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": raw}), tmp_path / "b.parquet")
    found = texts_of(tmp_path / "b.parquet")
    assert found[0] == "ok" and found[2] == "fine" and found[1].reason == "not_utf8" and found[1].line == 2


def test_the_fast_parser_refuses_what_the_slow_one_refuses(monkeypatch):
    pytest.importorskip("orjson")
    rng, pieces = random.Random(0), ['"text"', '"id"', ":", ",", "{", "}", "[", "]", '"a"', "1", "null", "NaN", "1e999", '"\\ud800"', '"te\\u0078t"', " ", '"\\u00e9"', "\u00e9"]
    fast = row_parser("text")
    monkeypatch.setitem(sys.modules, "orjson", None)
    slow = row_parser("text")

    def result(parse, data):
        try:
            value = parse(data)
            return ("text", value.get("text")) if isinstance(value, dict) else ("other", type(value))
        except BadJson as error:
            return error.reason

    cases = ["{" + '"text":"a","text":"b"}', '{"text":"a","id":1,"id":2}', '{"te\\u0078t":"b","text":"a"}']
    cases += ["".join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(4000)]
    cases += ["{" + f'"text":{rng.choice(pieces)},"id":{rng.choice(pieces)}' + "}" for _ in range(2000)]
    assert [result(p, cases[0].encode()) for p in (fast, slow)] == ["duplicate_key"] * 2
    assert [result(p, cases[1].encode()) for p in (fast, slow)] == [("text", "a")] * 2
    for case in cases:
        assert result(fast, case.encode()) == result(slow, case.encode()), case


def test_rows_in_python_s_way_are_the_same_with_orjson_where_the_text_decides():
    """What differs between the two parsers, such as numbers of twenty digits, never reaches a text."""
    pytest.importorskip("orjson")
    rng, fast = random.Random(1), _python_rows("text")
    pieces = ['"text"', '"id"', ":", ",", "{", "}", "[", "]", '"a"', "1", "null", "NaN", "1e999", "-0", "12345678901234567890123", "9" * 5000, "[" * 2000, "]" * 2000, '"\\ud800"', '"te\\u0078t"', " ", '"\\u00e9"', "\u00e9"]

    def result(parse, data):
        try:
            value = parse(data)
        except BadJson as error:
            return error.reason
        return repr(value.get("text", "none")) if isinstance(value, dict) else repr(value)[:50]

    cases = [f'{{"text":{text},"id":{other}}}' for text in pieces for other in pieces]
    cases += ["{" + ",".join(f'{rng.choice(pieces[:2])}:{rng.choice(pieces)}' for _ in range(3)) + "}" for _ in range(2000)]
    cases += ["".join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(2000)]
    cases += ['{"text":"a","id":' + "[" * depth + "]" * depth + "}" for depth in (1, 50, 99, 150, 900, 1000, 1020, 5000)]
    for case in [c.encode() for c in cases] + [b"\xff", b"\xef\xbb\xbf{}", '{"text":"a"}'.encode("utf-16")]:
        assert result(fast, case) == result(_loosely, case), case[:100]


# --- files behind an address -------------------------------------------------------------------------------------------

STORED = {
    "rows": {"a.jsonl": "plain", "more/b.jsonl.gz": "gz", "README.md": "about"},
    "texts": {"one.txt": "note", "two.md.gz": "packed", "table.bin": "about"},
}


def stored(folder):
    """The files of STORED, and 3 documents each in rows and texts."""
    plain = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2])
    contents = {"plain": plain.encode(), "gz": gzip.compress(json.dumps({"text": TEXTS[2]}).encode()), "about": b"# not a document"}
    contents |= {"note": "A lamp.".encode(), "packed": gzip.compress("# Lamps".encode())}
    for name, files in STORED.items():
        for file, kind in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_bytes(contents[kind])
    return folder


@pytest.fixture(params=["s3", "gs", "hf"])
def address(request, tmp_path, monkeypatch):
    """What begins each address of a stand-in that holds the folders of STORED: a bucket, or an owner on the hub."""
    folder, scheme = stored(tmp_path / "stored"), request.param
    if scheme == "hf":
        import huggingface_hub

        of = lambda repo: folder / repo.partition("/")[2]
        names = lambda self, repo, repo_type: sorted(str(p.relative_to(of(repo))) for p in of(repo).rglob("*") if p.is_file())
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", names)
        monkeypatch.setattr("nemotron_nb.data.blend.hub_file", lambda repo, file, repo_type: of(repo) / file)
        return "hf://owner/"
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol, store, pseudo_dirs, cachable = scheme, {}, [""], False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix(f"{scheme}://"))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)  # `fsspec.registry` is its content
    Bucket().pipe({f"/bucket/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    return f"{scheme}://bucket/"


def test_documents_behind_an_address_are_those_of_the_files(tmp_path, address):
    alone = {"num_shards": 1, "valid_shards": 0, "test_shards": 0}
    for name, texts in (("rows", TEXTS[:3]), ("texts", ["A lamp.", "# Lamps"])):
        manifest = prepare(tmp_path, name, path=address + name, **alone)
        found = documents_of(manifest, "train")
        assert sorted(found) == sorted([*TOKENIZER.encode(text, special=False), END] for text in texts)
        again = prepare(tmp_path, f"{name} again", path=address + name, **alone)
        assert contents(again.folder) == contents(manifest.folder)


def test_one_file_and_a_glob_behind_an_address(tmp_path, address):
    if address.startswith("hf"):
        with pytest.raises(UserError, match="no file belongs to split 'valid'(.|\n)*a.jsonl"):
            document_files(Dataset("x", address + "rows", split="valid"), tmp_path)
        return
    found = {path: [f.name for f in document_files(Dataset("x", address + path), tmp_path)] for path in ("rows/a.jsonl", "rows/*.jsonl", "rows", "texts/one.txt")}
    assert found == {"rows/a.jsonl": ["a.jsonl"], "rows/*.jsonl": ["a.jsonl"], "rows": ["a.jsonl", "b.jsonl.gz"], "texts/one.txt": ["one.txt"]}
    with pytest.raises(UserError, match="'x' matches no file"):
        document_files(Dataset("x", address + "rows/*.parquet"), tmp_path)


# --- which tokens they have ------------------------------------------------------------------------------------------


def test_frames_and_cuts_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        documents = [rng.integers(0, 99, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 20))]
        bos, eos = (None, 1)[rng.integers(2)], (None, 2)[rng.integers(2)]
        most = None if rng.random() < 0.3 else int(rng.integers(1, 9))
        flat, lengths = np.array(sum(documents, []), np.int32), np.array([len(d) for d in documents])
        ids, framed = frame(*keep_first(flat, lengths, most), bos, eos)
        wanted = [[*[bos][: bos is not None], *d[:most], *[eos][: eos is not None]] for d in documents]
        assert [p.tolist() for p in np.split(ids, np.cumsum(framed)[:-1])] == wanted


def test_recognising_special_tokens_is_what_the_full_tokenizer_does():
    encoder, rng = make_encoder(TOKENIZER, "tokenizers"), random.Random(0)
    pieces = [*TOKENIZER.special_ids, "a", " ", "lamp", "\n", "<", "s>", "\u00e9", "[INST"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(0, 9))) for _ in range(300)]
    compiled = [make_encoder(TOKENIZER, "numba", cache_dir=table_folder())] if importlib.util.find_spec("numba") else []
    for way in (encoder, *compiled):
        ids, offsets = encode_recognising(texts, TOKENIZER, way)
        for text, a, b in zip(texts, offsets, offsets[1:]):
            assert ids[a:b].tolist() == TOKENIZER.encode(text, special=True), text
    plain, _ = encode_recognising(["a lamp"], TOKENIZER, encoder)
    assert plain.tolist() == TOKENIZER.encode("a lamp", special=False)


def test_special_tokens_in_a_text_stay_text_and_each_document_ends_once(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS] * 5)
    manifest = prepare(tmp_path, path=str(path), num_shards=3)
    found = [d for split in ("train", "valid", "test") for d in documents_of(manifest, split)]
    assert sorted(found) == sorted([*TOKENIZER.encode(t, special=False), END] for t in TEXTS * 5)
    assert manifest["text_bytes"] == 5 * sum(len(t.encode()) for t in TEXTS)


def test_a_document_that_is_cut_keeps_its_end_and_is_listed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "lamp " * n} for n in (1, 50, 3, 60)])
    sections = {"tokenizer": DocumentTokenizer(add_bos=True), "valid_shards": 0, "test_shards": 0}
    manifest = prepare(tmp_path, path=str(path), max_doc_tokens=8, num_shards=1, **sections)
    found = documents_of(manifest, "train")
    assert [len(d) for d in found].count(8) == 2 and all(d[-1] == END and d[0] == TOKENIZER.special_ids["<s>"] for d in found)
    listed = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["line"], r["reason"]) for r in listed] == [("cut", 2, "too_long"), ("cut", 4, "too_long")]
    whole = [len(TOKENIZER.encode("lamp " * n, special=False)) + 2 for n in (50, 60)]
    assert manifest["cut_tokens"] == sum(whole) - 16 and manifest["cut"] == {"too_long": 2}


@pytest.mark.parametrize(("token", "model"), [("</s>", "tiny"), (None, "folder"), (None, "tiny")])
def test_which_token_ends_a_document(tmp_path, token, model):
    folder = TOKENIZER.save(tmp_path / "tok", None)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    section = DocumentTokenizer(model=str(folder) if model == "folder" else model, eos_token=token)
    manifest = prepare(tmp_path, path=str(path), tokenizer=section, num_shards=3)
    assert documents_of(manifest, "test")[0][-1] == (END if (token, model) == (None, "tiny") else 2) == manifest["end_token"]


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """Four files of two datasets, and their blend."""
    rng = random.Random(0)
    words = "lamp price weight euro sum unit story\n <s> 12 345".split(" ")
    for name in ("a0", "a1", "a2", "b"):
        rows = [{"text": " ".join(rng.choices(words, k=rng.randrange(1, 60))), "n": i} for i in range(70)]
        jsonl(tmp_path / f"{name}.jsonl", rows)
    entries = [{"name": "a", "path": str(tmp_path / "a*.jsonl"), "weight": 3}, {"name": "b", "path": str(tmp_path / "b.jsonl")}]
    (tmp_path / "mix.json").write_text(json.dumps({"datasets": entries}))
    return tmp_path


def test_workers_change_no_byte(corpus):
    blend = str(corpus / "mix.json")
    first = prepare(corpus, "one", blend_path=blend, num_shards=4)
    for name, ways in {"two": {"workers": 2}, "seven": {"workers": 7}}.items():
        other = prepare(corpus, name, blend_path=blend, num_shards=4, **ways)
        assert contents(corpus / name) == contents(corpus / "one"), name
        assert other["key"] == first["key"]
    shares = {name: sum(float(s["weight"]) for s in first.shards("train") if s["dataset"] == name) for name in "ab"}
    assert shares == {"a": pytest.approx(3), "b": pytest.approx(1)}
    assert all(len({s["dataset"] for s in first.shards(split)}) == 2 for split in ("train", "valid", "test"))


@pytest.mark.long
def test_ray_changes_no_byte(corpus):
    ray, blend = pytest.importorskip("ray"), str(corpus / "mix.json")
    first = prepare(corpus, "local", blend_path=blend, num_shards=4, workers=2)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        other = prepare(corpus, "ray", blend_path=blend, num_shards=4, executor="ray")
    finally:
        ray.shutdown()
    assert contents(corpus / "ray") == contents(corpus / "local") and other["key"] == first["key"]


@pytest.mark.parametrize("where", ["tokens._tokenize", "documents.write_shard"])
def test_killed_and_started_again_the_bytes_are_the_same(corpus, where):
    module, function = where.split(".")
    code = f"""
import os
from nemotron_nb.pretrain import {module}
from nemotron_nb.pretrain.documents import DocumentsConfig, prepare_documents
real, calls = {module}.{function}, []
def deadly(*args, **named):
    calls.append(1)
    if len(calls) == 3: os.kill(os.getpid(), 9)
    return real(*args, **named)
{module}.{function} = deadly
prepare_documents(DocumentsConfig(blend_path={str(corpus / "mix.json")!r}, output_dir={str(corpus / "out")!r}, num_shards=4, workers=1))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not (corpus / "out/manifest.json").exists() and not list((corpus / "out").glob("*.idx"))
    blend = str(corpus / "mix.json")
    again = prepare(corpus, blend_path=blend, num_shards=4)
    assert ("2" if module == "tokens" else "4") + " units found" in again.tokenized
    prepare(corpus, "clean", blend_path=blend, num_shards=4)
    assert contents(corpus / "out") == contents(corpus / "clean")


def test_the_same_request_finds_the_data_and_another_one_asks_for_force(corpus):
    given = {"blend_path": str(corpus / "mix.json"), "num_shards": 4}
    first = prepare(corpus, **given)
    assert prepare(corpus, **given, workers=2).tokenized == "" and first["key"] == DocumentsManifest.load(corpus / "out")["key"]
    with pytest.raises(UserError, match="prepared from another source or with other settings"):
        prepare(corpus, **given | {"min_doc_chars": 5})
    assert prepare(corpus, force=True, **given | {"min_doc_chars": 50})["documents"] < first["documents"]
    (corpus / "out/notes.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files: notes.md"):
        prepare(corpus, force=True, **given)


def test_a_sample_reads_the_first_rows_of_each_dataset(corpus):
    manifest = prepare(corpus, blend_path=str(corpus / "mix.json"), sample=80, num_shards=3)
    assert manifest["rows"] == 80 + 70 and manifest["documents"] == 150


def test_splits_listed_apart_stay_apart(corpus):
    parts = {s: [{"name": s, "path": str(corpus / f"{n}.jsonl")}] for s, n in (("train", "a0"), ("valid", "a1"))}
    (corpus / "parts.json").write_text(json.dumps(parts))
    manifest = prepare(corpus, blend_path=str(corpus / "parts.json"))
    assert sorted(manifest["splits"]) == ["train", "valid"] and len(manifest.shards("train")) == 1
    rows = [json.loads(line)["text"] for line in (corpus / "a1.jsonl").read_text().splitlines()]
    assert documents_of(manifest, "valid") == [[*TOKENIZER.encode(t, special=False), END] for t in rows]
    with pytest.raises(UserError, match="lists datasets split by split"):
        prepare(corpus, "nv", blend_path=str(corpus / "parts.json"), compat="nvidia")


# --- as NVIDIA's preparation does it ---------------------------------------------------------------------------------


def test_compat_is_what_a_plain_reading_of_nvidias_preparation_gives(corpus):
    """Shards of files or rows, `str` of any value, special tokens recognised, cut behind the end, one deck for the splits."""
    odd = [{"text": 7}, {"text": None}, {"text": ""}, {"txt": 1}, {"text": "</s> lamp <|im_end|>" * 9}, {"text": {"a": [1]}}]
    rows = [json.loads(line) for line in (corpus / "b.jsonl").read_text().splitlines()]
    jsonl(corpus / "b.jsonl", [*odd, *rows])
    given = {"blend_path": str(corpus / "mix.json"), "max_doc_tokens": 60}
    manifest = prepare(corpus, compat="nvidia", num_shards=4, min_doc_chars=2, max_bad_fraction=1.0, **given)
    deck = []
    for name, pattern, weight in (("a", "a*.jsonl", "3"), ("b", "b.jsonl", "1.0")):
        files = [(str(p), p.stat().st_size) for p in sorted(corpus.glob(pattern))]
        for k, parts in enumerate(shard_plan(files, 4)):
            documents = []
            for path, modulus, rest in parts:
                for number, line in enumerate(open(path, encoding="utf-8")):
                    text = json.loads(line).get("text")
                    if number % modulus == rest and text is not None and len(str(text)) >= 2:
                        documents.append([*TOKENIZER.encode(str(text), special=True), END][:60])
            deck.append((f"datasets/{name}/shard_{k:06d}", float(weight), documents))
    random.Random(42).shuffle(deck)
    blend = read_megatron_blend(corpus / "out/blend.json")
    for split, part in {"test": deck[:1], "valid": deck[1:2], "train": deck[2:]}.items():
        assert blend[split] == [(weight, str(corpus / "out" / name)) for name, weight, _ in part]
        for (_, prefix), (_, _, documents) in zip(blend[split], part):
            assert [d.tolist() for d in IndexedReader(prefix)] == documents
    assert manifest["rejects"] == {"no_text": 1, "text_is_null": 1}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_shards": 4, "shard_size": "64MB"}, "num_shards and shard_size are both given"),
        ({"shard_size": "many"}, "'many' is not a size"),
        ({"dtype": "int23"}, "unknown dtype 'int23'"),
        ({"dtype": "float32"}, "for token ids"),
        ({"num_shards": 2}, "2 shards, and 2 of them for validation and test"),
        ({"max_doc_tokens": 1}, "max_doc_tokens is 1"),
        ({"compat": "nvidea"}, "did you mean 'nvidia'"),
        ({"executor": "slurm"}, "unknown executor"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction is 2.0"),
        ({"sample": 0}, "sample is 0"),
    ],
)
def test_settings_that_make_no_sense(given, said):
    with pytest.raises(UserError, match=said):
        DocumentsConfig(**given)


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{"text": None}] * 3, {}, "3 of 3 rows are no document(.|\n)*text_is_null: a.jsonl:1: text is null"),
        ([{"text": "a"}] * 2, {}, "dataset 'a': has 2 documents(.|\n)*2 are needed for validation and test"),
        ([{"text": "a"}] * 9, {"min_doc_chars": 5}, "dataset 'a': has no document"),
        ([{"text": "a"}] * 9, {"tokenizer": DocumentTokenizer("none")}, "no such tokenizer"),
        ([{"text": "a"}] * 9, {"tokenizer": DocumentTokenizer(eos_token="<eos>")}, "no special token is called '<eos>'"),
        ([{"text": "a"}] * 9, {"dtype": "uint8"}, "uint8 cannot hold the ids of a vocabulary of 4,096"),
    ],
)
def test_nothing_is_half_written(tmp_path, rows, given, said):
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=said):
        prepare(tmp_path, path=str(path), **given)
    left = list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else []
    assert not [p for p in left if p.name not in ("runs", ".lock")] and not list(tmp_path.rglob("*.idx.*"))


def test_a_path_that_is_not_there_and_a_blend_with_zero_weight(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        prepare(tmp_path, path=str(tmp_path / "none*.jsonl"))
    (tmp_path / "blend.json").write_text(json.dumps({"datasets": [{"name": "a", "path": "x", "weight": 0}]}))
    with pytest.raises(UserError, match="weight 0"):
        prepare(tmp_path, blend_path=str(tmp_path / "blend.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train": ["1.0"]}, "not a list of weights and paths in turn"),
        ({"train": ["1.0", "a", "b"]}, "not a list of weights and paths in turn"),
        ({"train": ["a", "b"]}, "'a' stands where a weight belongs"),
        ({"train": ["0", "b"]}, "'0' stands where a weight belongs"),
        ({"train": [["1.0", "a"], ["nan", "b"]]}, "'nan' stands where a weight belongs"),
        ({"trian": ["1.0", "a"]}, "did you mean 'train'"),
        ([], "not an object with splits"),
    ],
)
def test_a_blend_with_odd_items(tmp_path, content, said):
    (tmp_path / "blend.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_megatron_blend(tmp_path / "blend.json")


def test_a_blend_in_either_form_and_with_relative_paths(tmp_path):
    (tmp_path / "blend.json").write_text(json.dumps({"train": [["1.0", "a"], [2, "/b"]], "valid": ["0.5", "c/d"], "test": []}))
    found = read_megatron_blend(tmp_path / "blend.json")
    assert found == {"train": [(1.0, str(tmp_path / "a")), (2.0, "/b")], "valid": [(0.5, str(tmp_path / "c/d"))]}


def test_sizes():
    assert [read_size(s) for s in ("1", "2KB", "2 kib", "1.5MB")] == [1, 2000, 2048, 1_500_000]
    assert dataclasses.asdict(DocumentSettings())["dtype"] == "int32"
