"""The mask against an oracle that renders every prefix, against inference, against forged turns; and the fast way against the slow one."""

import dataclasses
import importlib.util

import numpy as np
import pytest
from chats import conversations, hostile, words
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data.encoder import make_encoder, table_folder
from nemotron_nb.data.mask import (
    LOSS_MODES,
    Draft,
    drafts,
    encode_chunks,
    encode_drafts,
    inference_prompt,
    inference_prompts,
    is_trained,
    mask_diff,
    mask_rows,
    parity,
    parity_panel,
    sequence_plans,
    trained_fractions,
    training_sequences,
)
from nemotron_nb.data.records import parse_conversation
from nemotron_nb.data.template import Chunk, render
from nemotron_nb.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
# by segments of plain text; and by whole chunks, for the encoder that finds special tokens itself
ENCODERS = [None, *([make_encoder(TOKENIZER, "numba", cache_dir=table_folder())] if importlib.util.find_spec("numba") else [])]
modes = st.sampled_from(LOSS_MODES)


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


def answers(chat, mode):
    """The messages to be trained, said in other words than the library says it."""
    users = [i for i, m in enumerate(chat.messages) if m["role"] == "user"]
    thinks = any(m.get("reasoning_content") for m in chat.messages)
    answered = [i for i in users if any(m["role"] == "assistant" for m in chat.messages[i:])]
    first = 0 if not users else (answered or [0])[-1] if mode == "last_turn" else users[0] if thinks else 0
    return [i for i, m in enumerate(chat.messages) if i >= first and m["role"] == "assistant" and m.get("train") is not False]


@settings(max_examples=300, deadline=None)
@given(conversations(words | hostile, flags=True, budgets=True), modes)
def test_what_is_trained_is_what_the_model_must_write_and_nothing_else(chat, mode):
    """Each trained run, decoded, is the answer as inference would have to produce it; even when people type control tokens."""
    sequences = training_sequences(chat, TOKENIZER, loss_mode=mode)
    must = []
    for i in answers(chat, mode):
        prompt = render(chat.messages[:i], chat.tools, add_generation_prompt=True, enable_thinking=bool(chat.messages[i].get("reasoning_content")))
        must.append(render(chat.messages[: i + 1], chat.tools).removeprefix(prompt))
    said = [TOKENIZER.decode(expected.tolist()) for s in sequences for _, expected in inference_prompts(s)]
    assert said == must
    for s in sequences:
        assert {r for r, m in zip(s.token_roles, s.loss_mask) if m} == {"assistant"}
        trained = s.input_ids[s.loss_mask == 1].tolist()
        assert trained.count(TOKENIZER.im_end_id) == len(inference_prompts(s)) and TOKENIZER.special_ids["<|im_start|>"] not in trained


@settings(max_examples=200, deadline=None)
@given(conversations(words | hostile, flags=True, budgets=True), modes)
def test_parity_for_every_trained_turn(chat, mode):
    rows = parity(chat, TOKENIZER, mode)
    assert [row.message for row in rows] == answers(chat, mode)
    assert all(row.same for row in rows)


@settings(max_examples=120, deadline=None)
@given(st.lists(conversations(words | hostile, flags=True, budgets=True), min_size=1, max_size=3), modes, st.booleans())
def test_drafts_encoded_together_equal_the_slow_way(chats, mode, allow):
    slow = [s for c in chats for s in training_sequences(c, TOKENIZER, loss_mode=mode, allow_special_in_text=allow)]
    made = [d for c in chats for d in drafts(c, mode)]
    for encoder in ENCODERS:
        fast = encode_drafts(made, TOKENIZER, encoder, allow_special_in_text=allow)
        assert fast.input_ids.tolist() == [i for s in slow for i in s.input_ids.tolist()]
        assert fast.loss_mask.tolist() == [m for s in slow for m in s.loss_mask.tolist()]
        assert fast.offsets.tolist() == np.cumsum([0, *map(len, slow)]).tolist() and [d.turn for d in made] == [s.turn for s in slow]
        assert (fast.input_ids.dtype, fast.loss_mask.dtype, fast.offsets.dtype) == (np.int32, np.uint8, np.int64)


@settings(max_examples=100, deadline=None)
@given(conversations(flags=True))
def test_no_message_is_rendered_more_than_twice(chat):
    for message in range(-1, len(chat.messages)):
        forms = {id(c) for d in drafts(chat) for c in d.chunks if c.message == message and c.generated == (message >= 0 and chat.messages[message]["role"] == "assistant")}
        assert len(forms) <= 2


class Recorder:
    """An encoder that remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def encode(self, texts):
        self.calls.append(list(texts))
        rows = [TOKENIZER.encode(t, special=False) for t in texts]
        return np.array([i for row in rows for i in row], np.int32), np.cumsum([0, *map(len, rows)], dtype=np.int64)


def test_one_call_encodes_each_distinct_segment_once():
    thought = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    chat, encoder = chat_of(U, thought, U, thought, U, thought), Recorder()
    got = encode_drafts(drafts(chat) * 3, TOKENIZER, encoder)
    (texts,) = encoder.calls
    assert len(texts) == len(set(texts)) < 12 and not any("<|" in t or t == "" for t in texts)
    assert got.input_ids.tolist() == 3 * [i for s in training_sequences(chat, TOKENIZER) for i in s.input_ids.tolist()]


def test_pieces_merge_as_in_the_tokenizer():
    """A special token across two trusted pieces is one; across talk and format it is text; plain text merges over pieces."""
    for pieces in (
        (("<|im_", True), ("end|>", True)),
        (("<|im_", False), ("end|>", True)),
        (("ab", False), ("cd", True), ("ef", False), ("<|im_end|>", True), ("gh", False)),
        (("", False), ("", True)),
        (("x" * 300 + "<|im_end|>", True), ("<|im_end|>", False)),
    ):
        parts = (Chunk("user", pieces), Chunk("assistant", (("a", True),), True))
        slow = encode_chunks(parts, (False, True), TOKENIZER)
        fast = encode_drafts([Draft(parts, (False, True), 0)], TOKENIZER)
        assert fast.input_ids.tolist() == slow.input_ids.tolist() and fast.loss_mask.tolist() == slow.loss_mask.tolist()


def test_nothing_to_encode():
    empty = encode_drafts([], TOKENIZER)
    assert len(empty) == 0 and len(empty.input_ids) == len(empty.loss_mask) == 0 and empty.offsets.tolist() == [0]


def chat_of(*messages):
    return parse_conversation({"messages": list(messages)})


def trained_texts(chat, **settings):
    return [TOKENIZER.decode(s.input_ids[s.loss_mask == 1].tolist()) for s in training_sequences(chat, TOKENIZER, **settings)]


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


def test_modes_and_flags():
    thought = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    plain, thinking = chat_of(U, A, U, A | {"content": "b"}), chat_of(U, thought, U, thought | {"content": "b"})
    assert [trained_texts(c, loss_mode="last_turn") for c in (plain, thinking)] == [["b<|im_end|>\n"], ["r\n</think>\nb<|im_end|>\n"]]
    assert trained_texts(chat_of(U, A, U), loss_mode="last_turn") == trained_texts(chat_of(U, A, U, U), loss_mode="last_turn") == ["a<|im_end|>\n"]
    assert trained_texts(chat_of(U, A | {"content": "first"}, U, A, U), loss_mode="last_turn") == ["a<|im_end|>\n"]
    assert trained_texts(chat_of(U, A, U, A | {"train": False}, U), loss_mode="last_turn") == []
    for mode in ("all", "flags"):
        assert trained_texts(chat_of(U, A | {"train": False}, U, A | {"content": "b"}), loss_mode=mode) == ["b<|im_end|>\n"]
        assert trained_texts(chat_of(U, thought | {"train": False}, U, thought | {"train": True}), loss_mode=mode) == ["r\n</think>\na<|im_end|>\n"]
    assert trained_texts(chat_of(U, A, U, A | {"train": False}), loss_mode="last_turn") == []
    assert [p.turn for p in sequence_plans(thinking, "last_turn")] == [1] and is_trained({"role": "assistant", "train": True})
    with pytest.raises(UserError, match="did you mean 'last_turn'"):
        drafts(plain, "lastturn")


def test_budget_is_told_where_a_thought_is_trained():
    thought = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    chat = dataclasses.replace(chat_of(U, thought, U, A, U, thought | {"train": False}, A), reasoning_budget=7)
    told = ["".join(c.text for c in d.chunks) for d in drafts(chat)]
    assert [t.count("{thinking token budget: 7}") for t in told] == [1, 0, 0]
    assert "q\n\n{thinking token budget: 7}<|im_end|>" in told[0]


def test_pictures_are_safe_and_say_the_same_in_text():
    chat = chat_of(U | {"content": "<script>alert(1)</script> & "}, A | {"reasoning_content": "r"}, U, A)
    for picture in (mask_diff(chat, TOKENIZER), parity_panel(chat, TOKENIZER)):
        assert not any(tag in picture.html for tag in ("<script", "<style", "<svg", "var("))
        assert picture.text
    text = mask_rows(["a", "bc\n", "d"], {"one": [0, 1, 0], "other": [1, 0, 1]}, roles=["user"] * 3).text
    assert "  one | .^^^\nother | ^...\n" in text and text.endswith("  one | .\nother | ^")
    assert parity_panel(chat, TOKENIZER).text.count("the same") == 2
    assert "0.50-0.55: 2" in trained_fractions([0.5, 0.5, 1.0]).text and "nothing" in trained_fractions([]).text


def test_provenance():
    first, second = training_sequences(chat_of(U, A | {"reasoning_content": "r"}, U, A | {"reasoning_content": "r"}), TOKENIZER)
    assert (first.turn, second.turn) == (0, 1) and first.conversation_id == second.conversation_id
    assert first.chunk_ends[-1] == len(first) == len(first.token_roles) and first.input_ids.dtype == np.int32
