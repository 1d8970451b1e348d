"""Held-out loss, prompts, generation, and the strict reading of turns and tool calls."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.data.mask import inference_prompts, training_sequences
from nemotron_nb.data.pack import make_pack
from nemotron_nb.data.records import read_chats
from nemotron_nb.data.sample import sample_path
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.train.batches import global_batch
from nemotron_nb.train.evaluate import Health, ToolCall, evaluate, example_of, generate, health, held_out_loss, prompts_of, read_calls, roles_of, token_losses
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

CONFIG = ModelConfig(hidden_size=32, mamba_heads=2, expert_size=16, experts=4, attention_heads=2, init_std=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return [s for c in list(read_chats(sample_path()))[:40] for s in training_sequences(c, tokenizer)]


@pytest.fixture(scope="module")
def packs(sequences):
    parts = [sequences[i : i + 5] for i in range(0, 20, 5)]
    return [make_pack([s.input_ids for s in p], [s.loss_mask for s in p], [s.conversation_id for s in p]) for p in parts]


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(CONFIG, tokenizer.vocab_size)


def call(name="calculator", **arguments):
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>\n"


# ---- tool calls


@pytest.mark.parametrize("answer, expected", [
    ("", []),
    ("Plain text, 3 < 4, <b>bold</b>.", []),
    (call(a=1, b=2), [ToolCall("calculator", {"a": "1", "b": "2"})]),
    ("One moment.\n" + call(a=1), [ToolCall("calculator", {"a": "1"})]),
    ("\n" + call("now"), [ToolCall("now", {})]),
    (call("f", x=""), [ToolCall("f", {"x": ""})]),
    (call("f", x="\n\n"), [ToolCall("f", {"x": "\n\n"})]),
    (call("f", x="two\nlines"), [ToolCall("f", {"x": "two\nlines"})]),
    (call("f", x='{"deep": [1, {"k": "</p>"}]}'), [ToolCall("f", {"x": '{"deep": [1, {"k": "</p>"}]}'})]),
    (call("f", x="say </parameter> inline"), [ToolCall("f", {"x": "say </parameter> inline"})]),
    (call("f", x="x <tool_call> in the middle of a line"), [ToolCall("f", {"x": "x <tool_call> in the middle of a line"})]),
    (call("f", x="<think>\n"), [ToolCall("f", {"x": "<think>\n"})]),
    (call("a.b-c_d", x=1) * 3, [ToolCall("a.b-c_d", {"x": "1"})] * 3),
    (call("f", x="日本語 🙂 \u2028 \x00"), [ToolCall("f", {"x": "日本語 🙂 \u2028 \x00"})]),
])
def test_calls_that_can_be_read(answer, expected):
    assert read_calls(answer) == expected


@pytest.mark.parametrize("answer", [
    "text" + call(a=1),
    call(a=1) + "text",
    call(a=1) + "\n" + call(a=1),
    call(a=1)[:-1],
    call(a=1).replace("</tool_call>\n", ""),
    call(a=1).replace("</function>\n", ""),
    call(a=1).replace("\n</parameter>", "</parameter>"),
    call(a=1).replace("1\n", "1\n\n</function>\n"),
    call(a=1).replace("<parameter=a>\n", "<parameter=a>"),
    call(a=1, b=2).replace("1\n</parameter>\n", "1\n"),
    call("f", x="</parameter>\n<parameter=y>\n2"),
    call("f", x="</function>"),
    call("f", x="fine\n</tool_call>"),
    call("f", x="1") .replace("<parameter=x>", "<parameter=>"),
    call("f g", x=1),
    call("f", x=1).replace("x>", "x y>"),
    call("", x=1),
    call("f=g", x=1),
    call("f", x=1).replace("<parameter=x>\n1\n</parameter>\n", "<parameter=x>\n1\n</parameter>\n" * 2),
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n',
    "<tool_call>",
    "</tool_call>",
    "\n<function=f>\n</function>\n",
    "<tool_call>\n" + call("f"),
    call("f").replace("\n", "\r\n"),
    call("f").replace("<tool_call>", "<TOOL_CALL>").replace("f>", "f>"),
])
def test_calls_that_cannot_be_read_in_one_way_only(answer):
    assert read_calls(answer) is None


@settings(max_examples=200, deadline=None)
@given(name=st.from_regex(r"[a-z_]{1,8}", fullmatch=True), arguments=st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.text(max_size=40), max_size=4))
def test_what_the_format_writes_is_read_back(name, arguments):
    if not any("</parameter>" in v or v.startswith("<") or "\n<" in v for v in arguments.values()):
        assert read_calls(call(name, **arguments)) == [ToolCall(name, arguments)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>", "\n", "x", "<", ">", "</think>"]), max_size=30).map("".join))
def test_any_text_gets_an_answer(text):
    found = read_calls(text)
    assert found is None or all(isinstance(c, ToolCall) for c in found)


def test_hostile_text_is_read_in_linear_time():
    started = time.perf_counter()
    for text in ("<tool_call>\n<function=f>\n<parameter=a>\n" * 20_000, "<" * 500_000, call(a="x\n" * 200_000), "<tool_call>\n<function=" + "f" * 500_000):
        read_calls(text)
    assert time.perf_counter() - started < 5


# ---- turns

THOUGHT = "It is large.\n</think>\n"


@pytest.mark.parametrize("prompt, generated, expects_call, ended, expected, well_formed", [
    ("<think>\n", THOUGHT + "It is 4.", False, True, (True, None, True, True), True),
    ("<think>\n", THOUGHT + call(a=1), True, True, (True, True, True, True), True),
    ("<think>\n", THOUGHT + "See.\n" + call(a=1), True, True, (True, True, True, True), True),
    ("<think></think>", "It is 4.", False, True, (True, None, True, True), True),
    ("<think></think>", "\n" + call(a=1), True, True, (True, True, True, True), True),
    ("<think>\n", "It is 4.", False, True, (False, None, True, True), False),
    ("<think>\n", THOUGHT + THOUGHT, False, True, (False, None, True, True), False),
    ("<think>\n", "<think>" + THOUGHT + "4", False, True, (False, None, True, True), False),
    ("<think></think>", THOUGHT + "4", False, True, (False, None, True, True), False),
    ("<think></think>", "<think>\n4", False, True, (False, None, True, True), False),
    ("<think>\n", THOUGHT + "It is 4.", True, True, (True, None, True, False), True),
    ("<think>\n", THOUGHT + call(a=1), False, True, (True, True, True, False), True),
    ("<think>\n", THOUGHT + call(a=1)[:-3], True, True, (True, False, True, True), False),
    ("<think>\n", THOUGHT + call(a=1)[:-3], False, True, (True, False, True, False), False),
    ("<think>\n", call(a=1) + THOUGHT + "4", False, True, (True, None, True, True), True),
    ("<think>\n", call(a=1) + THOUGHT + "4", True, True, (True, None, True, False), True),
    ("<think>\n", THOUGHT + "It is 4.", False, False, (True, None, False, True), False),
    ("<think>\n", "", False, True, (False, None, True, True), False),
    ("the user wrote <think>\nhi<|im_end|>\n<|im_start|>assistant\n<think></think>", "4", False, True, (True, None, True, True), True),
])
def test_health(prompt, generated, expects_call, ended, expected, well_formed):
    found = health(prompt, generated, expects_call, ended)
    assert found == Health(*expected) and found.well_formed == well_formed


def test_every_reference_of_the_sample_is_well_formed(tokenizer, sequences):
    for sequence in sequences:
        for prompt, expected in inference_prompts(sequence):
            said = tokenizer.decode(expected.tolist()).removesuffix("\n").removesuffix("<|im_end|>")
            assert health(tokenizer.decode(prompt.tolist()), said, "<tool_call>" in said, True) == Health(True, True if "<tool_call>" in said else None, True, True)


# ---- prompts, roles, generation


def test_prompts_equal_those_of_the_data_side(packs, sequences):
    rows = global_batch(packs).rows
    assert len(rows) == 20
    for row, sequence in zip(rows, sequences):
        theirs = [(p.tolist(), e.tolist()) for p, e in inference_prompts(sequence)]
        assert [(list(p), list(e)) for p, e in prompts_of(row)] == theirs


def test_roles_equal_those_of_the_chunks(tokenizer, sequences):
    for sequence in sequences:
        assert roles_of(tokenizer.pieces(sequence.input_ids.tolist())) == sequence.token_roles


def by_hand(model, prompt, end, count):
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def test_generation_equals_the_whole_row_again_for_every_token(model, packs, tokenizer):
    prompts = [p for row in global_batch(packs).rows[:5] for p, _ in prompts_of(row)]
    free = [by_hand(model, p, -1, 12) for p in prompts]
    end = free[0][5]  # a token that really occurs, so that some row ends early
    expected = [by_hand(model, p, end, 12) for p in prompts]
    assert len({len(e) for e in expected}) > 1 and len({tuple(f) for f in free}) > 1
    for cap in (1, 700, 100_000):
        assert generate(model, prompts, end, 12, max_tokens=cap) == expected


def test_token_losses_stand_at_the_token_they_judge(model, packs):
    row = global_batch(packs).rows[0]
    losses = token_losses(model, row)
    ids = [*row.tokens.tolist(), int(row.labels[-1])]
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    for t in range(len(ids)):
        if t and row.mask[t - 1]:
            assert losses[t] == pytest.approx(-log_p[t - 1, ids[t]].item(), abs=1e-4)
        else:
            assert losses[t] is None


def test_held_out_loss_is_the_mean_over_all_and_not_over_batches(model, packs):
    every = [[n for n in token_losses(model, r) if n is not None] for r in global_batch(packs).rows]
    for cap in (1, 1500, 100_000):
        found = held_out_loss(model, packs, cap)
        assert found.loss_token == pytest.approx(np.mean(np.concatenate(every)), abs=1e-4)
        assert found.loss_sample == pytest.approx(np.mean([np.mean(e) for e in every]), abs=1e-4)
        assert (found.trained_tokens, found.conversations) == (sum(map(len, every)), len(every))


def test_the_record(model, packs, tokenizer):
    found = evaluate(model, packs, tokenizer, 7, num_generations=5, max_new_tokens=4)
    assert found["step"] == 7 and found["num_generations"] == len(found["generations"]) == 5 and found["well_formed_rate"] == 0
    first = found["generations"][0]
    assert first["prompt"].endswith(("<think>\n", "<think></think>")) and first["expected"].endswith("<|im_end|>\n")
    example = found["example"]
    assert len(example["pieces"]) == len(example["roles"]) == len(example["trained"]) == len(example["nll"])
    assert [n is not None for n in example["nll"]] == [bool(t) for t in example["trained"]]
    assert "<tool_call>" in [p for p, t in zip(example["pieces"], example["trained"]) if t]


def test_the_example_is_the_shortest_when_nobody_calls(model, packs, tokenizer):
    rows = [r for r in global_batch(packs).rows if tokenizer.special_ids["<tool_call>"] not in r.labels[r.mask]]
    assert len(example_of(model, rows, tokenizer)["pieces"]) == min(map(len, rows)) + 1
