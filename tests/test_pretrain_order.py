"""The order of samples is Megatron-Core's, step by step, and any sample can be read without those before it."""

import json
import logging
import sysconfig
import tracemalloc
import typing
from pathlib import Path

import numpy as np
import pytest
import typing_extensions
from typer.testing import CliRunner

from nemotron_nb.cli import app
from nemotron_nb.core import UserError
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.pretrain.documents import read_megatron_blend
from nemotron_nb.pretrain import order as native
from nemotron_nb.pretrain.indexed import IndexedReader, IndexedWriter
from nemotron_nb.pretrain.order import (
    Mixture,
    SampleOrder,
    blend_sizes,
    count_passes,
    deal_samples,
    draw_blend,
    draw_order,
    normalise,
    order_bytes,
    read_batch,
    read_sample,
    walk_samples,
)

END = 2


class Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad, unique_identifiers = 131_072, END, 0, {"class": "Tokenizer"}


def write(prefix, documents, dtype="int32"):
    with IndexedWriter(prefix, dtype) as writer:
        writer.add(np.concatenate(documents), np.array([len(d) for d in documents]))
    return str(prefix)


def random_documents(seed, count, longest=200):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(3, 60_000, rng.integers(0, longest)), END) for _ in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three datasets of very different sizes."""
    folder = tmp_path_factory.mktemp("files")
    return [write(folder / n, random_documents(k, c)) for k, (n, c) in enumerate((("a", 150), ("b", 60), ("c", 9)))]


@pytest.fixture(scope="module")
def core():
    """Megatron-Core's own classes."""
    if not hasattr(typing, "override"):  # it asks for Python 3.12
        typing.override = typing_extensions.override
    pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset, indexed_dataset, utils

    logging.getLogger("megatron").setLevel(logging.ERROR)
    return {**vars(blended_megatron_dataset_builder), **vars(gpt_dataset), **vars(indexed_dataset), **vars(utils)}


def settings(core, tmp_path, **given):
    reset = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    fixed = {"tokenizer": Tokenizer(), "create_attention_mask": False, "path_to_cache": str(tmp_path / "cache")}
    return core["GPTDatasetConfig"](**reset | fixed | given)


@pytest.mark.parametrize("length", [7, 64, 1000])
@pytest.mark.parametrize("asked", [None, 1, 10, 137, 900])
def test_documents_samples_and_shuffle_are_those_of_gptdataset(tmp_path, core, files, length, asked):
    for prefix in files:
        config = settings(core, tmp_path, random_seed=1234, sequence_length=length, blend=([prefix], None), split="1,0,0")
        reader = IndexedReader(prefix)
        if asked is None and reader.tokens <= length:
            continue
        numbers = np.arange(len(reader), dtype=np.int32)
        theirs = core["GPTDataset"](core["IndexedDataset"](prefix), prefix, numbers, asked, core["Split"].train, config)
        ours = draw_order(reader.lengths, asked, length, 1234)
        assert np.array_equal(ours.documents, theirs.document_index)
        assert np.array_equal(ours.sample_index, theirs.sample_index)
        assert np.array_equal(ours.shuffle, theirs.shuffle_index) and len(ours) == len(theirs)
        for i in {*range(min(20, len(ours))), len(ours) - 1}:
            sample, wanted = read_sample(reader, ours, i), theirs[i]
            assert np.array_equal(sample.tokens, wanted["tokens"].numpy())
            assert np.array_equal(sample.labels, wanted["labels"].numpy())
            assert np.array_equal(sample.positions, wanted["position_ids"].numpy())


def test_boundaries_and_positions_are_those_of_masking_between_documents(tmp_path, core, files):
    fields = core["GPTDatasetConfig"].__dataclass_fields__
    if "inter_document_masking" not in fields:
        pytest.skip("this Megatron-Core does not mask between documents")
    config = settings(
        core, tmp_path, random_seed=5, sequence_length=128, blend=([files[0]], None), split="1,0,0", inter_document_masking=True
    )
    reader, numbers = IndexedReader(files[0]), np.arange(150, dtype=np.int32)
    theirs = core["GPTDataset"](core["IndexedDataset"](files[0]), files[0], numbers, 100, core["Split"].train, config)
    ours = draw_order(reader.lengths, 100, 128, 5)
    for i in range(100):
        sample, wanted = read_sample(reader, ours, i, reset_positions=True), theirs[i]
        ends = wanted["cu_seqlens"].numpy()
        assert sample.boundaries.tolist() == ends[: len(sample.boundaries)].tolist()
        assert (ends[len(sample.boundaries) :] == 128).all()
        assert np.array_equal(sample.positions, wanted["position_ids"].numpy())


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [1, 1, 1], [5, 1, 0.01], [0.333, 0.333, 0.334]])
def test_a_blend_is_read_as_megatrons_builder_reads_it(tmp_path, core, files, weights):
    blend = [(files, [float(w) for w in weights]), ([files[2]], None), None]
    config = settings(core, tmp_path, random_seed=7, sequence_length=64, blend_per_split=blend)
    build = core["BlendedMegatronDatasetBuilder"](core["GPTDataset"], [500, 20, 0], lambda: True, config).build
    theirs, alone, _ = build()
    ours = Mixture(list(zip(weights, files)), 500, 64, 7)
    assert len(ours) == len(theirs)
    assert np.array_equal(ours.blend.dataset, theirs.dataset_index)
    assert np.array_equal(ours.blend.sample, theirs.dataset_sample_index)
    for i in range(0, len(ours), 7):
        assert np.array_equal(ours[i].tokens, theirs[i]["tokens"].numpy())
    single = Mixture([(3.0, files[2])], 20, 64, 7)
    assert len(single) == len(alone) and np.array_equal(single[19].labels, alone[19]["labels"].numpy())


def test_the_documentation_of_this_machine_prepared_by_command_is_read_by_megatron(tmp_path, monkeypatch, core):
    """`nemotron nano3 data prep pretrain` on real text: Megatron's own classes read what it wrote, and say the text again."""
    monkeypatch.chdir(tmp_path)
    found = sorted(path for path in Path(sysconfig.get_paths()["purelib"]).rglob("*") if path.suffix in (".md", ".rst") and path.is_file())
    texts = list(dict.fromkeys(path.read_text(encoding="utf-8", errors="ignore") for path in found[:60]))
    texts = [text for text in texts if text.strip()]
    Path("docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["nano3", "data", "prep", "pretrain", "path=docs.jsonl", "tokenizer=tiny", "num_shards=4", "workers=1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and len(texts) > 20, (done.output, done.exception)
    (folder,) = (path.parent for path in Path("output/nano3/data_prep_pretrain").glob("*/blend.json"))
    tokenizer, said = load_tokenizer("tiny"), []
    for split, shards in read_megatron_blend(folder / "blend.json").items():
        for _, prefix in shards:
            theirs = core["IndexedDataset"](prefix)
            rows = [theirs[i].tolist() for i in range(len(theirs))]
            assert all(row[-1] == tokenizer.special_ids["<|im_end|>"] for row in rows)
            said += [tokenizer.decode(row[:-1]) for row in rows]
    assert sorted(said) == sorted(texts)
    blend = read_megatron_blend(folder / "blend.json")["train"]
    weights, prefixes = ([pair[k] for pair in blend] for k in (0, 1))
    given = [(prefixes, [float(w) for w in weights]), None, None]
    config = settings(core, tmp_path, random_seed=3, sequence_length=128, blend_per_split=given)
    dataset, _, _ = core["BlendedMegatronDatasetBuilder"](core["GPTDataset"], [100, 0, 0], lambda: True, config).build()
    ours = Mixture(blend, 100, 128, 3)
    assert all(np.array_equal(ours[i].tokens, dataset[i]["tokens"].numpy()) for i in range(100))


def test_the_binary_search_finds_what_the_walk_finds():
    rng = np.random.default_rng(0)
    for _ in range(400):
        lengths, length = rng.integers(0, rng.integers(2, 30), rng.integers(1, 25)), int(rng.integers(1, 40))
        count = (int(lengths.sum()) - 1) // length
        if count >= 1:
            numbers = np.arange(len(lengths), dtype=np.int32)
            order = SampleOrder(numbers, np.cumsum(lengths), np.arange(count), 1, length)
            assert np.array_equal(order.sample_index, walk_samples(lengths, length)), (lengths, length)


def test_every_token_is_read_once_in_a_pass(files):
    reader = IndexedReader(files[1])
    order = draw_order(reader.lengths, None, 50, 3)
    row = np.concatenate([reader[d] for d in order.documents])
    read = np.concatenate([read_sample(reader, order, int(i)).tokens for i in np.argsort(order.shuffle)])
    assert np.array_equal(read, row[: len(read)]) and len(row) - len(read) <= 50


def order_by_parts(lengths, asked, sequence_length, seed):
    """`draw_order` in the plain way: each shuffled part an array of its own, then joined."""
    tokens, state = int(lengths.sum()), np.random.RandomState(seed)
    epochs = native.count_epochs(tokens, asked, sequence_length)
    count = (epochs * tokens - 1) // sequence_length
    apart, before = native._needs_own_pass(tokens, asked, sequence_length, epochs)

    def shuffled(values):
        state.shuffle(values)
        return values

    documents = np.concatenate([shuffled(np.tile(np.arange(len(lengths), dtype=np.int32), n)) for n in ((epochs - 1, 1) if apart else (epochs,))])
    borders = (0, before, count) if apart else (0, count)
    shuffle = np.concatenate([shuffled(np.arange(a, b, dtype=np.uint32)) for a, b in zip(borders, borders[1:])])
    return documents, np.cumsum(lengths[documents], dtype=np.int64), shuffle


def test_shuffled_where_they_lie_and_counted_by_pieces_the_arrays_are_the_same(monkeypatch):
    rng, apart = np.random.default_rng(3), set()
    monkeypatch.setattr(native, "_PIECE", 7)
    for seed in range(60):
        lengths = rng.integers(1, 50, rng.integers(1, 60)).astype(np.int32) * (1 << 20 if seed % 5 == 0 else 1)
        length = int(rng.integers(1, max(2, lengths.sum() // 2)))
        asked = None if seed % 3 == 0 else int(rng.integers(1, 4 * max(1, lengths.sum() // length)))
        if asked and asked > 100_000 or lengths.sum() // length > 100_000 or lengths.sum() <= length:
            continue
        order = draw_order(lengths, asked, length, seed)
        for got, wanted in zip((order.documents, order.ends, order.shuffle), order_by_parts(lengths, asked, length, seed)):
            assert np.array_equal(got, wanted) and got.dtype == wanted.dtype
        apart.add(native._needs_own_pass(int(lengths.sum()), asked, length, order.epochs)[0])
    assert apart == {True, False}


def test_drawing_an_order_takes_no_more_memory_than_it_weighs(monkeypatch):
    monkeypatch.setattr(native, "_PIECE", 1 << 14)
    lengths = np.random.default_rng(4).integers(5, 60, 1_500_000).astype(np.int32)
    for asked, epochs in ((None, 1), (2_000_000, 2)):
        tracemalloc.start()
        try:
            order = draw_order(lengths, asked, 32, 7)
            highest = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        weighs = order_bytes(len(lengths), len(order), epochs)
        assert order.epochs == epochs and weighs == sum(a.nbytes for a in (order.documents, order.ends, order.shuffle))
        assert highest < 1.02 * weighs, (highest, weighs)


def test_the_compiled_deal_gives_the_same_integers(monkeypatch):
    pytest.importorskip("numba")
    rng = np.random.default_rng(1)
    monkeypatch.setattr(native, "_COMPILE_FROM", 0)
    for count in (2, 5, 23):
        weights = rng.random(count) + 1e-3
        slow = deal_samples(normalise(normalise(weights)).tolist(), 3000)
        fast = draw_blend(weights, 3000)
        assert np.array_equal(fast.dataset, slow)
        assert all((fast.sample[slow == d] == np.arange((slow == d).sum())).all() for d in range(count))


def test_a_resumed_run_reads_the_next_sample_and_a_batch_is_its_rows(files):
    sources = list(zip((0.5, 0.3, 0.2), files))
    first, again = (Mixture(sources, 200, 32, 11, reset_positions=True) for _ in range(2))
    assert all(np.array_equal(first[i].tokens, again[i].tokens) for i in range(120, 200))
    batch = read_batch(first, [5, 190])
    assert np.array_equal(batch.positions[1], again[190].positions) and batch.tokens.shape == (2, 32)
    assert count_passes(first, 0, 100).sum() > 0
    halves = count_passes(first, 0, 90) + count_passes(first, 90)
    assert halves == pytest.approx(count_passes(first))
    other = Mixture(sources, 200, 32, 12)
    assert any(not np.array_equal(first[i].tokens, other[i].tokens) for i in range(5))


def test_what_gives_no_order_is_refused(files, tmp_path):
    lengths = np.array([5], np.int32)
    for call, said in [
        (lambda: draw_order(lengths, None, 5, 0), "has 5 tokens, and one sample needs 6"),
        (lambda: draw_order(np.zeros(0, np.int32), 3, 5, 0), "has 0 tokens"),
        (lambda: draw_order(lengths, 0, 5, 0), "0 samples"),
        (lambda: draw_order(lengths, 5, 0, 0), "samples of 0 tokens"),
        (lambda: draw_blend([], 5), "there is no dataset"),
        (lambda: draw_blend([1, float("nan")], 5), "weight nan of dataset 1"),
        (lambda: draw_blend([1, 0], 5), "weight 0 of dataset 1"),
        (lambda: Mixture([(1, files[0])], 9, 16, 0, vocab_size=100), "holds the token id"),
        (lambda: Mixture([(1, tmp_path / "none")], 9, 16, 0), "cannot be read"),
    ]:
        with pytest.raises(UserError, match=said):
            call()
    with pytest.raises(IndexError, match="sample 99999"):
        Mixture([(1, files[0])], 9, 16, 0)[99_999]


def test_sizes_of_a_blend_as_megatron_counts_them():
    sizes, size = blend_sizes([0.7, 0.2, 0.1], 3000)
    assert sizes == [2111, 605, 303] and size == 3002
