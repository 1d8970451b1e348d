"""Pipelines that ask a model for chats: its configs, a tiny run, data preparation, and a file that is judged again."""

import json
from dataclasses import replace

import pytest
from synth_rows import prepared

from nemotron_nb.stages.synth import synth_config
from nemotron_nb.synth.ask import REHEARSAL
from nemotron_nb.synth.infinity import has_sandbox
from nemotron_nb.synth.pipelines import PIPELINES, check_file
from nemotron_nb.synth.produce import produce

ASKING = (
    "infinity", "rqa", "science", "multilingual", "safety", "multi_turn", "instruction_following", "low_effort", "paraphrase",
)  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
def test_a_tiny_run_is_prepared_without_a_reject_and_judged_again(name, tmp_path):
    configs = {kind: synth_config(PIPELINES[name], kind).settings.synth for kind in ("default", "tiny")}
    assert not configs["default"].teacher.base_url and configs["tiny"].teacher.base_url == REHEARSAL
    made = produce(PIPELINES[name], replace(configs["tiny"], rows=min(12, configs["tiny"].rows)), tmp_path / "run")
    rows = [json.loads(line) for line in open(tmp_path / "run/rows.jsonl", encoding="utf-8")]
    assert rows and made.funnel.kept == len(rows)
    prepared(rows, tmp_path)
    if name != "infinity" or has_sandbox():
        assert check_file(tmp_path / "run/rows.jsonl").all_passed
    assert all(row["synth"]["parents"] and row["license"] for row in rows)
    assert all(row["synth"]["models"]["teacher"] == "rehearsed" for row in rows)
