"""Reasoning control: decisions hang on the chat alone, cuts are exact, and nothing is changed that should not be."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.mask import training_sequences
from nemotron_nb.data.prep import assign_splits
from nemotron_nb.data.reasoning import (
    NANO,
    SUPER,
    SUPER_BUDGET,
    ReasoningPolicy,
    apply_reasoning,
    binomial_range,
    control_reasoning,
    cut_thought,
    cut_thought_by_hand,
    decide,
    draw_budget,
    low_effort_flag,
    reasoning_policy,
    thoughts,
)
from nemotron_nb.data.records import BadRecord, parse_conversation
from nemotron_nb.data.template import render
from nemotron_nb.data.tokenizer import chat_tokenizer, load_tokenizer, train_tokenizer

TINY = load_tokenizer("tiny")
TEXT = st.text(st.one_of(st.sampled_from("ab \n.1Zéß你好🧑\u200d🚀\u0301<|\ufffd"), st.characters(codec="utf-8")), max_size=60)
CALL = {"name": "f", "arguments": {"x": 1}}


def chat(*turns, **more):
    """A chat of (question, thought, answer) turns."""
    messages = []
    for question, thought, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})]
    return parse_conversation({"messages": messages, **more})


def many(number):
    return [chat((f"question {i}", f"thought number {i} is a long one, {i} words and more " * (1 + i % 4), f"answer {i}")) for i in range(number)]


def count(text):
    return len(TINY.encode(text, special=False))


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(0, 70))
def test_a_cut_is_a_beginning_of_whole_characters_within_the_budget_and_the_longest_made_of_first_tokens(thought, budget):
    kept = cut_thought(thought, budget, TINY)
    assert thought.startswith(kept) and count(kept) <= budget and kept.encode("utf-8").decode() == kept
    assert kept == cut_thought_by_hand(thought, budget, TINY)
    assert (kept == thought) == (count(thought) <= budget) or not thought


def test_letters_that_need_more_tokens_without_half_of_the_next_one_do_not_break_the_budget():
    letters = "àáâãäåæçèéêëìíîï"
    odd = chat_tokenizer(train_tokenizer(["b" + x for x in letters] + ["ab" + x for x in letters], 276), "odd")
    assert [len(odd.encode(text, special=False)) for text in ("ab", "abä", "abäabä")] == [2, 2, 4]
    for text in ("abä", "abäabä", "xabäb"):
        for budget in range(6):
            kept = cut_thought(text, budget, odd)
            assert kept == cut_thought_by_hand(text, budget, odd) and text.startswith(kept) and len(odd.encode(kept, special=False)) <= budget


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4), st.integers(0, 5))
def test_a_cut_chat_keeps_its_answers_states_its_budget_and_no_thought_exceeds_it(turns, seed):
    try:
        before = chat(*turns)
    except BadRecord:
        return
    after, change = apply_reasoning(before, ReasoningPolicy(truncate_fraction=1.0, seed=seed), TINY)
    assert (after.id, after.tools, len(after.messages)) == (before.id, before.tools, len(before.messages))
    assert [m | {"reasoning_content": ""} for m in after.messages] == [m | {"reasoning_content": ""} for m in before.messages]
    if change is None or change.action == "skipped":
        assert after is before
        assert bool(thoughts(before)) == (change is not None)
        assert change is None or max(map(count, thoughts(before))) <= 1 or not all(t[0].isascii() for t in thoughts(before)) or any(t[0].isspace() for t in thoughts(before))
        return
    assert change.budget == after.reasoning_budget >= 1
    assert all(count(t) <= change.budget for t in thoughts(after)) and len(thoughts(after)) == len(thoughts(before))
    assert all(whole.startswith(cut) for whole, cut in zip(thoughts(before), thoughts(after), strict=True))
    assert all(cut == whole for whole, cut in zip(thoughts(before), thoughts(after), strict=True) if count(whole) <= change.budget)
    assert thoughts(after) != thoughts(before) and sum(map(count, thoughts(after))) == change.tokens_after
    assert f"{{thinking token budget: {change.budget}}}<|im_end|>" in render(after.messages, reasoning_budget=after.reasoning_budget)


def test_training_sees_the_budget_in_each_turn_that_thinks_and_no_thought_beyond_it():
    before = chat(("q", "one two three four five six", "a"), ("r", "", "b"), ("s", "seven eight nine ten", "c"))
    after, change = apply_reasoning(before, ReasoningPolicy(truncate_fraction=1.0, seed=2), TINY)
    sequences = [TINY.decode(q.input_ids.tolist()) for q in training_sequences(after, TINY)]
    stated = f"\n\n{{thinking token budget: {change.budget}}}<|im_end|>"
    assert [stated in text for text in sequences] == [True, False, True] and all(text.count(stated) <= 1 for text in sequences)
    for text, thought in zip((sequences[0], sequences[2]), thoughts(after), strict=True):
        assert f"<think>\n{thought}\n</think>" in text
    stripped, _ = apply_reasoning(before, ReasoningPolicy(strip_fraction=1.0), TINY)
    [off] = [TINY.decode(q.input_ids.tolist()) for q in training_sequences(stripped, TINY)]
    assert off.count("<think></think>") == 3 and "budget" not in off


def test_a_budget_smaller_than_the_first_character_is_raised_rather_than_kept_by_an_empty_thought():
    for seed in range(30):
        after, change = apply_reasoning(chat(("q", "🚀🚀🚀 and on and on", "a")), ReasoningPolicy(truncate_fraction=1.0, max_budget=2, seed=seed), TINY)
        assert thoughts(after) == ["🚀"] and change.budget == 4


def test_decisions_hang_on_the_chat_alone():
    chats, policy = many(120), ReasoningPolicy(strip_fraction=0.3, truncate_fraction=0.3, seed=3)
    forward = {c.id: pair for c in chats for pair in [apply_reasoning(c, policy, TINY)]}
    backward, _ = control_reasoning(chats[::-1], policy, TINY)
    assert {c.id: c for c in backward} == {i: c for i, (c, _) in forward.items()}
    alone = {c.id: apply_reasoning(c, policy, TINY) for part in (chats[7:20], chats[::13]) for c in part}
    assert all(forward[i] == pair for i, pair in alone.items())
    assert {p[1].action for p in forward.values() if p[1]} == {"stripped", "cut"}


def test_another_process_decides_the_same():
    code = "from nemotron_nb.data.reasoning import *; import json; print(json.dumps([decide(str(i), NANO) for i in range(300)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)})
    assert json.loads(done.stdout) == [decide(str(i), NANO) for i in range(300)]


def test_shares_are_met_decisions_exclude_each_other_and_do_not_follow_the_split():
    ids = [f"id {i}" for i in range(20_000)]
    fates = {i: decide(i, NANO) for i in ids}
    for name, share in (("strip", 0.10), ("cut", 0.03), ("keep", 0.87)):
        low, high = binomial_range(len(ids), share, 0.9999)
        assert low <= sum(f == name for f in fates.values()) <= high
    split = assign_splits(ids, {"train": 0.9, "valid": 0.0, "test": 0.1}, NANO.seed)
    test = [i for i in ids if split[i] == "test"]
    low, high = binomial_range(len(test), 0.10, 0.9999)
    assert low <= sum(fates[i] == "strip" for i in test) <= high
    assert sum(fates[i] != decide(i, dataclasses.replace(NANO, seed=1)) for i in ids) > 1000
    assert {i for i in ids if decide(i, SUPER) == "strip"} < {i for i in ids if fates[i] == "strip"}


def test_stripped_chats_render_in_the_mode_off():
    before = chat(("q", "why", "a"), ("r", "how", "b"), reasoning_content="no")
    after, change = apply_reasoning(before, ReasoningPolicy(strip_fraction=1.0), TINY)
    assert thoughts(after) == [] and change.tokens_before == count("why") + count("how") and change.tokens_after == 0
    assert after.reasoning_budget is None and "<think>\n" not in render(after.messages)
    assert all("reasoning_content" not in m for m in after.messages) and thoughts(before) == ["why", "how"]


def test_low_effort_is_marked_in_the_last_user_turn_of_each_sequence_may_be_cut_and_is_never_stripped():
    before = chat(("q", "one two three four", "a"), ("r", "five six seven", "b"))
    marked, change = apply_reasoning(before, ReasoningPolicy(strip_fraction=1.0), TINY, low_effort=True)
    assert change.action == "marked" and thoughts(marked) == thoughts(before)
    assert marked.messages == before.messages
    asked = "\n\n{reasoning effort: low}<|im_end|>"
    first, second = (TINY.decode(s.input_ids.tolist()) for s in training_sequences(marked, TINY))
    assert f"q{asked}" in first and first.count(asked) == 1 and "q<|im_end|>" in second and f"r{asked}" in second and second.count(asked) == 1
    cut, change = apply_reasoning(before, ReasoningPolicy(truncate_fraction=1.0), TINY, low_effort=True)
    assert (change.action, change.low_effort) == ("cut", True) and change.variant.endswith("-low")
    assert f"r\n\n{{reasoning effort: low}}\n\n{{thinking token budget: {change.budget}}}<|im_end|>" in render(cut.messages, reasoning_budget=change.budget, low_effort_marker=cut.low_effort_marker)
    assert change.tokens_after == sum(map(count, thoughts(cut)))


def test_what_was_chosen_and_cannot_be_changed_is_said():
    policy = ReasoningPolicy(strip_fraction=0.0, truncate_fraction=1.0)
    no_user = parse_conversation({"messages": [{"role": "assistant", "reasoning_content": "one two", "content": "a"}]})
    budgeted = dataclasses.replace(chat(("q", "one two", "a")), reasoning_budget=5)
    for case, words in ((no_user, "no user turn"), (budgeted, "already"), (chat(("q", "1", "a")), "longer than 1")):
        same, change = apply_reasoning(case, policy, TINY)
        assert same is case and change.action == "skipped" and words in change.why
    same, change = apply_reasoning(chat(("q", "", "a")), policy, TINY, low_effort=True)
    assert change.why == "there is no thought in it"
    assert apply_reasoning(chat(("q", "", "a")), policy, TINY)[1] is None
    with pytest.raises(UserError, match="no id"):
        apply_reasoning(dataclasses.replace(chat(("q", "w", "a")), id=""), policy, TINY)


def test_reports_count_by_source_and_compare_shares():
    chats = [dataclasses.replace(c, source="ab"[i % 2]) for i, c in enumerate(many(200))]
    done, report = control_reasoning(iter(chats), ReasoningPolicy(strip_fraction=0.2, truncate_fraction=0.2), TINY, lambda c: int(c.messages[0]["content"].split()[1]) < 10)
    rows = {r["what"]: r for r in report.shares()}
    assert (report.chats, report.with_thought, report.low_effort, rows["strip"]["of"], rows["cut"]["of"]) == (200, 200, 10, 190, 200)
    assert sum(r["stripped"] for r in report.by_source()) == rows["strip"]["found"] == sum(not thoughts(c) for c in done)
    assert rows["cut"]["found"] == sum(c.reasoning_budget is not None for c in done) and "low effort" in repr(report)


def test_the_flag_of_a_row_wins_over_its_source_and_must_be_true_or_false():
    policy = ReasoningPolicy(low_effort_sources=("fast",))
    assert low_effort_flag({}, "fast", policy) and not low_effort_flag({}, "slow", policy)
    assert low_effort_flag({"low_effort": True}, "slow", policy) and not low_effort_flag({"low_effort": False}, "fast", policy)
    for wrong in ("yes", 1, 0.0, []):
        with pytest.raises(BadRecord, match="low_effort"):
            low_effort_flag({"low_effort": wrong}, "fast", policy)


def test_published_presets():
    assert (NANO.strip_fraction, NANO.truncate_fraction, NANO.low_effort_fraction) == (0.10, 0.03, 0.0)
    assert (SUPER.strip_fraction, SUPER.truncate_fraction, SUPER.low_effort_fraction) == (0.03, 0.0, 0.02)
    assert (SUPER_BUDGET.strip_fraction, SUPER_BUDGET.truncate_fraction) == (0.0, 0.12)
    with pytest.raises(UserError, match="did you mean 'super'"):
        reasoning_policy("supr")


@pytest.mark.parametrize(
    "wrong",
    [
        {"strip_fraction": -0.1},
        {"truncate_fraction": math.nan},
        {"low_effort_fraction": 2},
        {"strip_fraction": 0.6, "truncate_fraction": 0.6},
        {"min_budget": 0},
        {"min_budget": 9, "max_budget": 8},
        {"budget_scale": "lg"},
        {"low_effort_marker": " "},
        {"strip_fraction": "0.1"},
        {"strip": 0.1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        from_mapping(ReasoningPolicy, wrong)


@given(st.integers(1, 5000), st.integers(1, 50), st.integers(0, 5000), st.floats(0, 1, exclude_max=True), st.sampled_from(["uniform", "log"]))
def test_budgets_lie_within_the_policy_and_below_the_longest_thought(longest, low, more, position, scale):
    policy = ReasoningPolicy(min_budget=low, max_budget=low + more, budget_scale=scale)
    budget = draw_budget(longest, policy, position)
    assert (budget is None) == (longest <= low)
    assert budget is None or low <= budget <= min(low + more, longest - 1)


@pytest.mark.parametrize("scale", ["uniform", "log"])
def test_every_budget_of_a_small_range_is_drawn(scale):
    policy = ReasoningPolicy(min_budget=2, max_budget=9, budget_scale=scale)
    assert {draw_budget(8, policy, i / 1000) for i in range(1000)} == set(range(2, 8))


@given(st.integers(1, 300), st.floats(0.001, 0.999), st.sampled_from([0.8, 0.99]))
def test_binomial_range_is_the_exact_quantile(trials, probability, confidence):
    mass = [math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(trials + 1)]
    low, high = binomial_range(trials, probability, confidence)
    tail = (1 - confidence) / 2
    assert sum(mass[:low]) <= tail + 1e-9 <= sum(mass[: low + 1]) + 2e-9
    assert sum(mass[:high]) <= 1 - tail + 1e-9 and sum(mass[: high + 1]) >= 1 - tail - 1e-9
