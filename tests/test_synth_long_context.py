"""Long chats: exact to the token, answered by their own text, refused when anything in them is changed."""

import random
import re
from collections import Counter

import pytest
from synth_rows import configs_of, prepared, reasons, right, spoilt

from nemotron_nb.core import UserError
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.synth import long_context
from nemotron_nb.synth.long_context import LONG_TASKS, Filler, LongSettings, chat_tokens, fill, placed
from nemotron_nb.synth.look import diversity_of
from nemotron_nb.synth.steps import Workshop, make_row

SMALL = {"tokenizer": "tiny", "target_mean": 1500, "target_cap": 3000, "target_least": 1024}


def rows():
    return right("long_context", 200, 215, **SMALL)


def test_right_rows_pass_and_every_task_is_there():
    assert reasons("long_context", rows()) == {"": len(rows())}
    assert set(Counter(row["synth"]["about"]["task"] for row in rows())) == set(LONG_TASKS)


def test_preparation_counts_what_the_rows_say(tmp_path):
    manifest = prepared(rows(), tmp_path)
    targets = [row["synth"]["check"]["tokens"] for row in rows()]
    assert sum(split["tokens"] for split in manifest["splits"].values()) == sum(targets)


def test_a_pack_smaller_than_the_rows_is_said(tmp_path):
    assert all(row["synth"]["check"]["tokens"] > 1024 for row in rows()[:40])
    with pytest.raises(UserError, match="cut_before_the_answer.: 40"):
        prepared(rows()[:40], tmp_path, pack_size=1024)


def change(row, old, new):
    message = row["messages"][0]
    changed = message["content"].replace(old, new, 1)
    if changed == message["content"]:
        return False
    message["content"] = changed


def longer(row):
    row["messages"][0]["content"] = "So. " + row["messages"][0]["content"]


def shorter(row):
    lines = row["messages"][0]["content"].splitlines()
    filler = next(line for line in lines[1:] if line.startswith("The ") and line not in lines_of(row))
    row["messages"][0]["content"] = row["messages"][0]["content"].replace(filler + "\n", "", 1)


def another_answer(row):
    row["messages"][1]["content"] += " 1"


def no_answer(row):
    row["messages"][1]["content"] = ""


def another_question(row):
    row["messages"][0]["content"] += " Or not?"


def needle_changed(row):
    if row["synth"]["about"]["task"] not in ("needle", "many_needles"):
        return False
    code = row["synth"]["answer"].split(", ")[0]
    return change(row, f" is {code}.", f" is {int(code) // 10 * 10 + (int(code) + 1) % 10}.")


def lines_of(row):
    mark = LONG_TASKS[row["synth"]["check"]["task"]].mark
    return [line for line in row["messages"][0]["content"].splitlines() if re.fullmatch(mark, line)]


def a_planted_line_lost(row):
    return change(row, lines_of(row)[0], "Nothing happened on that day.")


def a_planted_line_twice(row):
    return change(row, lines_of(row)[0], lines_of(row)[0] + "\n" + lines_of(row)[0])


def a_step_changed(row):
    if row["synth"]["about"]["task"] != "sequence" or row["synth"]["check"]["asked"]["kind"] != "moves":
        return False
    return change(row, " miles north.", " miles south.")


def a_variable_set_again(row):
    if row["synth"]["about"]["task"] != "variables":
        return False
    last = lines_of(row)[-1]
    name = row["synth"]["answer"].split(", ")[0]
    return change(row, last, f"{last}\nVAR {name} = 1") if name not in last else False


WRONGS = {
    longer: {"other_length"}, shorter: {"other_length"}, another_answer: {"wrong_answer"}, no_answer: {"wrong_answer"},
    another_question: {"other_question"}, needle_changed: {"wrong_answer"}, a_planted_line_lost: {"lines_lost"},
    a_planted_line_twice: {"lines_lost"}, a_step_changed: {"wrong_answer"}, a_variable_set_again: {"lines_lost", "wrong_answer"},
}  # fmt: skip


@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    wrong = spoilt(rows(), spoil)
    assert len(wrong) >= 5
    assert set(reasons("long_context", wrong)) <= WRONGS[spoil]


@pytest.mark.parametrize("spoil", [{"tokenizer_digest": "0"}, {"tokenizer": "no/such"}])
def test_a_row_of_another_tokenizer_is_unverified(spoil):
    from nemotron_nb.synth.long_context import judge_long_context

    row = spoilt(rows()[:1], lambda row: row["synth"]["check"].update(spoil))[0]
    assert [proof.status for proof in judge_long_context(row)] == ["passed", "passed", "passed", "unverified"]


@pytest.mark.parametrize("name", LONG_TASKS)
def test_tasks_say_something_at_every_length(name):
    task = LONG_TASKS[name]
    for seed in range(60):
        rng = random.Random(seed)
        runs, asked = task.draw(rng, 1024 << (seed % 9))
        lines = placed(rng, ["The baker slept.\n"] * 50, runs)
        assert task.solve(lines, asked)
        planted = [line.strip() for line in lines if line != "The baker slept.\n"]
        assert sorted(planted) == sorted(line for run in runs for line in run)
        for run in runs:
            places = [planted.index(line) for line in run]
            assert len(set(run)) < len(run) or places == sorted(places)


def test_gaps_are_filled_to_the_token():
    tokenizer = load_tokenizer("tiny")
    filler = Filler(tokenizer)
    for wanted in range(filler.pair, 400):
        text = "".join(fill(random.Random(wanted), filler, wanted))
        assert len(tokenizer.encode(text, special=False)) == wanted


@pytest.mark.parametrize("name", LONG_TASKS)
def test_needles_longer_than_the_target_fall(name):
    """A row whose planted lines fill its length is not cut: it falls, and its length is said."""

    def draw_too_much(draft, workshop):
        long_context.draw(draft, workshop)
        draft.check["tokens"] = 200

    steps = (("draw", draw_too_much), ("write", long_context.write))
    fallen = make_row("long_context", steps, Workshop(LongSettings(**SMALL, tasks=(name,))), 0, "recipe")
    assert (fallen.step, fallen.reason) == ("write", "needles_longer_than_target")
    assert re.fullmatch(r"\d+ of 200 tokens", fallen.detail)


def test_texts_differ():
    """Of all stretches of four words nearly all are said once: in each task, in the rows alone, in all of them."""
    assert diversity_of(rows()).stretches >= 0.6
    by_task = {name: [row for row in rows() if row["synth"]["about"]["task"] == name] for name in LONG_TASKS}
    for name, some in by_task.items():
        assert diversity_of(some).stretches >= 0.45, name
        assert min(diversity_of([row]).stretches for row in some) >= 0.3, name
        questions = {row["messages"][0]["content"].splitlines()[-1] for row in some}
        assert len(questions) > 0.6 * len(some), name


def test_the_answer_is_said_as_asked():
    said = Counter()
    for row in rows():
        question, answer = (row["messages"][i]["content"].splitlines()[-1] for i in (0, 1))
        expected = {
            "Answer in a sentence.": f"The answer is {row['synth']['answer']}.", "Begin with 'Answer:'.": "Answer: {a}",
            "Write it behind 'Result:'.": "Result: {a}", "Put it into square brackets.": "[{a}]",
            "Set it in bold type.": "**{a}**",
        }  # fmt: skip
        how = next((how for how in expected if question.endswith(how)), "")
        said[how] += 1
        assert answer == expected.get(how, "{a}").replace("{a}", row["synth"]["answer"])
    assert len(said) == 6 and min(said.values()) >= 10


def test_the_text_of_a_row_becomes_no_special_token():
    row = rows()[0]
    assert chat_tokens(row["messages"], load_tokenizer("tiny")) == row["synth"]["check"]["tokens"]
    row["messages"][0]["content"] += "<|im_end|>"
    assert chat_tokens(row["messages"], load_tokenizer("tiny")) > row["synth"]["check"]["tokens"] + 1


def test_settings():
    configs = configs_of("long_context")
    assert (configs["default"].target_mean, configs["default"].target_cap, configs["tiny"].rows) == (128_000, 256_000, 100)
    bad = [{"target_mean": 300_000}, {"target_least": 10}, {"target_cap": 100}, {"target_sigma": 3}, {"tasks": ()}, {"tasks": ("x",)}]
    for settings in bad:
        with pytest.raises(UserError):
            LongSettings(**settings)
