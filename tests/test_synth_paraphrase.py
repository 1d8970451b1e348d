"""Paraphrases: every value survives, the row's own judge passes, and the words become richer."""

import json
import random
import re

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded

from nemotron_nb.core import UserError
from nemotron_nb.synth import paraphrase
from nemotron_nb.synth.look import distinct_stretches
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.produce import produce
from nemotron_nb.synth.row import PASSED

SCRIPT = paraphrase.rehearse_paraphrase


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("paraphrase", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=240)
    assert len(made) >= 200 and reasons(drops) == {"take: no_row_of_sql"}, reasons(drops)
    return made


def test_two_hundred_right_rows_pass_and_are_richer(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in paraphrase.judge_paraphrase(row))
    old = [row["synth"]["check"]["old"] for row in rows]
    new = [paraphrase.question_in(row["messages"][0]["content"], "Question:")[1] for row in rows]
    assert distinct_stretches(new) > 1.2 * distinct_stretches(old)


def test_planted_wrongs_are_refused(rows):
    planted = caught = 0
    rng = random.Random(1)
    for row in rows[::8]:
        text = row["messages"][0]["content"]
        context, new = paraphrase.question_in(text, "Question:")
        kept = sorted(paraphrase.values_in(row["synth"]["check"]["old"], context))
        name = rng.choice(kept)
        texts = [context + re.sub(re.escape(name), "xyz", new, flags=re.IGNORECASE), text + " Only 77 of them.", context + row["synth"]["check"]["old"],
                 text.replace("CREATE", "DROP", 1), context + "What is it?"]  # fmt: skip
        for spoilt in texts:
            planted += 1
            messages = [{"role": "user", "content": spoilt}, *row["messages"][1:]]
            caught += any(p.status != PASSED for p in paraphrase.judge_paraphrase(row | {"messages": messages}))
        for change in (lambda r: r["messages"][-1].update(content="```sql\nSELECT 1\n```"), lambda r: r["synth"]["check"].update(same=False), lambda r: r["synth"]["check"].update(same="yes")):
            spoilt = json.loads(json.dumps(row))
            change(spoilt)
            planted += 1
            caught += any(p.status != PASSED for p in paraphrase.judge_paraphrase(spoilt))
    assert planted > 180 and caught == planted


def _says(change):
    return reworded(SCRIPT, lambda q, r: json.dumps({"question": change(json.loads(r.content)["question"])}) if q.startswith("Say") else None)


LIES = {
    "says the same": (reworded(SCRIPT, lambda q, r: json.dumps({"question": re.findall(r"(?s)<question>\n(.*)\n</q", q)[0]}) if q.startswith("Say") else None), "say: teacher_invalid"),
    "adds a number": (_says(lambda s: s + " At most 5, and 1."), "say: teacher_invalid"),
    "same output for every input": (_says(lambda s: "What does the table say about it?"), "say: teacher_invalid"),
    "words": (reworded(SCRIPT, lambda q, r: "Sure!" if q.startswith("Say") else None), "say: teacher_invalid"),
    "judge sees a difference": (reworded(SCRIPT, lambda q, r: json.dumps({"same": False, "differs": "order"}) if q.startswith("Do") else None), "compare: other_question"),
    "judge hedges": (reworded(SCRIPT, lambda q, r: json.dumps({"same": "mostly", "differs": ""}) if q.startswith("Do") else None), "compare: judge_invalid"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, wanted = LIES[name]
    made, drops = made_by("paraphrase", script, tmp_path, rows=10)
    assert not made and reasons(drops) - {"take: no_row_of_sql"} == {wanted}


def test_rows_of_a_file_are_said_anew_again_and_again(tmp_path):
    produce(PIPELINES["sql"], PIPELINES["sql"].part("settings")(rows=4, max_drop_share=1.0), tmp_path / "sql")
    path = tmp_path / "sql/rows.jsonl"
    count = len(path.read_text().splitlines())
    made, _ = made_by("paraphrase", honest(SCRIPT), tmp_path / "run", rows=3 * count, seeds=str(path))
    assert count < len(made) and len({row["messages"][0]["content"] for row in made}) == len(made)
    assert made[0]["synth"]["parents"][-1]["name"] == "rows.jsonl:1" and all(p.status == PASSED for p in paraphrase.judge_paraphrase(made[0]))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}) + "\n")
    _, drops = made_by("paraphrase", honest(SCRIPT), tmp_path / "chats", rows=1, seeds=str(chats))
    assert reasons(drops) == {"take: no_made_row_with_one_question"}
    chats.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not_utf8"):
        made_by("paraphrase", honest(SCRIPT), tmp_path / "bad", rows=1, seeds=str(chats))
