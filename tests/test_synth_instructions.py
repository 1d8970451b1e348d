"""Exercises in following instructions: all turns keep all of them, and one that is broken is found."""

import random
import re

import pytest
from synth_rows import configs_of, prepared, reason, reasons, right, spoilt

from nemotron_nb.core import UserError
from nemotron_nb.rl.instructions import CHECKS
from nemotron_nb.synth.instructions import (
    INSTRUCTIONS, TOPICS, InstructionSettings, Plan, broken_instructions, draw_instructions, planned, topic_named, write_text,
)  # fmt: skip
from nemotron_nb.synth.row import Drop


def rows():
    return right("instructions", 200, 320)


def test_right_rows_pass_and_are_prepared(tmp_path):
    assert reasons("instructions", rows()) == {"": len(rows())}
    assert {row["synth"]["about"]["turns"] for row in rows()} == {1, 2, 3}
    assert len({row["synth"]["answer"] for row in rows()}) == len(rows())
    prepared(rows(), tmp_path)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_each_instruction_is_kept_alone_and_broken_by_a_text_for_others(name):
    """A check that holds for whatever is written would teach nothing."""
    kept = others = 0
    for seed in range(30):
        rng = random.Random(seed)
        topic = topic_named(rng.choice(sorted(TOPICS)))
        instruction = INSTRUCTIONS[name](rng, topic)
        asked = [{"name": instruction.name, "arguments": instruction.arguments}]
        try:
            kept += not broken_instructions(write_text(rng, topic, planned([instruction])), asked)
        except Drop:
            continue
        plan = Plan(shape="bullets" if name == "no_markdown" else "sections", parts=5, marks="!", words=[(topic.things[0], 1)], extras=["Weigh 3, not 4"], sentences=25)
        others += bool(broken_instructions(write_text(rng, topic, plan), asked))
    assert kept >= 15
    assert others >= (0 if name in ("characters", "word_limit", "forbidden", "once", "keywords", "no_period", "letter", "figures", "in_order", "short_words", "different_words") else 20)


def test_what_goes_together_mostly_works():
    good = 0
    for seed in range(300):
        rng = random.Random(seed)
        topic = topic_named(rng.choice(sorted(TOPICS)))
        together = draw_instructions(rng, topic, 5)
        assert len({i.name for i in together}) == len(together)
        try:
            text = write_text(rng, topic, planned(together))
        except Drop:
            continue
        good += not broken_instructions(text, [{"name": i.name, "arguments": i.arguments} for i in together])
    assert good > 240


BREAK = {
    "punctuation:no_comma": lambda text, a: text[:5] + ", " + text[5:],
    "punctuation:no_exclamation": lambda text, a: text + "!",
    "punctuation:ends_with_period": lambda text, a: text + " and",
    "change_case:english_lowercase": lambda text, a: text + " A",
    "change_case:english_capital": lambda text, a: text + " a",
    "detectable_content:no_numbers": lambda text, a: text + " 7",
    "detectable_content:question": lambda text, a: text.replace("?", "."),
    "detectable_content:postscript": lambda text, a: text.replace("P.S.", "And"),
    "detectable_format:json_format": lambda text, a: text[:-1],
    "detectable_format:title": lambda text, a: text.replace("<<", "<"),
    "detectable_format:no_markdown": lambda text, a: text + "\n- one more",
    "detectable_format:number_bullet_lists": lambda text, a: text + "\n- one more",
    "detectable_format:numbered_list": lambda text, a: text + "\n99. one more",
    "detectable_format:multiple_sections": lambda text, a: text.replace(a["section_spliter"], "X", 1),
    "detectable_format:headings": lambda text, a: text.replace("## ", "", 9),
    "detectable_format:number_highlighted_sections": lambda text, a: text.replace("*", ""),
    "length_constraints:number_paragraphs": lambda text, a: text + "\n\n***\n\nmore",
    "length_constraints:number_sentences": lambda text, a: text + "\n\nOne. More. Still.",
    "length_constraints:number_lines": lambda text, a: text + "\nmore",
    "length_constraints:words_per_sentence": lambda text, a: "a b c d e f g h i j k l " + text,
    "length_constraints:number_words": lambda text, a: "one" if a["relation"] == "at least" else text + " one" * 300,
    "length_constraints:number_characters": lambda text, a: text * 40,
    "keywords:frequency": lambda text, a: text + " " + a["keyword"],
    "keywords:once": lambda text, a: text + " " + a["keyword"],
    "keywords:existence": lambda text, a: text.replace(a["keywords"][0], "x").replace(a["keywords"][0].upper(), "X"),
    "keywords:forbidden_words": lambda text, a: text + " " + a["forbidden_words"][0],
    "startend:start_checker": lambda text, a: "Hm. " + text,
    "startend:end_checker": lambda text, a: text + " Or not.",
    "startend:quotation": lambda text, a: text + ".",
    "punctuation:no_period": lambda text, a: text + ".",
    "change_case:title_case": lambda text, a: text + " a",
    "combination:two_responses": lambda text, a: text.replace("******", ""),
    "detectable_format:code_block": lambda text, a: text.replace("```", ""),
    "keywords:letter_frequency": lambda text, a: text.replace(a["letter"], "").replace(a["letter"].upper(), ""),
    "detectable_content:numbers": lambda text, a: re.sub(r"\d", "", text),
    "detectable_content:number_placeholders": lambda text, a: text.replace("[", "("),
    "keywords:in_order": lambda text, a: re.sub(a["keywords"][1], "x", text, flags=re.I),
    "keywords:in_every_sentence": lambda text, a: text + " And more.",
    "keywords:start_end": lambda text, a: text + " more",
    "length_constraints:nth_paragraph_first_word": lambda text, a: "Hm " + text,
    "length_constraints:word_length": lambda text, a: text + " incomprehensible",
    "length_constraints:unique_words": lambda text, a: "one",
    "change_case:capital_word_frequency": lambda text, a: text.lower(),
    "combination:repeat_prompt": lambda text, a: "Hm. " + text,
}


@pytest.mark.parametrize("name", sorted({INSTRUCTIONS[n](random.Random(0), topic_named("running a library")).name for n in INSTRUCTIONS}))
def test_a_broken_instruction_is_found_in_every_turn(name):
    assert name in CHECKS
    wrong = []
    for row in rows():
        for turn, asked in enumerate(row["synth"]["check"]["turns"]):
            arguments = next((a["arguments"] for a in asked if a["name"] == name), None)
            if arguments is not None:
                copy = spoilt([row], lambda row: None)[0]
                message = copy["messages"][2 * turn + 1]
                message["content"] = BREAK[name](message["content"], arguments)
                wrong.append(copy)
    assert len(wrong) >= 5
    assert reasons("instructions", wrong) == {"instruction_broken": len(wrong)}


def unsay(row):
    row["messages"][0]["content"] = "Write something."


def lose_a_turn(row):
    del row["messages"][-2:]


def empty_answer(row):
    row["messages"][-1]["content"] = ""


def same_text(row):
    if len(row["messages"]) < 4:
        return False
    row["messages"][-1]["content"] = row["messages"][1]["content"]


WRONGS = {unsay: {"instruction_not_said"}, lose_a_turn: {"other_turns"}, empty_answer: {"instruction_broken"}, same_text: {"instruction_broken", "same_text"}}


@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    wrong = spoilt(rows(), spoil)
    assert len(wrong) >= 40 and set(reasons("instructions", wrong)) <= WRONGS[spoil]


def test_every_check_but_one_has_a_maker():
    made = {INSTRUCTIONS[n](random.Random(0), topic_named("running a library")).name for n in INSTRUCTIONS}
    assert set(CHECKS) - made == {"detectable_format:constrained_response"}  # three texts in all: nothing to make


def test_settings():
    assert {kind: settings.rows for kind, settings in configs_of("instructions").items()} == {"default": 10000, "tiny": 200}
    for bad in ({"fewest_instructions": 6}, {"fewest_instructions": 0}, {"most_turns": 0}):
        with pytest.raises(UserError):
            InstructionSettings(**bad)
    assert reason("instructions", rows()[0]) == ""
