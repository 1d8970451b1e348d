"""Datasets in other forms: each row becomes the chat it says, nothing is added to it, and a wrong key leads to the right one."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotron_nb.core import UserError
from nemotron_nb.data.records import BadRecord, parse_conversation
from nemotron_nb.data.sources import FORMATS, DataBlock, PreservingDataset, data_section, load_sft_dataset, row_format

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}

ROWS = {
    "openai": ({"messages": [Q, A]}, [Q, A]),
    "openai_format": ({"messages": [Q, A]}, [Q, A]),
    "ResponseDataset": ({"input": "q", "output": "a"}, [Q, A]),
    "squad": ({"context": "s", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, [S, Q, A]),
    "OpenMathInstruct-2": ({"problem": "q", "generated_solution": "a", "expected_answer": "7"}, [Q, A]),
    "tulu3_sft_mixture": ({"messages": [Q, A], "source": "x"}, [Q, A]),
    "sharegpt": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [S, Q, A]),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, [Q, A]),
    "open_assistant": ({"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}}, [Q, A | {"train": True}]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_each_format(name):
    row, expected = ROWS[name]
    (chat,) = row_format(name, {}).chats(row)
    assert chat["messages"] == expected
    assert parse_conversation(chat).messages[-1]["content"] == "a"


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("openai", "openai_format", "tulu3_sft_mixture")])
def test_a_row_of_another_form_is_a_bad_record_and_no_crash(name):
    for row in ({}, {"text": "x"}, {"conversations": [{"from": "alien", "value": "x"}]}, {"input": 3}, {"prompt": {"role": "alien", "text": "x"}}, {"context": "c", "question": "q", "answers": None}):
        try:
            assert row_format(name, {}).chats(row) == []
        except BadRecord as e:
            assert e.reason


def test_system_text_from_a_field_or_from_the_options():
    form = row_format("openai_format", {"system_key": "persona", "system_prompt": "fallback"})
    assert form.chats({"messages": [Q, A], "persona": "s"})[0]["messages"][0] == S
    assert form.chats({"messages": [Q, A]})[0]["messages"][0]["content"] == "fallback"
    assert form.chats({"messages": [S, Q, A], "persona": "other"})[0]["messages"] == [S, Q, A]


def test_the_pages_own_example_of_tools_keeps_its_shapes(tmp_path):
    """Two tools with different arguments: no key of one appears in the other, from JSONL, from Parquet, and through a list."""
    calls = [{"query": "search term"}, {"expression": "2+2", "precision": 2}]
    rows = [{"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [{"name": "tool", "arguments": a}]}]} for a in calls]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        data = load_sft_dataset(DataBlock("openai_format", str(tmp_path / name), options={"use_preserving_dataset": True}))
        got = [c["messages"][1]["tool_calls"][0]["arguments"] for c in data.dataset]
        assert got == calls
    kept = PreservingDataset(tuple(rows))
    assert list(kept) == rows and kept[1] == rows[1] and kept[0:1] == rows[:1] and kept[[1, 0]] == rows[::-1] and kept.features is None
    assert list(kept.map(lambda row, i: {"i": i}, with_indices=True)) == [{"i": 0}, {"i": 1}]


def test_each_reply_of_a_tree_is_trained_once():
    reply = {"role": "assistant", "text": "r", "replies": [{"role": "prompter", "text": f"u{i}", "replies": [{"role": "assistant", "text": f"a{i}", "replies": []}]} for i in range(3)]}
    chats = row_format("open_assistant", {}).chats({"prompt": {"role": "prompter", "text": "q", "replies": [reply]}})
    assert len(chats) == 3 and sum(m["train"] for c in chats for m in c["messages"] if m["content"] == "r") == 1


def test_prompt_files_are_text_and_not_format_strings(tmp_path):
    (tmp_path / "prompt.txt").write_text("Solve {0.__class__}: {}")
    form = row_format("ResponseDataset", {"prompt_file": str(tmp_path / "prompt.txt")})
    assert form.chats({"input": "q", "output": "a"})[0]["messages"][0]["content"] == "Solve {0.__class__}: q"
    with pytest.raises(UserError, match="cannot be read"):
        row_format("ResponseDataset", {"prompt_file": str(tmp_path / "none.txt")}).chats({"input": "q", "output": "a"})


def test_a_data_section_with_defaults(tmp_path):
    path = tmp_path / "sets" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"question": str(i), "output": "a"}) + "\n" for i in range(40)))
    section = {"train": {"data_path": str(path), "input_key": "question", "split": "train", "split_validation_size": 0.25, "seed": 1}, "validation": None, "default": {"dataset_name": "ResponseDataset", "input_key": "input", "prompt_file": None}}
    (block,) = data_section(section).values()
    first, again = load_sft_dataset(block), load_sft_dataset(block)
    assert [len(d) for d in first.formatted_ds.values()] == [30, 10] and list(first.val_dataset) == list(again.val_dataset)
    assert first.task_spec.task_name == first.task_name == "sets-train" == first.dataset[0]["task_name"]
    for wrong, says in (({"trian": {}}, "did you mean 'train'"), ({"train": {"dataset_name": "sqaud"}}, "did you mean 'squad'"), ({"train": {"split_validation_size": 2.0}}, "share")):
        with pytest.raises(UserError, match=says):
            data_section(wrong)
