"""Shards: what is written is what packs say, in bounded groups, the same bytes twice; what is damaged or hostile is refused by name."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data import shards
from nemotron_nb.data.pack import Packing, aligned, alignment, fitted, make_pack, pack
from nemotron_nb.data.shards import REFERENCE_LAYOUT, PackReader, Sequences, read_npy, read_packs, row_groups, write_npy, write_shard

CLOSE, PAD = 11, 2


def store(masks):
    """A store of sequences with these masks; every token is another number."""
    offsets = np.cumsum([0, *map(len, masks)])
    flat = [m for mask in masks for m in mask]
    chats = [f"chat {i}" for i in range(len(masks))]
    ids = np.arange(100, 100 + len(flat), dtype=np.int32)
    return Sequences(ids, np.array(flat, np.uint8), offsets, np.arange(len(masks), dtype=np.int32), chats, [f"f.jsonl:{i}" for i in range(len(masks))])


def random_store(count, seed=0, most=400):
    r = np.random.default_rng(seed)
    return store([(r.random(n) < 0.4).astype(int).tolist() for n in np.clip(r.lognormal(4, 1, count).astype(int), 1, most)])


def plain(packs):
    return [(p.input_ids.tolist(), p.loss_mask.tolist(), p.seq_start_id.tolist(), p.conversation_ids, p.sources) for p in packs]


def packs_by_hand(s, spans, packing, multiple):
    """What the shard should hold, one sequence at a time."""
    packs = []
    for b in packing:
        ids, masks, names = [], [], []
        for k in b:
            i, start, end = int(spans.sequence[k]), int(spans.start[k]), int(spans.end[k])
            own = s.input_ids[s.offsets[i] :][start:end].tolist()
            mask = s.loss_mask[s.offsets[i] :][start:end].tolist()
            if spans.closing[k]:
                own[-1], mask[-1] = CLOSE, 0
            while (len(own) - 1) % multiple:
                own.append(PAD)
                mask.append(0)
            ids.append(np.array(own))
            masks.append(np.array(mask))
            names.append(i)
        packs.append(make_pack(ids, masks, [f"chat {i}" for i in names], [f"f.jsonl:{i}" for i in names]))
    return packs


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=25), min_size=1, max_size=15),
    st.sampled_from(["truncate", "cut", "split", "drop"]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_a_shard_gives_back_what_the_spans_say(tmp_path_factory, masks, policy, multiple, group_tokens, group_packs):
    s, capacity = store(masks), 13
    spans = fitted(s.lengths, capacity, policy, multiple)
    packing = pack(aligned(spans.lengths, multiple), capacity, seed=1)
    path = tmp_path_factory.mktemp("shard") / "a.parquet"
    written = write_shard(path, s, packing, spans=spans, pad_to_multiple=multiple, pad_id=PAD, close_id=CLOSE, row_group_tokens=group_tokens, row_group_packs=group_packs)
    expected = packs_by_hand(s, spans, packing, multiple)
    got = read_packs(path)
    assert plain(got) == plain(expected)
    assert all(len(p) <= capacity and all((b - a - 1) % multiple == 0 for a, b in p.spans) for p in got)
    assert (written.packs, written.sequences, written.tokens, written.trained_tokens) == (len(packing), len(spans), sum(map(len, expected)), sum(int(p.loss_mask.sum()) for p in expected))
    assert written.tokens - written.padding == spans.lengths.sum()


def test_shards_of_one_packing_hold_it_together_and_a_reader_finds_each_pack(tmp_path):
    s = random_store(300)
    packing = pack(s.lengths, 500)
    half = len(packing) // 2
    for k, packs in enumerate((range(half), range(half, len(packing)), range(0, 0))):
        write_shard(tmp_path / f"shard_{k:06d}.parquet", s, packing, packs, row_group_tokens=2000)
    expected = packs_by_hand(s, fitted(s.lengths, 500), packing, 1)
    reader = PackReader(tmp_path)
    assert len(reader) == len(expected) and len(reader.files) == 3 and "3 files" in repr(reader)
    order = np.random.default_rng(1).permutation(len(reader)).tolist()
    assert plain(reader[i] for i in order) == plain(expected[i] for i in order)
    assert plain(pickle.loads(pickle.dumps(reader))) == plain(expected) == plain(read_packs(tmp_path))
    assert plain([reader[-1]]) == plain(expected[-1:])
    for i in (len(reader), -len(reader) - 1):
        with pytest.raises(IndexError):
            reader[i]


def test_one_pack_costs_one_row_group_and_no_copy(tmp_path, monkeypatch):
    s = random_store(300)
    write_shard(tmp_path / "a.parquet", s, pack(s.lengths, 500), row_group_tokens=2000)
    reader, read = PackReader(tmp_path, keep=2), []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, g, **k: read.append(g) or real(self, g, **k))
    first, second = reader[0], reader[1]
    assert read == [0] and np.shares_memory(first.input_ids.base, second.input_ids.base) and not first.input_ids.flags.writeable
    several = PackReader(tmp_path, keep=2)
    begins = several._first.tolist()
    for group in (0, 1, 0, 2, 0):
        several[begins[group]]
    assert read == [0, 0, 1, 2], "the group used longest ago makes room"
    read[:] = [0]
    list(reader)
    assert read == list(range(pq.read_metadata(tmp_path / "a.parquet").num_row_groups)), "in order, each group is read once"


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(0, 50), st.integers(0, 5))
def test_row_groups_keep_both_limits_and_are_never_smaller_than_need_be(tokens, most_tokens, most_packs):
    groups = row_groups(np.array(tokens, np.int64), most_tokens, most_packs)
    assert [b for g in groups for b in g] == list(range(len(tokens)))

    def allowed(packs):
        return len(packs) == 1 or ((not most_tokens or sum(tokens[b] for b in packs) <= most_tokens) and (not most_packs or len(packs) <= most_packs))

    assert all(len(g) and allowed(g) for g in groups)
    assert not any(allowed(range(g.start, g.stop + 1)) for g in groups[:-1])


def test_the_file_has_the_row_groups_that_were_asked_for(tmp_path):
    s = random_store(200)
    packing = pack(s.lengths, 500)
    write_shard(tmp_path / "a.parquet", s, packing, row_group_tokens=3000)
    footer = pq.read_metadata(tmp_path / "a.parquet")
    rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    assert rows == [len(g) for g in row_groups(packing.tokens(s.lengths), 3000)] and len(rows) > 3


@pytest.mark.parametrize("options", [{}, {"provenance": False}, {"compression": "none"}, REFERENCE_LAYOUT])
def test_the_same_bytes_twice_and_nothing_left_behind(tmp_path, options):
    s = random_store(100)
    for name in ("a.parquet", "b.parquet"):
        write_shard(tmp_path / name, s, pack(s.lengths, 500), **options)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_the_reference_layout_is_what_pyarrow_writes_from_lists(tmp_path):
    """Three columns, a thousand packs a row group, all other settings Arrow's own: the bytes of the published writer."""
    s = random_store(1300, most=40)
    packing = pack(s.lengths, 40, "concatenative")
    assert len(packing) > 1000
    write_shard(tmp_path / "ours.parquet", s, packing, **REFERENCE_LAYOUT)
    packs = packs_by_hand(s, fitted(s.lengths, 40), packing, 1)
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8())), ("seq_start_id", pa.list_(pa.int32()))])
    with pq.ParquetWriter(tmp_path / "theirs.parquet", schema, compression="zstd") as writer:
        for part in (packs[:1000], packs[1000:]):
            writer.write_table(pa.table([pa.array([getattr(p, name) for p in part], kind) for name, kind in zip(schema.names, schema.types)], schema))
    assert (tmp_path / "ours.parquet").read_bytes() == (tmp_path / "theirs.parquet").read_bytes()
    assert read_packs(tmp_path / "ours.parquet")[0].conversation_ids == ()


def test_lengths_are_a_short_form_of_spans(tmp_path):
    s = random_store(50)
    spans = fitted(s.lengths, 64, "cut")
    packing = pack(spans.lengths, 64)
    write_shard(tmp_path / "a.parquet", s, packing, spans=spans)
    write_shard(tmp_path / "b.parquet", s, packing, lengths=spans.lengths)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    s = random_store(50)
    packing, path = pack(s.lengths, 500), tmp_path / "a.parquet"
    write_shard(path, s, packing)
    before = path.read_bytes()
    with pytest.raises(UserError, match="close_id"):
        write_shard(path, s, pack(fitted(s.lengths, 20).lengths, 20), spans=fitted(s.lengths, 20))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"a\.parquet: cannot be written: No space left"):
        write_shard(path, s, packing)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_bad_settings():
    s = random_store(3)
    with pytest.raises(UserError, match="did you mean 'zstd'"):
        write_shard("x.parquet", s, pack(s.lengths, 500), compression="zst")
    with pytest.raises(UserError, match="no packs here"):
        PackReader("no such folder")


IDS, MASK, STARTS = [[5, 6], [7, 8, 9]], [[1, 0], [0, 1, 0]], [[0], [0, 2]]
INT, BYTE = pa.list_(pa.int32()), pa.list_(pa.uint8())


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"loss_mask": pa.array([[1, 0], [0, 1]], BYTE)}, "pack 1: loss_mask is not as long"),
        ({"loss_mask": pa.array([[1, 0, 0], [0, 1]], BYTE)}, "pack 0: loss_mask is not as long"),
        ({"loss_mask": pa.array([[1, 0], [0, 2, 0]], BYTE)}, "pack 1: loss_mask holds something else"),
        ({"loss_mask": pa.array([[1, 0], [0, -1, 0]], pa.list_(pa.int8()))}, "damaged, or not a file of packs"),
        ({"loss_mask": pa.array([[1.0, 0], [0, 1, 0]])}, "loss_mask is list<element: double>"),
        ({"loss_mask": None}, "column loss_mask is missing"),
        ({"input_ids": pa.array([[5, 6], [7, -8, 9]], INT)}, "pack 1: a token is negative"),
        ({"input_ids": pa.array([[5, 6], [7, 1 << 40, 9]], pa.list_(pa.int64()))}, "1099511627776"),
        ({"input_ids": pa.array([[5, 6], [7, None, 9]], INT)}, "empty places"),
        ({"input_ids": pa.array([[5, 6], None], INT)}, "empty places"),
        ({"input_ids": pa.array([5, 6], pa.int32())}, "input_ids is int32"),
        ({"seq_start_id": pa.array([[0], [0, 0]], INT)}, "pack 1: seq_start_id does not increase"),
        ({"seq_start_id": pa.array([[0], [0, 3]], INT)}, "pack 1: a sequence begins behind"),
        ({"seq_start_id": pa.array([[1], [0, 2]], INT)}, "pack 0: seq_start_id does not begin with 0"),
        ({"seq_start_id": pa.array([[0], []], INT)}, "pack 1: it holds no tokens or no sequences"),
        ({"conversation_ids": pa.array([["a"], ["b"]]), "sources": pa.array([["a"], ["b", "c"]])}, "do not name each sequence"),
    ],
)
def test_a_wrong_shard_is_refused_by_file_and_pack(tmp_path, columns, says):
    good = {"input_ids": pa.array(IDS, INT), "loss_mask": pa.array(MASK, BYTE), "seq_start_id": pa.array(STARTS, INT)}
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table(good), tmp_path / "a.parquet")
    assert [p.input_ids.tolist() for p in read_packs(tmp_path)] == IDS
    pq.write_table(pa.table({k: v for k, v in (good | columns).items() if v is not None}), path, row_group_size=1)
    with pytest.raises(UserError) as error:
        read_packs(tmp_path)
    assert says in str(error.value) and "bad.parquet" in str(error.value)


def test_other_whole_numbers_are_read(tmp_path):
    """Megatron-Bridge writes masks as int8, other writers everything as int64."""
    wide = {"input_ids": pa.array(IDS), "loss_mask": pa.array(MASK, pa.list_(pa.int8())), "seq_start_id": pa.array(STARTS)}
    pq.write_table(pa.table(wide), tmp_path / "a.parquet")
    p = read_packs(tmp_path)[1]
    assert (p.input_ids.dtype, p.loss_mask.dtype, p.seq_start_id.dtype) == (np.int32, np.uint8, np.int32) and p.loss_mask.tolist() == MASK[1]


def test_every_cut_and_every_flipped_byte_of_the_columns_is_noticed(tmp_path):
    s = random_store(60)
    good, path = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    write_shard(good, s, pack(s.lengths, 500))
    data, expected = good.read_bytes(), plain(read_packs(good))
    for end in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"bad\.parquet"):
            read_packs(path)
    missed = 0
    for at in np.random.default_rng(0).integers(0, len(data) * 9 // 10, 60):  # the tenth at the end is the footer
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        try:
            missed += plain(read_packs(path)) != expected
        except UserError as error:
            assert "bad.parquet" in str(error)
    assert missed == 0


def test_npy_round_trip_in_the_form_megatron_bridge_reads(tmp_path):
    s = random_store(80)
    write_shard(tmp_path / "a.parquet", s, pack(s.lengths, 500))
    packs = read_packs(tmp_path)
    paths = write_npy(tmp_path / "npy", {"train": packs, "valid": packs[:2], "test": []}, 500)
    assert [p.name for p in paths] == ["training.npy", "validation.npy", "test.npy", "500_metadata.jsonl"]
    bare = [p[:3] for p in plain(packs)]
    assert [p[:3] for p in plain(read_npy(paths[0]))] == bare and len(read_npy(paths[1])) == 2 and read_npy(paths[2]) == []
    rows = np.load(paths[0], allow_pickle=True)
    assert rows.dtype == object and [(r["input_ids"], r["loss_mask"], r["seq_start_id"]) for r in rows] == bare
    assert type(rows[0]["seq_start_id"]) is list, "the reader adds the last end with +"
    figures = __import__("json").loads(paths[3].read_text())
    assert [f["max_samples_per_bin"] for f in figures] == [max(len(p.spans) for p in part) for part in (packs, packs[:2])]
    assert figures[0]["min_packed_seqlen"] == min(map(len, packs)) and figures[0]["dataset_max_seqlen"] == s.lengths.max()
    again = write_npy(tmp_path / "again", {"train": packs}, 500)
    assert again[0].read_bytes() == paths[0].read_bytes()


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, ">i4", bool])
def test_npy_with_arrays_and_numpy_numbers_inside(tmp_path, kind):
    rows = np.empty(1, object)
    rows[0] = {"input_ids": np.array([5, 6, 7], np.int64), "loss_mask": np.array([0, 1, 0], kind), "seq_start_id": [np.int64(0), np.int32(2)]}
    np.save(tmp_path / "a.npy", rows, allow_pickle=True)
    assert [p[:3] for p in plain(read_npy(tmp_path / "a.npy"))] == [([5, 6, 7], [0, 1, 0], [0, 2])]


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def rows_of(*items):
    rows = np.empty(len(items), object)
    rows[:] = items
    return rows


GOOD_ROW = {"input_ids": [1, 2], "loss_mask": [1, 0], "seq_start_id": [0]}


def test_a_hostile_npy_runs_nothing(tmp_path):
    trap, path = tmp_path / "it ran", tmp_path / "bad.npy"
    for rows in (rows_of(Runs(str(trap))), rows_of(GOOD_ROW, GOOD_ROW | {"loss_mask": [Runs(str(trap))]})):
        np.save(path, rows, allow_pickle=True)
        with pytest.raises(UserError, match="asks to run"):
            read_npy(path)
        assert not trap.exists()
    np.load(path, allow_pickle=True)
    assert trap.exists(), "the trap works where pickles are trusted"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (rows_of(GOOD_ROW | {"loss_mask": [1]}), "pack 0: loss_mask is not as long"),
        (rows_of(GOOD_ROW, GOOD_ROW | {"seq_start_id": [0, 0]}), "pack 1: seq_start_id does not increase"),
        (rows_of(GOOD_ROW | {"loss_mask": [0.5, 0]}), "whole numbers"),
        (rows_of(GOOD_ROW | {"loss_mask": np.array([0.5, 0])}), "where whole numbers belong"),
        (rows_of(GOOD_ROW | {"input_ids": [1, 1 << 40]}), "bad.npy"),
        (rows_of({"input_ids": [1]}), "loss_mask"),
        (rows_of(GOOD_ROW, 7), "bad.npy"),
        (np.arange(4), "it holds int64, not packs"),
        (b"not numpy at all", "bad.npy"),
        (b"", "bad.npy"),
    ],
)
def test_npy_files_of_other_things(tmp_path, content, says):
    path = tmp_path / "bad.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError) as error:
        read_npy(path)
    assert says in str(error.value) and "bad.npy" in str(error.value)


def test_alignment_for_context_parallel_ranks_reaches_the_file(tmp_path):
    """What a trainer with 2 context-parallel and 4 tensor-parallel ranks needs: each sequence's positions a multiple of 8."""
    s, multiple = random_store(60), alignment(context_parallel=2, tensor_parallel=4, sequence_parallel=True)
    stored = aligned(s.lengths, multiple)
    write_shard(tmp_path / "a.parquet", s, pack(stored, 512), pad_to_multiple=multiple, pad_id=PAD)
    packs = read_packs(tmp_path)
    assert {(b - a - 1) % 8 for p in packs for a, b in p.spans} == {0} and max(map(len, packs)) <= 512
    assert sum(map(len, packs)) == stored.sum() and len(Packing.from_bins([])) == 0


# Data that is prepared anew under a reader


def two_preparations(folder, monkeypatch):
    """A split with a manifest above it, a reader that has read its first group, and a function that replaces both."""
    def put(key, tokens):
        packs = [np.array(tokens, np.int32)] * 3
        sequences = Sequences(np.concatenate(packs), np.ones(3 * len(tokens), np.uint8), np.arange(4) * len(tokens), np.zeros(3, np.int32), ["a"], ["s"])
        write_shard(folder / "splits" / "train" / "shard_000000.parquet", sequences, pack(sequences.lengths, len(tokens), "first_fit_decreasing"), row_group_tokens=1)
        (folder / "manifest.json").write_text(json.dumps({"key": key}))

    put("one", [5, 6, 7])
    reader = PackReader(folder / "splits" / "train", keep=1)
    assert reader[0].input_ids.tolist() == [5, 6, 7]
    monkeypatch.setattr(shards, "_PATIENCE", 0.3)
    return reader, put


def test_the_same_data_prepared_again_is_read_on(tmp_path, monkeypatch):
    reader, put = two_preparations(tmp_path, monkeypatch)
    put("one", [5, 6, 7])
    assert reader[1].input_ids.tolist() == reader[2].input_ids.tolist() == [5, 6, 7]


@pytest.mark.parametrize("tokens", [[5, 6, 8], [5, 6, 7, 8]], ids=["same size", "other size"])
def test_other_data_under_a_reader_is_called_that(tmp_path, monkeypatch, tokens):
    reader, put = two_preparations(tmp_path, monkeypatch)
    put("two", tokens)
    with pytest.raises(UserError, match="replaced by others") as error:
        reader[1]
    assert "damaged" not in str(error.value) and "--force" in str(error.value)
    (tmp_path / "splits" / "train" / "shard_000000.parquet").unlink()
    with pytest.raises(UserError, match="was removed"):
        reader[2]


def test_a_token_outside_the_vocabulary(tmp_path, monkeypatch):
    two_preparations(tmp_path, monkeypatch)
    assert len(list(PackReader(tmp_path / "splits" / "train", vocab_size=8))) == 3
    with pytest.raises(UserError, match="pack 0: a token id is not below 7, the size of the vocabulary"):
        PackReader(tmp_path / "splits" / "train", vocab_size=7)[0]
