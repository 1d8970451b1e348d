"""Chats that go on: they end by a rule, repeat nothing, and no bad turn is a part of them."""

import json

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.core import UserError
from nemotron_nb.synth import multi_turn
from nemotron_nb.synth.row import PASSED

SCRIPT = multi_turn.rehearse_multi_turn


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("multi_turn", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=200, most_turns=3)
    assert len(made) == 200 and not drops, reasons(drops)
    return made


def test_two_hundred_right_rows_pass(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in multi_turn.judge_multi_turn(row))
    assert {len(row["messages"]) for row in rows} == {4, 6}
    assert all(m.get("reasoning_content") for row in rows for m in row["messages"] if m["role"] == "assistant")


def _repeat(m):
    m[2:4] = m[0:2]


def _empty(m):
    m[-1]["content"] = " "


def test_planted_wrongs_are_refused(rows):
    changes = [_repeat, _empty, lambda m: m.pop(), lambda m: m.insert(1, dict(m[0])), lambda m: m[3].update(content=m[1]["content"]),
               lambda m: m.pop(0), lambda m: m[2].update(content=m[0]["content"] + " Please.")]  # fmt: skip
    scores = [lambda s: s.clear(), lambda s: s[0].update(true=1), lambda s: s[-1].pop("helpful"), lambda s: s.extend([s[0]] * 5)]
    planted = caught = 0
    for row in rows:
        for change, place in [(c, 0) for c in changes] + [(c, 1) for c in scores]:
            spoilt = json.loads(json.dumps(row))
            change(spoilt["synth"]["check"]["scores"] if place else spoilt["messages"])
            planted += 1
            caught += any(p.status != PASSED for p in multi_turn.judge_multi_turn(spoilt))
    assert caught == planted == 2200


def _when(start, text):
    return reworded(SCRIPT, lambda q, r: with_text(r, text) if q.startswith(start) else None)


LIES = {
    "user is done at once": (_when("You play", '{"done": true, "says": ""}'), {"talk: too_short_user_is_done"}),
    "user repeats": (reworded(SCRIPT, lambda q, r: with_text(r, json.dumps({"done": False, "says": q.partition("[user]\n")[2].split("\n")[0]})) if q.startswith("You play") else None), {"talk: too_short_user_repeats"}),
    "user says nothing": (_when("You play", '{"done": false, "says": "..."}'), {"talk: too_short_user_is_done"}),
    "user is no user": (_when("You play", "Thanks for your thanks!"), {"talk: teacher_invalid"}),
    "judge is never pleased": (_when("Judge", '{"helpful": 2, "true": 4, "to_the_point": 4}'), {"talk: too_short_low_score"}),
    "judge gives zero": (_when("Judge", '{"helpful": 0, "true": 4, "to_the_point": 4}'), {"talk: judge_invalid"}),
    "same answer for every question": (reworded(SCRIPT, lambda q, r: None if q.startswith(("You", "Judge")) else with_text(r, "It depends on what you want.")), {"talk: too_short_answer_repeats"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, wanted = LIES[name]
    made, drops = made_by("multi_turn", script, tmp_path, rows=6)
    assert not made and reasons(drops) == wanted


def test_chats_of_a_file_go_on(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is tin for?"}, {"role": "assistant", "content": "Solder, mostly."},
            {"role": "user", "content": "What else?"}, {"role": "assistant", "content": "Cans."}]  # fmt: skip
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": chat, "license": "CC0-1.0"}) + "\n")
    made, _ = made_by("multi_turn", honest(SCRIPT), tmp_path / "run", rows=3, seeds=str(tmp_path / "c.jsonl"), seed_field="messages")
    assert made and all(row["messages"][:4] == chat[:4] and len(row["messages"]) > 6 for row in made)
    assert all(p.status == PASSED for row in made for p in multi_turn.judge_multi_turn(row)) and made[0]["license"] == "CC0-1.0"
    tools = [{"role": "user", "content": [{"type": "image"}]}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": tools}) + "\n")
    _, drops = made_by("multi_turn", honest(SCRIPT), tmp_path / "t", rows=1, seeds=str(tmp_path / "t.jsonl"), seed_field="messages")
    assert reasons(drops) == {"talk: not_plain_text"}
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        made_by("multi_turn", honest(SCRIPT), tmp_path / "e", rows=1, seeds=str(tmp_path / "e.jsonl"))
