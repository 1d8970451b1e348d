"""The record of a training: what a kill leaves behind, and what stays of it when either engine goes on."""

import json

import pytest

from nemotron_nb.megatron.recorder import go_on
from nemotron_nb.ops.run_folder import MetricsReader, read_metrics, read_tail
from nemotron_nb.stages.budget import rollout_rows
from nemotron_nb.train.metrics import MetricsFile, lines_to_keep, metric_lines

WHOLE = '{"kind": "start"}\n{"step": 1,  "kind": "train", "timing": {"forward": 1e-1}}\n'  # not as json.dumps would write it
NEXT = '{"kind": "train", "step": 2, "timing": {"forward": 0.1}, "parts": [{"loss": 2.0}]}\n'


def go_on_here(folder, step):
    """As the PyTorch engine goes on."""
    path = folder / "metrics.jsonl"
    with MetricsFile(path, lines_to_keep(metric_lines(path), step, 9)) as metrics:
        metrics.write({"kind": "resume", "step": step, "attempt": 2})


@pytest.mark.parametrize("resume", [go_on_here, go_on], ids=["torch", "megatron"])
def test_a_line_cut_off_anywhere_is_dropped_and_the_others_keep_every_byte(tmp_path, resume):
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(NEXT)):
        path.write_text(WHOLE + NEXT[:cut])
        resume(tmp_path, 2)
        assert path.read_text() == WHOLE + '{"kind": "resume", "step": 2, "attempt": 2}\n', NEXT[:cut]
    path.write_text(WHOLE + NEXT)
    resume(tmp_path, 2)
    assert path.read_text().startswith(WHOLE + NEXT)
    resume(tmp_path, 1)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["start", "train", "resume"]


def test_text_that_only_looks_like_the_end_of_a_line_ends_none(tmp_path):
    """str.splitlines would cut at U+2028; a record of JSONL ends at its newline, in every reader of a run folder."""
    said = "a\u2028b\u2029c\u0085d"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "conversations": [said]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [line["conversations"] for _, line in metric_lines(tmp_path / "metrics.jsonl")] == [[said]]
    for read in (read_metrics, lambda path: read_tail(path)[0], lambda path: MetricsReader(path).new()):
        assert [line["conversations"] for line in read(tmp_path / "metrics.jsonl")] == [[said]]
    (tmp_path / "rollouts.jsonl").write_text(json.dumps({"messages": [{"content": said}]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert rollout_rows(tmp_path) == [{"messages": [{"content": said}]}]
