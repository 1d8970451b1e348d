"""Does the report say what the run folder says, and nothing that is not safe to open?"""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from run_folders import HOSTILE, MANIFEST, fabricated_run, metrics_lines, step

from nemotron_nb.core import UserError, write_json
from nemotron_nb.ops import run_folder
from nemotron_nb.ops.report import (
    fill_picture,
    funnel_picture,
    generations_picture,
    headline,
    loss_picture,
    preparation_notes,
    read_run,
    run_row,
    seams,
    sections,
    settings_picture,
    stage_switches,
    strips_picture,
    write_report,
)
from nemotron_nb.ops.run_folder import read_status, set_status

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "p", "div", "span", "b", "br", "details", "summary"),
    *("table", "tr", "th", "td", "img"),
}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.said = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.said += data


@pytest.fixture
def folder(tmp_path):
    return fabricated_run(tmp_path)


def test_the_page_needs_nothing_and_runs_nothing(folder):
    text = write_report(folder).read_text()
    page = Page(text)
    assert set(page.tags) <= ALLOWED
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] == "href"]
    assert all(value.startswith("data:image/png;base64,") for _, name, value in page.attributes if name == "src")
    assert "url(" not in text and "@import" not in text and "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert HOSTILE not in text and "alert(1)" in page.said


def test_every_picture_is_a_png_with_words(folder):
    page = Page(write_report(folder).read_text())
    images = [value for _, name, value in page.attributes if name == "src"]
    alts = [value for tag, name, value in page.attributes if tag == "img" and name == "alt"]
    assert len(images) == len(alts) == 4 and all(len(a) > 20 for a in alts)
    assert all(base64.b64decode(i.partition(",")[2]).startswith(b"\x89PNG") for i in images)


def test_every_section_says_how_to_read_it(folder):
    parts = sections(read_run(folder))
    assert len({s.title for s in parts}) == len(parts) == 11
    assert all(s.how.endswith(".") and len(s.how) > 20 for s in parts)


def test_the_headline_says_the_result(folder):
    words = " ".join(headline(read_run(folder)))
    assert "5.125 before, 1.250 after" in words
    assert "0 of 4 before, 3 of 4 after" in words
    assert "40 steps, 12,000 trained tokens in 4.0 seconds: 3,000 a second" in words
    assert str(folder / "model") in words


def test_a_failed_run_says_so_and_does_not_offer_a_model(tmp_path):
    words = headline(read_run(fabricated_run(tmp_path, "failed")))
    assert words[0] == f"The run failed: {HOSTILE}" and not any("from_pretrained" in w for w in words)
    assert HOSTILE not in write_report(tmp_path).read_text()


FILES = ["config.yaml", "origins.json", "env.json", "manifest.json", "metrics.jsonl", "evaluation_before.json", "evaluation_after.json"]


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_costs_its_sections_only(folder, missing):
    (folder / missing).unlink()
    text = write_report(folder).read_text()
    assert "<h2>" in text and (missing != "manifest.json" or "What became of the chats" not in text)


def test_an_empty_run_still_has_a_report(tmp_path):
    set_status(tmp_path, "running")
    assert "still going on" in write_report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_metrics_file_cut_in_the_middle_of_a_line(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    steps = read_run(folder).lines("train")
    assert 30 < len(steps) <= 40 and steps[-1]["step"] == len(steps)


def test_the_funnel_counts_everything_that_was_lost(folder):
    text = funnel_picture(read_run(folder).manifest).text
    for said in ("103", "3 rejected", "unknown_role", "no_messages", "too_long", "40 tokens cut off", "600 tokens", "33%", "one sequence was cut"):
        assert said in text, said


def test_the_loss_picture_tells_the_switch_and_the_ends():
    said = loss_picture(metrics_lines()).text
    assert "The sample stage begins at step 31." in said and "from 4.62 to 1.07" in said


def test_switches_there_and_back():
    steps = [step(i) | {"stage": s} for i, s in enumerate("aabba", 1)]
    assert stage_switches(steps) == [(3, "b"), (5, "a")]
    assert stage_switches([]) == []


def test_the_fill_is_told_in_percent(folder):
    assert "train 96 percent, valid 94 percent, test 62 percent" in fill_picture(read_run(folder).manifest).text


def test_both_strips_share_one_scale(folder):
    """A loss of 1.25 after training must be paler than 5.125 before it."""
    run = read_run(folder)
    shades = re.findall(r'background:#(..)(..)(..)[^>]*title="3 assistant: loss', strips_picture(run.before, run.after).html)
    before, after = (tuple(int(part, 16) for part in s) for s in shades)
    assert before == (233, 130, 60) and after > before


def test_answers_are_paired_by_prompt(folder):
    run = read_run(folder)
    shown = generations_picture(run.before, run.after, count=1).text
    assert "thinking not closed, does not end" in shown and HOSTILE + "0" in shown and HOSTILE + "40" in shown


def test_changed_settings_are_starred(folder):
    lines = settings_picture(read_run(folder)).text.splitlines()
    assert [line for line in lines if line.startswith("*")] == [line for line in lines if "train.train_iters" in line]


def test_a_seam_is_marked_and_told(tmp_path):
    """Two attempts, one curve: the report says where the second went on."""
    folder = fabricated_run(tmp_path)
    lines = metrics_lines()
    lines.insert(22, {"kind": "resume", "step": 20, "attempt": 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    attempts = [{"attempt": 1, "state": "preempted", "host": "n1", "slurm": {"job": "7"}, "message": HOSTILE}, {"attempt": 2, "state": "done", "host": "n2", "slurm": {"job": "7"}}]
    write_json(folder / "status.json", read_status(folder) | {"attempts": attempts})
    text = write_report(folder).read_text()
    assert "It took 2 attempts; training went on after step 20." in text and "Attempt 2 goes on after step 20." in text
    assert "<h2>Attempts</h2>" in text and HOSTILE not in text
    assert seams(lines) == [20] and len(read_run(folder).lines("train")) == 40


@pytest.mark.parametrize(("state", "said"), [("queued", "has not begun"), ("preempted", "can be resumed: paused after step 3"), ("failed", "failed: paused")])
def test_states_in_words(tmp_path, state, said):
    set_status(tmp_path, state, message="paused after step 3")
    assert said in headline(read_run(tmp_path))[0]


def test_a_run_in_one_row(folder):
    row = run_row(folder)
    assert (row["state"], row["steps"], row["held-out loss"], row["stage"], row["time"]) == ("done", 40, "1.250", "sample", "0:00:04")


def test_what_came_from_what(folder):
    write_json(folder / "artifacts.json", {"consumed": [{"name": HOSTILE, "what": "chats", "address": "", "digest": "a" * 64}], "made": [{"name": "M", "what": "model", "address": "art://M:v1", "digest": "b" * 64}]})
    text = write_report(folder).read_text()
    assert "What came from what" in text and "art:" in text and "b" * 12 in text and HOSTILE not in text


DAMAGE = {
    "status.json": ["", "[1]", '{"state": 3}', '{"state": "done", "attempts": 7}', '{"state": "running", "host": HOST, "pid": "x"}'],
    "metrics.jsonl": ["{\n", "[1]\n", '{"kind": "train", "seconds": "x"}\n', "\0\0\n"],
    "job.json": ["{", "[3]", "{}x"],
    "evaluation_after.json": ['{"loss_token": 1e}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_folder_is_one_marked_row(folder, name, text):
    """The others must still be listed: whatever lies in one folder, it gives a row with the same columns."""
    whole = run_row(folder)
    (folder / name).write_text(text.replace("HOST", json.dumps(run_folder.socket.gethostname())))
    row = run_row(folder)
    assert list(row) == list(whole) and row["state"] == "damaged" and row["run"] == str(folder) and row["said"]


def test_a_folder_in_place_of_a_file_is_one_marked_row(folder):
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert run_row(folder)["state"] == "damaged"


def test_a_row_reads_the_end_of_a_long_run_and_not_all_of_it(folder, monkeypatch):
    steps = "".join(json.dumps(step(n)) + "\n" for n in range(1, 5001))
    (folder / "metrics.jsonl").write_text(steps)
    monkeypatch.setattr(run_folder, "read_metrics", lambda path: pytest.fail("all lines were read"))
    row = run_row(folder)
    assert (row["steps"], row["time"], row["loss"]) == (5000, "~0:08:20", "1.000")


def test_a_row_says_why_and_in_which_job(tmp_path, monkeypatch):
    fabricated_run(tmp_path, "failed")
    write_json(tmp_path / "job.json", [{"job": "41"}, {"job": "42"}])
    assert (run_row(tmp_path)["job"], run_row(tmp_path)["said"]) == ("42", HOSTILE)
    write_json(tmp_path / "status.json", read_status(tmp_path) | {"state": "queued"})
    monkeypatch.setattr(run_folder, "_job_is_there", lambda job: False)
    row = run_row(tmp_path)
    assert row["state"] == "lost" and "--resume" in row["said"]


def test_an_adapter_is_named_with_its_base_and_what_loads_it(folder):
    (folder / "adapter").mkdir()
    (folder / "config.yaml").write_text("peft:\n  enabled: true\n  merge: false\ncheckpoint:\n  pretrained_checkpoint: /weights/base\n")
    (folder / "train.log").write_text("lora: routed experts stay frozen\nstep 1\nlora: routed experts stay frozen\n")
    words = headline(read_run(folder))
    assert any(w.startswith(f"The adapter lies in {folder / 'adapter'}, its base is /weights/base;") and "load_adapter" in w and "use_chunked_scan" in w for w in words)
    assert words.count("Note: routed experts stay frozen") == 1 and not any(f"{folder / 'model'}" in w for w in words)
    (folder / "config.yaml").write_text("peft:\n  enabled: true\n  merge: false\nmodel:\n  name: tiny\n")
    assert any("random weights" in w and "peft.merge=true" in w for w in headline(read_run(folder)))


def test_calls_are_only_spoken_of_where_there_are_any(folder):
    after = json.loads((folder / "evaluation_after.json").read_text()) | {"called_as_expected_rate": 1.0, "exact_rate": 0.5}
    write_json(folder / "evaluation_after.json", after)
    words = " ".join(headline(read_run(folder)))
    assert "call a tool" not in words and "50% are the reference" in words
    after["generations"][0]["expected"] = "<tool_call>\n"
    write_json(folder / "evaluation_after.json", after)
    assert "100% of them call a tool exactly where" in " ".join(headline(read_run(folder)))


def test_without_held_out_chats_there_is_no_loss_and_a_sentence(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["valid"] |= {"packs": 0}
    write_json(folder / "manifest.json", manifest)
    for name in ("before", "after"):
        write_json(folder / f"evaluation_{name}.json", {"step": 0, "generations": [], "num_generations": 0})
    words = " ".join(headline(read_run(folder)))
    assert "no held-out loss" in words and "before," not in words and write_report(folder).exists()
    assert "no chats are held out" in " ".join(preparation_notes(manifest))


def test_what_preparation_lost_is_told_before_training():
    notes = preparation_notes(MANIFEST | {"left_out": {"ends_with_user": 149}})
    assert notes[0].startswith("3 of 103 rows could not be read: 2 unknown_role, 1 no_messages") and notes[1].startswith("149 of 103 chats were left out")
    assert notes[-1] == "one sequence was cut" and preparation_notes(MANIFEST | {"rejects": {}, "warnings": []}) == []


def test_settings_that_nobody_changed_are_folded_away(folder):
    html = settings_picture(read_run(folder)).html
    open_part, _, folded = html.partition("<details>")
    assert "train.train_iters" in open_part and "optimizer.lr" in folded and "optimizer.lr" not in open_part and "<details open" not in html
