"""The record of a training: what a kill leaves behind, and what stays of it when either engine goes on."""

import json

import pytest

from nemotron_nb.megatron.recorder import go_on
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
