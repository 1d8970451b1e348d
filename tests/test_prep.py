"""Preparation: exact books, stable splits, the same bytes twice, and one clear error for each bad input."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotron_nb.core import UserError, temporary_name
from nemotron_nb.data.mask import training_sequences
from nemotron_nb.data.pack import Spans, close_turn, roll_mask
from nemotron_nb.data import prep
from nemotron_nb.data.manifest import Manifest
from nemotron_nb.data.prep import SPLITS, Corpus, PrepConfig, TokenizerSection, _trained_in, assign_splits, prepare
from nemotron_nb.data.records import read_chats
from nemotron_nb.data.sample import sample_path
from nemotron_nb.data.shards import read_npy, read_packs
from nemotron_nb.data.tokenizer import load_tokenizer

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, indeed"}
GOOD = {"messages": [U, A]}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def chats(n):
    return [{"messages": [{"role": "user", "content": f"question {i}"}, A]} for i in range(n)]


def files_of(folder):
    """Every file of a preparation and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


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

    assert files_of(config.output_dir) == files_of(again.output_dir)


def test_found_again_and_refused_with_other_settings(sample, monkeypatch):
    config, manifest = sample
    monkeypatch.setattr(prep, "_build", lambda *a: pytest.fail("prepared twice"))
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
    assert not {p.name for p in (tmp_path / "out").iterdir()} - {"runs", ".lock"}


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    config = PrepConfig(path=write(tmp_path / "chats.jsonl", *chats(5)), output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as broken:
        broken.setattr(prep, "write_json", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="the disk is full"):
            prepare(config)
    assert not (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "out" / "splits").exists()
    assert prepare(config)["rows"] == 5 and not list((tmp_path / "out").glob(".*.tmp"))


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


def test_rows_that_are_all_refused_are_named_although_losing_them_was_allowed(tmp_path):
    source = write(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "x"}]}, {"chat": 1})
    with pytest.raises(UserError, match=r"(?s)no sequence is left.*chats.jsonl:1: .*chats.jsonl:2: .*left out: \{'.*repair those rows"):
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), max_bad_fraction=1.0))


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


SMALL = {"pack_size": 512, "train_ratio": 0.8, "valid_ratio": 0.1, "test_ratio": 0.1}


@pytest.fixture
def small_units(monkeypatch):
    """Units of a few kilobytes, so that the sample has many."""
    prep._units.cache_clear()
    monkeypatch.setattr(prep, "UNIT_BYTES", 20_000)
    yield
    prep._units.cache_clear()


def test_the_number_of_workers_changes_no_byte(tmp_path, small_units):
    trees = []
    for workers in (1, 2, 7):
        config = PrepConfig(output_dir=str(tmp_path / str(workers)), workers=workers, num_shards=3, **SMALL)
        assert len(prep.make_plan(config).sources[0].units) > 7
        prepare(config)
        trees.append(files_of(config.output_dir))
    assert trees[0] == trees[1] == trees[2] and sum(name.startswith("splits/train/") for name in trees[0]) == 3


KILLED = """
import sys
from nemotron_nb.data import prep
prep.UNIT_BYTES = 20_000
prep.prepare(prep.PrepConfig(output_dir=sys.argv[1], workers=2, num_shards=2, pack_size=512, train_ratio=0.8, valid_ratio=0.1, test_ratio=0.1))
"""


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(tmp_path):
    def start(folder):
        return subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], start_new_session=True)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - begun
    rng = random.Random(0)
    for moment in range(6):
        job = start(tmp_path / "killed")
        time.sleep(seconds * (0.3 + 0.7 * rng.random()))
        os.killpg(job.pid, signal.SIGKILL) if moment % 2 else job.kill()
        job.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "killed")


def test_another_pack_size_tokenizes_nothing_again(tmp_path, monkeypatch):
    config = PrepConfig(output_dir=str(tmp_path / "out"), **SMALL)
    prepare(config)
    monkeypatch.setattr("nemotron_nb.data.tokenized.encode_drafts", lambda *a, **k: pytest.fail("tokenized twice"))
    larger = prepare(PrepConfig(output_dir=str(tmp_path / "out"), **SMALL | {"pack_size": 1024}), force=True)
    assert larger["pack_size"] == 1024 and larger.tokenized.endswith("found")


def test_an_edited_template_is_never_stale(tmp_path):
    template = tmp_path / "mine.jinja"
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    source = write(tmp_path / "chats.jsonl", *chats(20))
    found = []
    for version in (text, text.replace("}}<|im_end|>", "}} <|im_end|>")):
        template.write_text(version)
        config = PrepConfig(path=source, output_dir=str(tmp_path / "out"), chat_template=str(template))
        found.append(prepare(config, force=True)["tokens"])
    assert found[1] > found[0]


def test_the_four_ways_of_a_long_sequence(tmp_path):
    source = write(tmp_path / "chats.jsonl", *chats(20), {"messages": [U, {"role": "assistant", "content": "one two three " * 200}]})
    end = load_tokenizer("tiny").im_end_id
    made = {}
    for overflow in ("truncate", "cut", "split", "drop"):
        config = PrepConfig(path=source, output_dir=str(tmp_path / overflow), cache_dir=str(tmp_path / "runs"), overflow=overflow, pack_size=128, train_ratio=1.0, valid_ratio=0.0, test_ratio=0.0)
        made[overflow] = prepare(config), [p.input_ids[a:b] for p in read_packs(tmp_path / overflow / "splits" / "train") for a, b in p.spans]
    whole = made["split"][0]["trained_tokens"]
    assert made["split"][0]["truncated_tokens"] == 0 and made["truncate"][0]["truncated_tokens"] == made["cut"][0]["truncated_tokens"] > 0
    assert made["drop"][0]["dropped_sequences"] == {"too_long": 1} and made["cut"][0]["trained_tokens"] < whole
    longest = {name: max(parts, key=len) for name, (_, parts) in made.items()}
    assert longest["truncate"][-1] == end and longest["cut"][-1] != end and len(longest["truncate"]) == len(longest["cut"]) == 128


def test_a_weighted_blend_is_exact_in_tokens_and_measures_each_chat_once(tmp_path):
    write(tmp_path / "short.jsonl", *chats(400))
    write(tmp_path / "long.jsonl", *({"messages": [{"role": "user", "content": f"tell me {i}"}, {"role": "assistant", "content": "word " * (50 + i)}]} for i in range(60)))
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"datasets": [{"name": "short", "path": str(tmp_path / "short.jsonl"), "weight": 3}, {"name": "long", "path": str(tmp_path / "long.jsonl")}]}))
    manifest = prepare(PrepConfig(blend_path=str(blend), output_dir=str(tmp_path / "out"), **SMALL))
    met = {name: b["tokens_met"] for name, b in manifest["blend"].items()}
    assert abs(met["short"] / sum(met.values()) - 0.75) < 0.005 and manifest["blend"]["short"]["epochs"] > 1
    lengths = Counter()
    for p in read_packs(tmp_path / "out" / "splits" / "train"):
        for source, (a, b) in zip(p.sources, p.spans):
            lengths[source] += b - a
    assert dict(lengths) == met
    held = [c for p in read_packs(tmp_path / "out" / "splits" / "valid") for c in p.conversation_ids]
    assert len(held) == len(set(held))


def test_splits_given_one_by_one_are_kept_apart(tmp_path):
    for name, rows in (("a", chats(30)), ("b", chats(40)[30:])):
        write(tmp_path / f"{name}.jsonl", *rows)
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"train": [{"name": "a", "path": str(tmp_path / "a.jsonl")}], "valid": [{"name": "b", "path": str(tmp_path / "b.jsonl")}]}))
    manifest = prepare(PrepConfig(blend_path=str(blend), output_dir=str(tmp_path / "out")))
    assert {name: s["conversations"] for name, s in manifest["splits"].items()} == {"train": 30, "valid": 10, "test": 0}


def test_rows_in_other_forms(tmp_path):
    write(tmp_path / "alpaca.jsonl", *({"instruction": f"add {i} and 1", "input": "", "output": str(i + 1)} for i in range(20)))
    write(tmp_path / "pairs.jsonl", *({"question": f"{i}?", "answer": "yes"} for i in range(20)))
    entries = [{"name": "alpaca", "path": str(tmp_path / "alpaca.jsonl"), "format": "alpaca"}, {"name": "pairs", "path": str(tmp_path / "pairs.jsonl"), "format": "ResponseDataset", "options": {"input_key": "question", "output_key": "answer"}}]
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"datasets": entries}))
    assert prepare(PrepConfig(blend_path=str(blend), output_dir=str(tmp_path / "out")))["accepted"] == 40
    entries[1]["options"] = {"input_kye": "question"}
    blend.write_text(json.dumps({"datasets": entries}))
    with pytest.raises(UserError, match="did you mean 'input_key'"):
        prepare(PrepConfig(blend_path=str(blend), output_dir=str(tmp_path / "out2")))


def test_npy_holds_the_same_packs(tmp_path):
    parquet = prepare(PrepConfig(output_dir=str(tmp_path / "parquet"), **SMALL))
    prepare(PrepConfig(output_dir=str(tmp_path / "npy"), cache_dir=str(tmp_path / "parquet" / "runs"), format="npy", **SMALL))
    for split, name in (("train", "training"), ("valid", "validation"), ("test", "test")):
        ours, theirs = read_packs(tmp_path / "parquet" / "splits" / split), read_npy(tmp_path / "npy" / f"{name}.npy")
        assert len(ours) == len(theirs) == parquet["splits"][split]["packs"]
        assert all(np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.loss_mask, b.loss_mask) and np.array_equal(a.seq_start_id, b.seq_start_id) for a, b in zip(ours, theirs))
    assert json.loads((tmp_path / "npy" / "metadata.json").read_text())["training_path"] == "training.npy"


def test_padding_for_context_parallelism(tmp_path):
    prepare(PrepConfig(output_dir=str(tmp_path / "out"), pad_to_multiple=8, **SMALL))
    packs = read_packs(tmp_path / "out" / "splits" / "train")
    assert all((b - a - 1) % 8 == 0 for p in packs for a, b in p.spans) and all(len(p) <= 512 for p in packs)


def test_rows_without_the_mark_are_left_out_and_counted(tmp_path):
    rows = [c | ({"used_in": ["nano_v3"]} if i % 2 else {"used_in": "super_v3, other"}) for i, c in enumerate(chats(40))]
    manifest = prepare(PrepConfig(path=write(tmp_path / "chats.jsonl", *rows), output_dir=str(tmp_path / "out"), used_in_filter="nano_v3"))
    assert manifest["accepted"] == 20 and manifest["left_out"] == {"not_used_in": 20} and not manifest["rejects"]


def test_the_first_bad_row_ends_a_strict_preparation(tmp_path):
    source = write(tmp_path / "chats.jsonl", *chats(30), "{")
    with pytest.raises(UserError, match="chats.jsonl:31: not_json"):
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), max_bad_fraction=1.0, on_bad="fail"))


def test_bos_is_untrained_and_first(tmp_path):
    prepare(PrepConfig(output_dir=str(tmp_path / "out"), tokenizer=TokenizerSection("tiny", add_bos=True), **SMALL))
    tokenizer = load_tokenizer("tiny")
    for p in read_packs(tmp_path / "out" / "splits" / "train"):
        assert all(p.input_ids[a] == tokenizer.special_ids["<s>"] for a, _ in p.spans)


def test_one_preparation_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", f"import fcntl,sys,time; f=open({str(tmp_path / 'out' / '.lock')!r},'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another preparation is writing here"):
            prepare(PrepConfig(output_dir=str(tmp_path / "out")))
    finally:
        holder.kill()
        holder.wait()


def test_a_folder_with_other_files_is_not_ours(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="thesis.tex"):
        prepare(PrepConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_path_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        prepare(PrepConfig(output_dir=str(tmp_path / "file" / "out")))


def test_as_nvidia_prepares(tmp_path):
    """Row by row dealing, one packing a shard, whole shards to splits, nothing dropped for having no trained token, three columns."""
    from nemotron_nb.data.nvidia_prep import reference_drafts, shard_plan
    from nemotron_nb.data.mask import encode_drafts
    from nemotron_nb.data.pack import pack

    rows = [*chats(40), {"messages": [U, {"role": "assistant", "content": "<think>x</think>lost"}]}, {"messages": [{"role": "assistant", "content": "Welcome"}, U, A]}]
    source = write(tmp_path / "chats.jsonl", *rows)
    manifest = prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), compat="nvidia", num_shards=4, train_ratio=0.5, valid_ratio=0.25, test_ratio=0.25, pack_size=64))
    tokenizer = load_tokenizer("tiny")
    expected = Counter()
    for ((_, modulus, rest),) in shard_plan([(source, os.path.getsize(source))], 4):
        drafts = [d for i, r in enumerate(rows) if i % modulus == rest for d in (lambda x: [] if isinstance(x, str) else x)(reference_drafts(r))]
        e = encode_drafts(drafts, tokenizer)
        for b in pack(np.minimum(np.diff(e.offsets), 64), 64, "first_fit_shuffle", 42):
            expected[b"|".join(e.input_ids[e.offsets[i] : e.offsets[i + 1]][:64].tobytes() for i in b)] += 1
    got = Counter()
    for split in SPLITS:
        for p in read_packs(tmp_path / "out" / "splits" / split):
            got[b"|".join(p.input_ids[a:b].tobytes() for a, b in p.spans)] += 1
    assert got == expected and sum(manifest["left_out"].values()) == 1
    assert [len(list((tmp_path / "out" / "splits" / s).glob("*"))) for s in SPLITS] == [2, 1, 1]


@pytest.mark.long
def test_ray_gives_the_same_bytes(tmp_path, small_units):
    pytest.importorskip("ray")
    config = {"num_shards": 2, **SMALL}
    prepare(PrepConfig(output_dir=str(tmp_path / "local"), workers=2, **config))
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        prepare(PrepConfig(output_dir=str(tmp_path / "ray"), executor="ray", **config))
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")


@pytest.mark.parametrize(
    ("template", "text", "trained"),
    [
        (None, "Be kind. Hi! Hello. ", ["Hello. "]),
        ("{% for message in messages %}{%- if message['role'] == 'system' %}{{'Context: ' + message['content'].strip()}}{%- elif message['role'] == 'user' %}{{' Question: ' + message['content'].strip() + ' Answer: '}}{%- elif message['role'] == 'assistant' %}{{message['content'].strip()}}{%- endif %}{% endfor %}", "Context: Be kind. Question: Hi! Answer: Hello.", ["Hello."]),
    ],
)
def test_the_template_modes_of_nemo_rl(tmp_path, template, text, trained):
    """null joins the contents; a custom string is the page's own example; "default" is the tokenizer's, which here has none."""
    rows = [{"messages": [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "Hi! "}, {"role": "assistant", "content": "Hello. "}]}]
    source = write(tmp_path / "chats.jsonl", *rows)
    prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out"), chat_template=template, train_ratio=1.0, valid_ratio=0.0, test_ratio=0.0))
    (packed,) = read_packs(tmp_path / "out" / "splits" / "train")
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.decode(packed.input_ids) == text
    assert tokenizer.decode(packed.input_ids[1:][packed.loss_mask[:-1] == 1]) == "".join(trained)
    with pytest.raises(UserError):
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "none"), chat_template="default"))


def test_an_edited_list_of_the_filters_is_never_stale(tmp_path):
    """The words of a narrative list decide which chats are kept, so they are part of the name of the result."""
    words = tmp_path / "words.toml"
    source = write(tmp_path / "chats.jsonl", *chats(20))
    shipped = (Path(prep.__file__).parent / "assets" / "filters" / "narrative.toml").read_text()
    keys = []
    for text in (shipped, shipped + "\n# a comment, and yet another file\n"):
        words.write_text(text)
        config = PrepConfig(path=source, output_dir=str(tmp_path / "out"), filter_chats=True, filters=prep.FilterPolicy(narrative_lists=(str(words),)))
        keys.append(prepare(config, force=True)["key"])
    assert keys[0] != keys[1]
    with pytest.raises(UserError, match="other settings"):
        prepare(PrepConfig(path=source, output_dir=str(tmp_path / "out")))


# ---- several preparations at once, small limits, odd paths

FORK = multiprocessing.get_context("fork")


def prepare_at(start, config, results, force=False):
    """Prepare when everybody is ready; put the outcome into a file."""
    start.wait()
    try:
        results.put((config.output_dir, prepare(config, force=force)["key"]))
    except Exception as error:
        results.put((config.output_dir, f"{type(error).__name__}: {error}"))


def at_once(configs, force=()):
    """What becomes of several preparations that begin at the same moment, in processes of their own."""
    start, results = FORK.Barrier(len(configs)), FORK.Queue()
    jobs = [FORK.Process(target=prepare_at, args=(start, c, results, i in force)) for i, c in enumerate(configs)]
    for job in jobs:
        job.start()
    said = [results.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join(60)
    return said


def test_six_at_once_share_a_cache_and_a_folder(tmp_path, small_units):
    """Three ask for the same in one folder (one of them by force), three for other pack sizes; all of them share the cache."""
    source = write(tmp_path / "chats.jsonl", *chats(300))
    config = lambda name, size: PrepConfig(path=source, output_dir=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), pack_size=size, workers=1)
    configs = [config("same", 256)] * 3 + [config(f"other{size}", size) for size in (128, 192, 320)]
    said = at_once(configs, force=(2,))
    assert [text for _, text in said if not re.fullmatch("[0-9a-f]{16}", text)] == []
    assert len({key for folder, key in said if folder == str(tmp_path / "same")}) == 1
    alone = PrepConfig(path=source, output_dir=str(tmp_path / "alone"), pack_size=256, workers=1)
    prepare(alone)
    packs = lambda folder: {name: data for name, data in files_of(folder).items() if name.startswith("splits")}
    assert packs(tmp_path / "same") == packs(tmp_path / "alone")
    assert not [p for p in tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("force", [False, True])
def test_who_waited_takes_what_the_other_has_prepared(tmp_path, monkeypatch, force):
    config = PrepConfig(path=write(tmp_path / "chats.jsonl", *chats(5)), output_dir=str(tmp_path / "out"), workers=1)
    key, alone = prepare(config)["key"], prep._alone
    (tmp_path / "out").rename(tmp_path / "theirs")

    @contextmanager
    def waited(folder, key):
        with alone(folder, key):
            for path in (tmp_path / "theirs").iterdir():
                path.rename(folder / path.name)
            yield True

    monkeypatch.setattr(prep, "_alone", waited)
    monkeypatch.setattr(prep, "_prepare", lambda *_: pytest.fail("it was prepared again"))
    assert prepare(config, force=force)["key"] == key


def test_a_disk_without_locks(tmp_path, small_units, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    source = write(tmp_path / "chats.jsonl", *chats(100))
    said = at_once([PrepConfig(path=source, output_dir=str(tmp_path / f"out{n}"), cache_dir=str(tmp_path / "cache"), workers=1) for n in range(3)])
    assert len({key for _, key in said}) == 1 and said[0][1] == Manifest.load(tmp_path / "out0")["key"]


def test_leftovers_are_swept_where_the_cache_is_and_a_living_owner_keeps_his(tmp_path):
    config = PrepConfig(path=write(tmp_path / "chats.jsonl", *chats(5)), output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), workers=1)
    unit = next(tmp_path.glob("cache/*/datasets/*/*"), None) if prepare(config) else None
    living = temporary_name(unit)
    dead = living.with_name(living.name.replace(f"-{os.getpid()}-", "-999999999-"))
    living.mkdir(), dead.mkdir()
    prepare(PrepConfig(**vars(config) | {"pack_size": 512}), force=True)
    assert living.exists() and not dead.exists()


LIMITED = """
import resource, sys
from nemotron_nb.core import UserError
from nemotron_nb.data import prep
prep.UNIT_BYTES = 1
config = prep.PrepConfig(path=sys.argv[1], output_dir=sys.argv[2], workers=1)
resource.setrlimit(getattr(resource, sys.argv[3]), (int(sys.argv[4]), resource.getrlimit(getattr(resource, sys.argv[3]))[1]))
try:
    print(prep.prepare(config)["rows"])
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "value", "says"), [("RLIMIT_NOFILE", 64, "150"), ("RLIMIT_FSIZE", 20_000, "ulimit -f"), ("RLIMIT_NOFILE", 4, "ulimit -n")])
def test_a_process_with_small_limits(tmp_path, limit, value, says):
    """150 units and 64 open files: open files do not grow with the data. Where a limit is too small, a sentence names it."""
    source = write(tmp_path / "chats.jsonl", *chats(150))
    done = subprocess.run([sys.executable, "-c", LIMITED, source, str(tmp_path / "out"), limit, str(value)], capture_output=True, text=True, timeout=120)
    assert says in done.stdout and "Traceback" not in done.stderr, done.stderr[-2000:]


def test_an_output_folder_that_is_none(tmp_path):
    source = write(tmp_path / "chats.jsonl", *chats(5))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place, says in (("file", "is a file"), ("loop", "a link that leads nowhere"), ("x" * 300, "longer than the file system allows")):
        with pytest.raises(UserError, match=says):
            prepare(PrepConfig(path=source, output_dir=str(tmp_path / place), cache_dir=str(tmp_path / "cache"), workers=1))


def test_a_path_may_be_a_folder_a_glob_or_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "many").mkdir()
    write(tmp_path / "many" / "a.jsonl", *chats(3))
    write(tmp_path / "many" / "[b].jsonl", *chats(7)[3:])
    (tmp_path / "many" / "empty.jsonl").write_text("")
    rows = lambda path: prepare(PrepConfig(path=path, output_dir=str(tmp_path / f"out{len(list(tmp_path.iterdir()))}"), workers=1))
    many = rows("~/many")
    assert many["rows"] == 7 and any("1 files hold no row: empty.jsonl" in w for w in many["warnings"])
    assert rows(f"{tmp_path}/many/?.jsonl")["rows"] == 3
    assert rows("~/many/[b].jsonl")["rows"] == 4
    with pytest.raises(UserError, match="can be read only once"):
        rows("-")


def test_a_folder_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(chats(12)).save_to_disk(str(tmp_path / "hf_ds"))
    (tmp_path / "hf_ds" / "cache-0123456789abcdef.arrow").write_bytes((tmp_path / "hf_ds" / "data-00000-of-00001.arrow").read_bytes())
    manifest = prepare(PrepConfig(path=str(tmp_path / "hf_ds"), output_dir=str(tmp_path / "out"), workers=1))
    assert (manifest["rows"], manifest["accepted"], manifest["rejects"]) == (12, 12, {})


def test_a_table_without_rows_ends_in_words(tmp_path):
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="holds no rows"):
        prepare(PrepConfig(path=str(tmp_path / "none.parquet"), output_dir=str(tmp_path / "out")))


def test_trained_labels_of_parts_are_those_of_each_part_alone():
    """Spans over several units, whole and cut, in an order of their own, against one look a span."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 40, 60)
    units = np.sort(rng.integers(0, 4, 60))
    starts = np.concatenate([np.cumsum(lengths[units == u]) - lengths[units == u] for u in range(4)])
    spools = tuple(
        SimpleNamespace(tokens=rng.integers(0, 12, n), mask=rng.integers(0, 2, n).astype(np.uint8))
        for n in (lengths[units == u].sum() for u in range(4))
    )
    whole = [spools[u].mask[a + 1 : a + n].sum() for u, a, n in zip(units, starts, lengths)]
    zeros = np.zeros(1, int)
    corpus = Corpus(
        spools, spool_S=units, start_S=starts, length_S=lengths, trained_S=np.array(whole), chat_S=np.zeros(60, int),
        chat_ids=("a",), source_C=zeros, line_C=zeros, row_C=zeros, path_C=zeros, paths=("a.jsonl",),
    )
    which = rng.permutation(np.repeat(np.arange(60), 3))
    begin = (rng.random(180) * lengths[which]).astype(int) * rng.integers(0, 2, 180)
    end = np.maximum(begin + 1, lengths[which] - rng.integers(0, 3, 180))
    spans = Spans(which, begin, end, rng.integers(0, 2, 180).astype(bool) & (end < lengths[which]), 60)
    expected = []
    for k in range(180):
        ids, mask = corpus.part(spans, k)
        expected.append((close_turn(ids, mask, 11)[1] if spans.closing[k] else mask)[1:].sum())
    assert _trained_in(corpus, spans, 11).tolist() == expected
