"""Runs beside each other: names, curves, settings that differ, hostile words, and what is no comparison."""

import json

import pytest
from run_folders import HOSTILE
from typer.testing import CliRunner

from nemotron_nb.cli import app
from nemotron_nb.core import UserError, write_json
from nemotron_nb.stages.compare import comparison_picture, compared_runs, curves_of, differing, result_rows, run_folders, short_names


def invented(root, kind, name, lines, config, after=None):
    """A run folder that never was."""
    run = root / kind / name
    run.mkdir(parents=True)
    write_json(run / "status.json", {"state": "done", "attempts": []})
    write_json(run / "config.yaml", config)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if after is not None:
        write_json(run / "evaluation_after.json", {"loss_token": after})
    return run


def trained(scale):
    return [{"kind": "train", "step": i, "loss_token": scale / i, "lr": 1e-3} for i in range(1, 6)]


@pytest.fixture
def runs(tmp_path):
    slow = invented(tmp_path, "sft", "20260101T000000Z-a-111111", trained(4), {"optimizer": {"lr": 1, "beta": 2}, "run": {"label": "x"}}, 2.0)
    fast = invented(tmp_path, "sft", "20260101T000000Z-b-222222", trained(3), {"optimizer": {"lr": HOSTILE, "beta": 2}, "run": {"label": "y"}}, 1.0)
    rewards = [{"kind": "rl_valid", "step": s, "reward": r, "rewards": {HOSTILE: r}} for s, r in ((0, 0.1), (9, 0.5))]
    paid = invented(tmp_path, "rl", "20260101T000000Z-<img src=x>$x$-333333", rewards, {"grpo": {"lr": 1}})
    return slow, fast, paid


def test_only_settings_that_differ_are_shown(runs):
    rows = differing(compared_runs(runs))
    assert [row["setting"] for row in rows] == ["optimizer.lr"] and rows[0]["rl <img src=x>$x$"] == ""


def test_a_measure_that_is_no_comparison_says_why(runs, tmp_path):
    base = invented(tmp_path, "pretrain", "20260101T000000Z-c-444444", trained(1), {}, 3.0)
    same = result_rows(compared_runs(runs[:2]))
    assert same == [{"measure": "held-out loss (nats a token)", "sft a": "2.0000", "sft b": "1.0000", "": ""}]
    mixed = result_rows(compared_runs([*runs[:2], base]))[0]
    assert mixed[""] == "runs of different kinds measured it, on data of their own"
    assert "1 of 3 runs have not measured it" in result_rows(compared_runs(runs))[0][""]


def test_hostile_names_stay_text(runs, tmp_path):
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--html", str(page)])
    assert done.exit_code == 0, done.output
    html = page.read_text()
    assert HOSTILE in done.output and HOSTILE not in html and "<img src=x>" not in html and "<script" not in html


def test_a_damaged_line_is_no_curve(runs):
    (runs[0] / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss_token": "nan"}\n{"kind": "train", "step": 2, "loss_token": 1.5, "lr": 1e-3}\n')
    assert curves_of(compared_runs(runs[:2])[0].run)["training loss (nats a token)"] == [(2, 1.5)]


def test_a_recipe_stands_for_its_runs(runs, tmp_path):
    folder = tmp_path / "recipe" / "tiny"
    folder.mkdir(parents=True)
    done = {name: {"run": str(run), "model": "", "data": ""} for name, run in zip(("sft", "again", "rl"), runs)}
    done["made"] = {"run": str(tmp_path / "rows"), "model": "", "data": ""}
    steps = [{"name": "made", "stage": "synth", "pipeline": "sql"}, {"name": "sft", "stage": "sft"}]
    write_json(folder / "journal.json", {"id": "1", "family": "nano3", "steps": steps, "done": done})
    assert run_folders([folder]) == list(runs) == run_folders([folder, runs[0]])
    assert "Settings that differ" in comparison_picture([folder]).text


def test_one_run_or_none_is_no_comparison(runs):
    for paths in (runs[:1], [runs[0], runs[0]]):
        with pytest.raises(UserError, match="1 run cannot be compared"):
            run_folders(paths)
    with pytest.raises(UserError, match="no status.json"):
        compared_runs([runs[0], runs[0].parent])
    for words in ([], [str(runs[0]), "--lineage", "x"]):
        assert isinstance(CliRunner().invoke(app, ["compare", *words]).exception, UserError)


def test_names_are_short_and_no_two_are_the_same(tmp_path):
    folders = [tmp_path / "sft" / f"20260101T00000{i}Z-tiny-{i}{i}" for i in range(3)]
    assert len(set(short_names(folders))) == 3 and short_names([folders[0], tmp_path / "rl" / "x"]) == ["sft tiny", "rl x"]
