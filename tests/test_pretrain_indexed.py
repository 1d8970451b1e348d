"""Indexed documents: Megatron's bytes, flat memory, nothing half written, and a sentence for each kind of damage."""

import subprocess
import sys
import typing

import numpy as np
import pytest
import typing_extensions

from nemotron_nb.core import UserError
from nemotron_nb.pretrain.indexed import (
    DTYPE_CODES,
    HEADER,
    IndexedReader,
    IndexedWriter,
    check_vocabulary,
    index_table,
    token_dtype,
)

INTEGERS = [name for name in DTYPE_CODES if "int" in name]


def random_documents(seed, count, most=200, top=120):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, top, rng.integers(1, most)) for _ in range(count)]


def write(prefix, documents, dtype="int32", batch=7, **options):
    with IndexedWriter(prefix, dtype, **options) as writer:
        for first in range(0, len(documents), batch):
            some = documents[first : first + batch]
            writer.add(np.concatenate(some), np.array([len(d) for d in some]))
    return prefix


@pytest.fixture(scope="module")
def megatron():
    """Megatron-Core's own module of indexed datasets."""
    if not hasattr(typing, "override"):  # it asks for Python 3.12
        typing.override = typing_extensions.override
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_bytes_are_those_of_megatrons_builder(tmp_path, megatron, dtype, count):
    import torch

    documents = random_documents(count, count)
    write(tmp_path / "ours", documents, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_megatron_reads_what_we_write_and_we_read_documents_of_several_sequences(tmp_path, megatron):
    import torch

    documents = random_documents(3, 40)
    theirs = megatron.IndexedDataset(str(write(tmp_path / "ours", documents)))
    assert all(np.array_equal(theirs[i], d) for i, d in enumerate(documents))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for a, b in zip(documents[::2], documents[1::2]):
        builder.add_document(torch.from_numpy(np.concatenate([a, b])), [len(a), len(b)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedReader(tmp_path / "theirs.bin")
    assert ours.documents.tolist() == list(range(0, 41, 2)) and ours.dtype == np.uint16
    assert all(np.array_equal(ours[i], d) for i, d in enumerate(documents))
    empty = megatron.IndexedDatasetBuilder(str(tmp_path / "empty.bin"))
    empty.add_document(torch.zeros(0), [0])
    empty.finalize(str(tmp_path / "empty.idx"))
    assert IndexedReader(tmp_path / "empty")[0].tolist() == []


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_documents_come_back_however_they_were_handed_over(tmp_path, dtype, batch):
    documents = random_documents(1, 50)
    prefix = write(tmp_path / "x", documents, dtype, batch)
    assert [d.tolist() for d in IndexedReader(prefix)] == [d.tolist() for d in documents]
    assert IndexedReader(f"{prefix}.idx").get(4, 1, 2).tolist() == documents[4][1:3].tolist()
    again = write(tmp_path / "y", documents, dtype, 2)
    assert all((tmp_path / f"x.{e}").read_bytes() == (tmp_path / f"y.{e}").read_bytes() for e in ("bin", "idx"))
    assert prefix.with_suffix(".idx").exists() and again.with_suffix(".bin").exists()


@pytest.mark.parametrize(
    ("ids", "lengths", "dtype", "vocab_size", "said"),
    [
        ([1, 2, 3, 4096], [2, 2], "int32", 4096, r"document 1 holds the token id 4096, and there are only ids 0 to 4,095"),
        ([1, -1], [2], "int32", None, r"document 0 holds the token id -1"),
        ([70_000], [1], "uint16", None, r"ids 0 to 65,535"),
        ([1, 2], [2, 0], "int32", None, r"document 1 has no tokens"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, ids, lengths, dtype, vocab_size, said):
    with pytest.raises(UserError, match=said):
        with IndexedWriter(tmp_path / "x", dtype, vocab_size) as writer:
            writer.add(np.array(ids), np.array(lengths))
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_document_of_the_whole_file(tmp_path):
    with IndexedWriter(tmp_path / "x", vocab_size=10) as writer:
        writer.add(np.array([1, 2, 3]), np.array([1, 1, 1]))
        with pytest.raises(UserError, match="document 4 holds the token id 10"):
            writer.add(np.array([1, 10]), np.array([1, 1]))
    assert len(IndexedReader(tmp_path / "x")) == 3, "a batch is written whole or not at all"


def test_a_document_beyond_two_gigabytes_is_refused_before_it_is_looked_at(tmp_path):
    ids = np.broadcast_to(np.int32(7), (1 << 29,))
    writer = IndexedWriter(tmp_path / "x", "int32")
    with pytest.raises(UserError, match=r"document 0 has 2,147,483,648 bytes of tokens, more than 2\^31 - 1"):
        writer.add(ids, np.array([1 << 29]))
    writer.discard()


def test_unknown_dtypes_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="unknown dtype 'int23'(.|\n)*did you mean 'int32'"):
        IndexedWriter(tmp_path / "x", "int23")
    with pytest.raises(UserError, match="uint16 cannot hold the ids of a vocabulary of 131,072(.|\n)*use int32"):
        IndexedWriter(tmp_path / "x", "uint16", 131_072)
    with pytest.raises(UserError, match="there is no document to write"):
        with IndexedWriter(tmp_path / "x"):
            pass
    with pytest.raises(UserError, match="cannot be read"):
        IndexedReader(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert [token_dtype(n).name for n in (65_499, 65_500)] == ["uint16", "int32"]


def test_each_damage_has_its_sentence(tmp_path):
    prefix = write(tmp_path / "x", random_documents(0, 5))
    ids, index = (prefix.with_suffix(e).read_bytes() for e in (".bin", ".idx"))

    def said(ids, index):
        prefix.with_suffix(".bin").write_bytes(ids)
        prefix.with_suffix(".idx").write_bytes(index)
        with pytest.raises(UserError) as error:
            IndexedReader(prefix)
        return str(error.value)

    for cut in (1, 8, 40, len(index) - 20):
        assert "it was cut off" in said(ids, index[:-cut])
    assert "only version 1" in said(ids, index[:9] + b"\x02" + index[10:])
    assert "unknown dtype code 9" in said(ids, index[:17] + b"\x09" + index[18:])
    assert "does not begin with" in said(ids, b"PAR1" + index[4:])
    assert "do not begin where" in said(ids, index[:34] + b"\xff" + index[35:])
    assert "do not cover" in said(ids, index[:-8] + (6).to_bytes(8, "little"))
    assert "do not cover" in said(ids, index[:-16] + (9).to_bytes(8, "little") + index[-8:])
    assert "it was cut off" in said(ids[:-1], index) and "it was cut off" in said(b"", index)
    assert "do not belong together" in said(ids + b"\0", index)
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match="no such file"):
        IndexedReader(prefix)


def test_ids_beyond_the_models_vocabulary_are_found(tmp_path):
    documents = [*random_documents(0, 400), np.array([500])]
    reader = IndexedReader(write(tmp_path / "x", documents))
    check_vocabulary(reader, 501)
    with pytest.raises(UserError, match="document 400 holds the token id 500"):
        check_vocabulary(reader, 500)


def test_an_old_index_never_stands_beside_a_new_bin(tmp_path, monkeypatch):
    """Killed between the two renames, there is no index, so nobody reads the pair."""
    import os

    write(tmp_path / "x", random_documents(0, 5))
    real = os.replace

    def replace(source, target):
        real(source, target)
        if str(target).endswith(".bin"):
            raise KeyboardInterrupt

    monkeypatch.setattr("nemotron_nb.pretrain.indexed.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", random_documents(1, 9))
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """Twenty million documents: their tables alone are 400 MB."""
    code = f"""
import numpy as np, resource
from nemotron_nb.pretrain.indexed import IndexedWriter, IndexedReader
ids, lengths = np.zeros(100_000, np.int32), np.ones(100_000, np.int64)
writer = IndexedWriter({str(tmp_path / "x")!r}, "uint8")
writer.add(ids, lengths)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(199): writer.add(ids, lengths)
print(writer.close().documents, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "20000000" and int(said[1]) < 100, said


def test_the_table_of_an_index_adds_up(tmp_path):
    prefix = write(tmp_path / "x", random_documents(0, 20))
    text = index_table(prefix).text
    assert f"{prefix.with_suffix('.idx').stat().st_size:,} bytes" in text and "12 more" in text and HEADER.size == 34
