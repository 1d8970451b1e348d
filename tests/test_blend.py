"""Blends: files are found as the hub names them, weights are exact in tokens, and every mistake is said with the entry."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data.blend import Dataset, draw, files_of_split, load_blend, resolve, single

ROOT = Path(__file__).parents[1]


@given(
    sizes=st.dictionaries(st.sampled_from("abcde"), st.lists(st.integers(1, 5000), min_size=1, max_size=60), min_size=2),
    shares=st.lists(st.integers(1, 50), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_the_error_of_a_draw_is_at_most_half_of_the_longest_chat(sizes, shares, seed):
    lengths = {name: np.array(n) for name, n in sizes.items()}
    weights = {name: float(w) for name, w in zip(sizes, shares)}
    total = sum(n.sum() for n in lengths.values())
    drawn = draw(lengths, weights, seed)
    if len(set(weights.values())) == 1:
        assert all(np.array_equal(d.chats, np.arange(len(lengths[n]))) for n, d in drawn.items())
        return
    for name, d in drawn.items():
        wanted = total * weights[name] / sum(weights.values())
        assert d.tokens == lengths[name][d.chats].sum() and abs(d.tokens - wanted) <= lengths[name].max() / 2
        times = np.bincount(d.chats, minlength=len(lengths[name]))
        assert times.max() - times.min() <= 1 and abs(d.epochs - d.tokens / lengths[name].sum()) < 1e-9


def test_a_draw_does_not_depend_on_the_other_datasets_but_through_its_share():
    lengths = {"a": np.arange(1, 200), "b": np.full(50, 400)}
    alone = draw(lengths, {"a": 1.0, "b": 3.0}, 7, total=20_000)["a"]
    joined = draw(lengths | {"c": np.full(9, 90)}, {"a": 1.0, "b": 1.0, "c": 2.0}, 7, total=20_000)["a"]
    assert np.array_equal(alone.chats, joined.chats)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test.parquet"], "train", 2),
        (["train/0.jsonl", "train/1.jsonl", "valid/0.jsonl", "notes.txt"], "train", 2),
        (["competitive_coding_cpp.part_00.jsonl", "competitive_coding_cpp.part_01.jsonl"], "competitive_coding_cpp.part_00", 1),
        (["MCQ.jsonl.zst", "RQA.jsonl.zst"], "", 2),
    ],
)
def test_files_are_found_by_their_names(names, split, expected):
    assert len(files_of_split(names, "", "", split, "x")) == expected


def test_a_readme_decides_where_there_is_one():
    readme = "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n    path: [a.jsonl, b.jsonl]\n- config_name: other\n  data_files: c*.jsonl\n---\n"
    names = ["a.jsonl", "b.jsonl", "c1.jsonl", "train.jsonl"]
    assert files_of_split(names, readme, "", "train", "x") == ["a.jsonl", "b.jsonl"]
    saved = ["state.json", "data-00000-of-00001.arrow", "dataset_info.json", ".cache.json"]
    assert files_of_split(saved, "", "", "", "x") == saved[1:2] and files_of_split(saved[:1], "", "", "", "x") == saved[:1]
    assert files_of_split(names, readme, "other", "", "x") == ["c1.jsonl"]
    with pytest.raises(UserError, match="did you mean 'other'"):
        files_of_split(names, readme, "othre", "", "x")


def test_a_folder_downloaded_from_the_hub_is_read_like_the_hub(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: chat_if, path: data/chat.jsonl}\n---\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chat.jsonl").write_text("{}\n")
    assert resolve(Dataset("x", str(tmp_path), split="chat_if"), tmp_path) == [tmp_path / "data" / "chat.jsonl"]


def test_globs_and_nothing_found(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert [p.name for p in resolve(Dataset("x", str(tmp_path / "*.jsonl")), tmp_path)] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="matches no file") as error:
        resolve(Dataset("x", str(tmp_path / "*.parquet")), tmp_path)
    assert "a.jsonl, b.jsonl" in str(error.value)


def test_other_file_systems_are_copied_once_and_again_when_they_change(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/train.jsonl", b"{}\n")
    entry = Dataset("x", "memory://bucket/*.jsonl")
    (first,), (second,) = resolve(entry, tmp_path), resolve(entry, tmp_path)
    assert first == second and first.read_bytes() == b"{}\n"
    memory.pipe("/bucket/train.jsonl", b"{}\n{}\n")
    (third,) = resolve(entry, tmp_path)
    assert third != first and third.read_bytes() == b"{}\n{}\n"


def test_the_hub_without_a_network_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    import huggingface_hub

    def offline(*a, **k):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(UserError, match="cannot be fetched from the hub") as error:
        resolve(Dataset("x", "hf://nvidia/Nemotron-Science-v1", split="MCQ"), tmp_path)
    assert "hf download" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"weight": 0}, "positive number"),
        ({"weight": -2}, "positive number"),
        ({"weight": float("nan")}, "positive number"),
        ({"name": "../x"}, "bad dataset name"),
        ({"wieght": 1}, "did you mean 'weight'"),
        ({"weight": "much"}, "expected float"),
    ],
)
def test_bad_entries_are_named(tmp_path, entry, says):
    path = tmp_path / "blend.json"
    path.write_text(json.dumps({"datasets": [{"name": "a", "path": "a.jsonl"} | entry]}))
    with pytest.raises(UserError, match=says):
        load_blend(path)


def test_no_blend_at_all(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_blend(tmp_path / "none.json")
    (tmp_path / "blend.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_blend(tmp_path / "blend.json")
    assert single("a b.jsonl.gz").datasets[0].name == "a_b"


@pytest.mark.parametrize("path", sorted((ROOT / "papermill_runs").glob("*/data_prep/blends/*.json")), ids=lambda p: f"{p.parts[-4]}-{p.stem}")
def test_the_published_blends_are_read(path):
    blend = load_blend(path)
    assert all(d.path.startswith("hf://nvidia/") for d in blend.datasets)
    if path.parts[-4] == "super3" and path.stem == "public":
        assert sum(d.weight for d in blend.datasets) == pytest.approx(58.3)
