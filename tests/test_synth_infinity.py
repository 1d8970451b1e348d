"""Programming problems: the sandbox decides; what agrees and is wrong, says nothing, or cannot run, falls."""

import json
from dataclasses import replace

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.core import UserError
from nemotron_nb.rl.code import Limits
from nemotron_nb.synth import ask, infinity, produce, several
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.row import PASSED, UNVERIFIED

SCRIPT = infinity.rehearse_infinity
FAST = {"sandbox": "limits", "seconds": 4.0}
boxed = pytest.mark.skipif(not infinity.has_sandbox(), reason="programs of a file run in bubblewrap alone")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("infinity", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=16, solutions=2, agree=2, **FAST)
    assert len(made) == 16 and not drops
    return made


def test_a_model_without_lies_loses_no_row(rows):
    assert_prepared(rows)
    assert {row["license"] for row in rows} == {several.OWN_LICENCE} and all(row["synth"]["pass_rate"] == 1 for row in rows)
    assert all(row["messages"][1]["reasoning_content"] for row in rows)


@boxed
def test_right_programs_pass_and_every_changed_one_is_refused(rows):
    for row in rows[:8]:
        assert [p.status for p in infinity.judge_infinity(row)] == [PASSED]
        said = row["messages"][1]["content"]
        for old, new in (("print(", "print(1 + "), ("n = int(input())", "n = int(input()) + [][0]"), ("```python", "```text")):
            spoilt = row | {"messages": [row["messages"][0], {"role": "assistant", "content": said.replace(old, new)}]}
            assert [p.status for p in infinity.judge_infinity(spoilt)] != [PASSED], new
        other = json.loads(json.dumps(row))
        other["synth"]["check"]["outputs"][-1] += "1"
        assert infinity.judge_infinity(other)[0].reason == "other_output"


@boxed
@pytest.mark.long
def test_two_hundred_right_programs_pass(tmp_path):
    made, drops = made_by("infinity", honest(SCRIPT), tmp_path, rows=200, solutions=2, agree=2, **FAST)
    assert len(made) == 200 and not drops
    assert all(p.status == PASSED for row in made for p in infinity.judge_infinity(row))


def _solved(said):
    """A script whose solutions are a program of the test."""
    return reworded(SCRIPT, lambda q, r: None if q.startswith(("Write a new", "Below")) else with_text(r, f"```python\n{said}\n```"))


def _problem(change):
    """A script whose problems are changed."""

    def changed(question, reply):
        if question.startswith("Write a new"):
            problem = json.loads(reply.content)
            change(problem)
            return with_text(reply, json.dumps(problem))

    return reworded(SCRIPT, changed)


def _critic(best):
    return reworded(SCRIPT, lambda q, r: with_text(r, json.dumps({"best": best, "why": "."})) if q.startswith("Below") else None)


def _apart():
    """No two solutions say the same."""
    count = iter(range(10**6))
    return reworded(
        SCRIPT, lambda q, r: None if q.startswith(("Write a new", "Below")) else with_text(r, f"```python\nprint({next(count)})\n```")
    )


def _tie():
    """Two solutions against two."""

    def script(body, before):
        reply = SCRIPT(body, before, honest=True)
        if body["messages"][0]["content"].startswith(("Write a new", "Below")):
            return reply
        return with_text(reply, reply.content.replace("print(", "print(1 + ")) if body.get("seed", 0) % 2 else reply

    return script


LIES = {
    "all agree and are wrong": (_solved("print(len(input()))"), "prove: same_output_for_every_input", "prove: example_disagrees"),
    "wrong and different": (_solved("input()\nprint(sum(map(int, input().split())) + 10**6)"), "prove: example_disagrees"),
    "same output for every input": (_solved("print(7)"), "prove: same_output_for_every_input", "prove: example_disagrees"),
    "no program": (_solved(""), "prove: no_answer"),
    "prints without end": (_solved("while True: print('x' * 10**6)"), "prove: no_answer"),
    "reads what is not its own": (_solved("print(open('/work/none').read())"), "prove: no_answer"),
    "no two agree": (_apart(), "prove: no_agreement"),
    "tie": (_tie(), "prove: tie", "prove: no_agreement"),
    "author cannot count": (_problem(lambda p: p["example"].update(output="-1")), "prove: example_disagrees"),
    "inputs alike": (_problem(lambda p: p.update(inputs=["1\n1"] * 5)), "breed: teacher_invalid"),
    "too few inputs": (_problem(lambda p: p.update(inputs=p["inputs"][:2])), "breed: teacher_invalid"),
    "critic out of range": (_critic(4), "choose: judge_invalid"),
    "critic with a fraction": (_critic(1.5), "choose: judge_invalid"),
    "critic takes none": (_critic(-1), "choose: critic_takes_none"),
    "words for a problem": (reworded(SCRIPT, lambda q, r: "Here it is." if q.startswith("Write") else None), "breed: teacher_invalid"),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, *wanted = LIES[name]
    few = FAST | {"seconds": 2.0}
    made, drops = made_by("infinity", script, tmp_path, rows=2, **few, agree=2 if name == "tie" else 3)
    assert not made and len(drops) == 2 and reasons(drops) <= set(wanted), reasons(drops)


def test_equal_candidates_are_one(tmp_path):
    """All candidates are the same: the critic gets to see one, and there is no second to name."""
    seen = []
    one = json.dumps(json.loads(infinity.rehearse_infinity(_asked("Write a new programming problem."), 0, honest=True).content))

    def script(body, before):
        question = body["messages"][0]["content"]
        seen.append(question) if question.startswith("Below") else None
        return one if question.startswith("Write") else SCRIPT(body, before, honest=True)

    made, _ = made_by("infinity", script, tmp_path, rows=1, **FAST)
    assert len(made) == 1 and seen[0].startswith("Below are 1 programming problems")


def _asked(question):
    return {"messages": [{"role": "user", "content": question}]}


def test_without_a_sandbox_nothing_is_asked_and_rows_fall_unverified(tmp_path, monkeypatch):
    monkeypatch.setattr(infinity, "has_sandbox", lambda: False)
    asked = []
    made, drops = made_by("infinity", lambda body, before: asked.append(body) or "", tmp_path, rows=3)
    assert not made and not asked and reasons(drops) == {"draw: no_sandbox"}
    assert all(d["proofs"][0]["status"] == UNVERIFIED for d in drops)
    row = {"messages": [{"role": "assistant", "content": "```python\nprint(1)\n```"}], "synth": {"check": {"sandbox": "limits"}}}
    assert infinity.judge_infinity(row)[0].status == UNVERIFIED


def test_one_input_spoils_no_other():
    found = infinity.run_inputs("n = int(input())\nif n == 2: raise SystemExit(1)\nif n == 3: print()\nprint(n) if n < 3 else None", "123")
    assert found == ["1", None, None]
    assert infinity.run_inputs("while True: pass", ["1", "2"], Limits(seconds=1)) == [None, None]
    assert infinity.run_inputs("print('[]')\nimport os\nos._exit(0)", ["1"]) in ([None], ["[]"])  # unflushed, or flushed


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "empty"), (b'{"text": "\xff\xfe"}\n', "not_utf8"), (b'{"problem": "x"}\n', "has a text in the field|no row has"), (b"[1]\n", "no row has")],
)
def test_bad_seed_files_stop_before_a_question(data, words, tmp_path):
    (tmp_path / "seeds.jsonl").write_bytes(data)
    asked = []
    with pytest.raises(UserError, match=words):
        made_by("infinity", lambda b, n: asked.append(b), tmp_path / "run", rows=2, seeds=str(tmp_path / "seeds.jsonl"), **FAST)
    assert not asked


def test_a_seed_file_of_one_row_is_enough_and_its_content_is_part_of_the_recipe(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"text": "heaps: the smallest first", "license": "CC-BY-4.0"}\n')
    made, _ = made_by("infinity", honest(SCRIPT), tmp_path / "run", rows=3, seeds=str(seeds), solutions=2, agree=2, **FAST)
    assert {row["license"] for row in made} == {"CC-BY-4.0"} and made[0]["synth"]["parents"][0]["name"] == "seeds.jsonl:1"
    settings = infinity.InfinitySettings(seeds=str(seeds))
    before = produce.recipe_of(PIPELINES["infinity"], settings)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(seeds.read_text())
    assert produce.recipe_of(PIPELINES["infinity"], replace(settings, seeds=str(moved))) == before
    seeds.write_text('{"text": "heaps: the largest first", "license": "CC-BY-4.0"}\n')
    assert produce.recipe_of(PIPELINES["infinity"], settings) != before


def test_temperature_zero_cannot_vote(tmp_path):
    cold = ask.ModelSection(ask.REHEARSAL, temperature=0, retries=0)
    with pytest.raises(UserError, match="majority"):
        made_by("infinity", honest(SCRIPT), tmp_path, rows=1, teacher=cold, **FAST)
