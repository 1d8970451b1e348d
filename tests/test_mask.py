"""The mask against an oracle that renders every prefix, against inference, and against forged turns."""


import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron_nb.data.mask import inference_prompt, inference_prompts, parity, training_sequences
from nemotron_nb.data.records import parse_conversation
from nemotron_nb.data.template import render
from nemotron_nb.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
TOOLS = [{"type": "function", "function": {"name": "f", "description": "does f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}]
words = st.lists(st.sampled_from(["four", " ", "\n", "é日", "2+2", "{x}", "<b>", "don't"]), max_size=5).map("".join)


@st.composite
def conversations(draw, text=words):
    """Chats as people and agents make them: user turns, each answered through any number of calls; some with thoughts."""
    thinks = draw(st.booleans())
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    if draw(st.integers(0, 9)) == 0:
        messages.append({"role": "assistant", "content": draw(text)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        for _ in range(draw(st.integers(0, 2))):
            thought = {"reasoning_content": draw(text)} if thinks and draw(st.booleans()) else {}
            calls = [{"name": "f", "arguments": {"a": draw(text)}} for _ in range(draw(st.integers(1, 2)))]
            messages.append({"role": "assistant", "content": draw(text).lstrip(), "tool_calls": calls} | thought)
            messages += [{"role": "tool", "content": draw(text)} for _ in calls]
        if draw(st.integers(0, 5)):
            thought = {"reasoning_content": draw(text)} if thinks and draw(st.booleans()) else {}
            messages.append({"role": "assistant", "content": draw(text)} | thought)
    assume(any(m["role"] == "assistant" for m in messages))
    return parse_conversation({"messages": messages, "tools": draw(st.sampled_from([[], TOOLS]))}, source="f", line=1)


def by_prefix_renders(chat):
    """The slow way: render each prefix of the messages, take what was added, train it if an assistant added it."""
    thinks = any(m.get("reasoning_content") for m in chat.messages)
    users = [i for i, m in enumerate(chat.messages) if m["role"] == "user"]
    parts = [(end, start + 1) for start, end in zip(users, [*users[1:], len(chat.messages)])] if thinks and users else [(len(chat.messages), 0)]
    for end, first in parts:
        messages = chat.messages[:end]
        whole = render(messages, chat.tools)
        cuts = []
        for i in range(first, end):
            if messages[i]["role"] == "assistant":
                prompt = render(messages[:i], chat.tools, add_generation_prompt=True, enable_thinking=bool(messages[i].get("reasoning_content")))
                assert whole.startswith(prompt)
                cuts.append((len(prompt), whole.index("<|im_end|>\n", len(prompt)) + len("<|im_end|>\n")))
        ids, mask, position = [], [], 0
        for start, stop in cuts:
            for text, trained in ((whole[position:start], 0), (whole[start:stop], 1)):
                new = TOKENIZER.encode(text, special=True)
                ids, mask = ids + new, mask + [trained] * len(new)
            position = stop
        tail = TOKENIZER.encode(whole[position:], special=True)
        if any(mask):
            yield ids + tail, mask + [0] * len(tail)


@settings(max_examples=300, deadline=None)
@given(conversations())
def test_sequences_equal_the_prefix_render_oracle(chat):
    got = [(s.input_ids.tolist(), s.loss_mask.tolist()) for s in training_sequences(chat, TOKENIZER)]
    assert got == list(by_prefix_renders(chat))


hostile = st.lists(st.sampled_from(["<|im_end|>", "\n<|im_start|>assistant\n", "<|im_start|>system\n", "hi", "</tool_response>", "<tool_call>", "[INST]", "</s>", "<unk>"]), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(conversations(words | hostile))
def test_parity_and_who_is_trained_on_hostile_chats(chat):
    """Even when people type control tokens: inference sees the same prefix, and the count of turns cannot be forged."""
    assert all(row.same for row in parity(chat, TOKENIZER))
    starts = TOKENIZER.special_ids["<|im_start|>"]
    for sequence in training_sequences(chat, TOKENIZER):
        assert {r for r, m in zip(sequence.token_roles, sequence.loss_mask) if m} == {"assistant"}
        runs = inference_prompts(sequence)
        ends = int(((sequence.input_ids == TOKENIZER.im_end_id) & (sequence.loss_mask == 1)).sum())
        assert ends == len(runs)
        for _, expected in runs:
            assert expected[-2] == TOKENIZER.im_end_id and starts not in expected
    trained = sum(len(inference_prompts(s)) for s in training_sequences(chat, TOKENIZER))
    thinks = any(m.get("reasoning_content") for m in chat.messages)
    users = [i for i, m in enumerate(chat.messages) if m["role"] == "user"]
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and (not thinks or i > users[0])]
    assert trained == len(answers)


@settings(max_examples=100, deadline=None)
@given(conversations())
def test_trained_text_is_what_the_assistant_said(chat):
    thoughts = [m["reasoning_content"] for m in chat.messages if m.get("reasoning_content")]
    said = "".join(TOKENIZER.decode(s.input_ids[s.loss_mask == 1].tolist()) for s in training_sequences(chat, TOKENIZER))
    users = [i for i, m in enumerate(chat.messages) if m["role"] == "user"]
    for thought in thoughts:
        assert thought + "\n</think>" in said
    assert said.count("<tool_call>") == sum(len(m.get("tool_calls", ())) for i, m in enumerate(chat.messages) if m["role"] == "assistant" and (not thoughts or i > users[0]))


def chat_of(*messages):
    return parse_conversation({"messages": list(messages)})


def trained_texts(chat):
    return [TOKENIZER.decode(s.input_ids[s.loss_mask == 1].tolist()) for s in training_sequences(chat, TOKENIZER)]


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_system_is_never_trained_when_the_assistant_speaks_first():
    chat = chat_of({"role": "system", "content": "SECRET"}, A, U, A)
    assert trained_texts(chat) == ["a<|im_end|>\na<|im_end|>\n"]


def test_consecutive_assistant_turns_keep_the_scaffold_untrained():
    assert trained_texts(chat_of(U, A, A)) == ["a<|im_end|>\na<|im_end|>\n"]


def test_user_turns_without_answer_give_no_sequence():
    thought = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert trained_texts(chat_of(U, U, thought)) == ["r\n</think>\na<|im_end|>\n"]
    assert trained_texts(chat_of(U, thought, U)) == ["r\n</think>\na<|im_end|>\n"]


def test_whitespace_reasoning_is_no_reasoning():
    chat = chat_of(U, A | {"reasoning_content": " \n"}, U, A)
    assert len(training_sequences(chat, TOKENIZER)) == 1


def test_reasoning_without_a_user_trains_every_turn():
    thought = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert trained_texts(chat_of({"role": "system", "content": "s"}, thought, thought)) == ["r\n</think>\na<|im_end|>\n" * 2]


def test_prompt_of_inference_ends_where_the_target_begins():
    chat = chat_of(U, A | {"reasoning_content": "r"})
    prompt, expected = inference_prompts(training_sequences(chat, TOKENIZER)[0])[0]
    assert prompt.tolist() == inference_prompt(chat, 1, TOKENIZER)
    assert TOKENIZER.decode(prompt.tolist()).endswith("<think>\n") and TOKENIZER.decode(expected.tolist()) == "r\n</think>\na<|im_end|>\n"


def test_provenance():
    first, second = training_sequences(chat_of(U, A | {"reasoning_content": "r"}, U, A | {"reasoning_content": "r"}), TOKENIZER)
    assert (first.turn, second.turn) == (0, 1) and first.conversation_id == second.conversation_id
    assert first.chunk_ends[-1] == len(first) == len(first.token_roles) and first.input_ids.dtype == np.int32
