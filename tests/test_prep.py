"""Preparation: exact books, stable splits, the same bytes twice, and one clear error for each bad input."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nemotron_nb.core import UserError
from nemotron_nb.data.mask import training_sequences
from nemotron_nb.data.pack import roll_mask
from nemotron_nb.data.prep import SPLITS, Manifest, PrepConfig, assign_splits, prepare, read_packs
from nemotron_nb.data.records import read_chats
from nemotron_nb.data.sample import sample_path
from nemotron_nb.data.tokenizer import load_tokenizer

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, indeed"}
GOOD = {"messages": [U, A]}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def chats(n):
    return [{"messages": [{"role": "user", "content": f"question {i}"}, A]} for i in range(n)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "data"
    config = PrepConfig(output_dir=str(folder), pack_size=1024, train_ratio=0.9, valid_ratio=0.05, test_ratio=0.05)
    return config, prepare(config)


def test_packs_hold_every_sequence_with_its_mask_on_the_labels(sample):
    config, manifest = sample
    tokenizer = load_tokenizer("tiny")
    expected = Counter()
    for chat in read_chats(sample_path()):
        for s in training_sequences(chat, tokenizer):
            expected[(s.conversation_id, s.input_ids.tobytes(), roll_mask(s.loss_mask).tobytes())] += 1
    got = Counter()
    for split in SPLITS:
        for p in read_packs(f"{config.output_dir}/splits/{split}"):
            assert len(p) <= 1024
            for c, (start, end) in zip(p.conversation_ids, p.spans, strict=True):
                got[(c, p.input_ids[start:end].tobytes(), p.loss_mask[start:end].tobytes())] += 1
    assert got == expected
    assert manifest["trained_tokens"] == sum(int(np.frombuffer(m, np.uint8).sum()) * n for (_, _, m), n in expected.items())


def test_no_conversation_in_two_splits(sample):
    config, _ = sample
    seen = {split: {c for p in read_packs(f"{config.output_dir}/splits/{split}") for c in p.conversation_ids} for split in SPLITS}
    assert not (seen["train"] & seen["valid"] or seen["train"] & seen["test"] or seen["valid"] & seen["test"])
    assert all(seen.values())


def test_the_same_request_twice_gives_the_same_bytes(sample, tmp_path):
    config, _ = sample
    again = PrepConfig(**{**vars(config), "output_dir": str(tmp_path / "again")})
    prepare(again)

    def files(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

    assert files(config.output_dir) == files(again.output_dir)


def test_found_again_and_refused_with_other_settings(sample, monkeypatch):
    config, manifest = sample
    monkeypatch.setattr("nemotron_nb.data.prep._build", lambda *a: pytest.fail("prepared twice"))
    assert prepare(config).values == manifest.values
    with pytest.raises(UserError, match="other settings"):
        prepare(PrepConfig(**{**vars(config), "seed": 7}))


def test_an_edited_source_is_never_stale(tmp_path):
    source = write(tmp_path / "chats.jsonl", *chats(20))
    config = PrepConfig(path=source, output_dir=str(tmp_path / "out"))
    first = prepare(config)
    write(tmp_path / "chats.jsonl", *chats(21))
    with pytest.raises(UserError, match="another source"):
        prepare(config)
    assert prepare(config, force=True)["rows"] == 21 and first["rows"] == 20


def test_output_tree(sample):
    config, manifest = sample
    folder = Path(config.output_dir)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"blend.json", "metadata.json", "manifest.json", "rejects.jsonl", "tokenizer/tokenizer.json", *(f"splits/{s}/shard_000000.parquet" for s in SPLITS)} <= names
    assert json.loads((folder / "blend.json").read_text())["train"] == ["1.0", "splits/train/shard_000000"]
    assert Manifest.load(folder).values == manifest.values and "rows read" in repr(manifest) and "<table" in manifest._repr_html_()


def test_order_of_rows_does_not_move_a_chat_between_splits():
    ids = [f"c{i}" for i in range(500)]
    ratios = {"train": 0.8, "valid": 0.1, "test": 0.1}
    assert assign_splits(ids, ratios, 1) == assign_splits(reversed(ids), ratios, 1)
    assert assign_splits(ids, ratios, 1) != assign_splits(ids, ratios, 2)


def test_rejects_below_the_threshold_are_listed_and_the_run_goes_on(tmp_path):
    source = write(tmp_path / "chats.jsonl", *chats(30), "{", {"messages": [U]})
    manifest = prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), max_bad_fraction=0.1))
    assert manifest["rejects"] == {"not_json": 1, "no_assistant_turn": 1} and manifest["accepted"] == 30 and manifest["rows"] == 32
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in listed] == [(31, "not_json"), (32, "no_assistant_turn")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["{"], "chats.jsonl:1: not_json"),
        ([GOOD, {"text": "x"}], "chats.jsonl:2: no_messages"),
        ([GOOD, {"messages": [{"role": "bot", "content": "x"}]}], "unknown role 'bot'"),
        ([{"messages": [U]}], "no_assistant_turn"),
        (["", "  "], "only blank lines"),
    ],
)
def test_bad_rows_above_the_threshold_end_in_one_error_and_no_output(tmp_path, rows, says):
    source = write(tmp_path / "chats.jsonl", *rows)
    with pytest.raises(UserError) as error:
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out")))
    assert says in str(error.value) and "what to do" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["chats.jsonl"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("nemotron_nb.data.prep.write_json", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare(PrepConfig(path=write(tmp_path / "chats.jsonl", *chats(5)), output_dir=str(tmp_path / "out")))
    assert [p.name for p in tmp_path.iterdir()] == ["chats.jsonl"]


def test_books_balance_when_chats_are_cut(tmp_path, sample):
    _, whole = sample
    cut = prepare(PrepConfig(output_dir=str(tmp_path / "cut"), pack_size=400, train_ratio=0.9, valid_ratio=0.05, test_ratio=0.05))
    dropped = prepare(PrepConfig(output_dir=str(tmp_path / "drop"), pack_size=400, overflow="drop", train_ratio=0.9, valid_ratio=0.05, test_ratio=0.05))
    for m in (cut, dropped):
        assert m["tokens"] + m["truncated_tokens"] + m["dropped_tokens"] == whole["tokens"]
        assert m["warnings"]
    assert cut["truncated_tokens"] > 0 and dropped["truncated_tokens"] == 0 and dropped["dropped_sequences"]["too_long"] > 0


def test_overflow_fail_names_the_line(tmp_path):
    source = write(tmp_path / "chats.jsonl", GOOD, {"messages": [{"role": "user", "content": "x " * 500}, A]})
    with pytest.raises(UserError, match=r"chats.jsonl:2"):
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), pack_size=128, overflow="fail"))


def test_nothing_left_to_train_on(tmp_path):
    source = write(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "x " * 500}, A]})
    with pytest.raises(UserError, match="cut_before_the_answer"):
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), pack_size=128))


@pytest.mark.parametrize(("words", "expected"), [(10, 2048), (4000, 4096)])
def test_pack_size_0_holds_the_longest_sequence(tmp_path, words, expected):
    source = write(tmp_path / "chats.jsonl", GOOD, {"messages": [{"role": "user", "content": "one " * words}, A]})
    manifest = prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), pack_size=0))
    assert manifest["pack_size"] == expected and manifest["truncated_tokens"] == 0


def test_sample_limits_the_rows(tmp_path):
    assert prepare(PrepConfig(output_dir=str(tmp_path / "out"), sample=10))["rows"] == 10


def test_a_duplicated_chat_stays_on_one_side(tmp_path):
    source = write(tmp_path / "chats.jsonl", *chats(10), *chats(10))
    config = PrepConfig(path=source, output_dir=str(tmp_path / "out"), train_ratio=0.6, valid_ratio=0.2, test_ratio=0.2)
    prepare(config)
    where = {}
    for split in SPLITS:
        for p in read_packs(tmp_path / "out" / "splits" / split):
            for c in p.conversation_ids:
                where.setdefault(c, []).append(split)
    assert len(where) == 10 and all(len(v) == 2 and len(set(v)) == 1 for v in where.values())


@pytest.mark.parametrize("settings", [{"pack_size": 1}, {"train_ratio": 0.9}, {"algorithm": "x"}, {"max_bad_fraction": 2.0}, {"valid_ratio": -0.01, "train_ratio": 1.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError):
        PrepConfig(**settings)
