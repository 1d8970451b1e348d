"""What does a user see who gives something that cannot work? One error, and nothing half-written."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import nemotron

GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def lines(*records) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def chat(*messages) -> dict:
    return {"messages": [dict(zip(("role", "content"), m)) for m in messages]}


# name: (what the file holds or None, settings, what the error must name)
CASES = {
    "missing_file": (None, [], ["chats.jsonl"]),
    "empty_file": ("", [], ["chats.jsonl", "empty"]),
    "blank_lines": ("\n\n", [], ["chats.jsonl"]),
    "not_json": (lines(GOOD, "{'messages': []}"), [], ["chats.jsonl:2"]),
    "no_messages": (lines(GOOD, GOOD, {"text": "hello"}), [], ["chats.jsonl:3", "messages"]),
    "unknown_role": (lines(GOOD, chat(("usr", "hi"), ("assistant", "yes"))), [], ["chats.jsonl:2", "usr"]),
    "no_assistant_turn": (lines(chat(("user", "hi")), chat(("system", "be brief"), ("user", "hello"))), [], ["chats.jsonl", "assistant"]),
    "not_utf8": (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', [], ["chats.jsonl:1"]),
    "unknown_setting": (lines(GOOD), ["optimizer.learning_rte=1"], ["optimizer.learning_rte", "command line"]),
    "misspelt_setting": (lines(GOOD), ["data.pack_sise=64"], ["data.pack_sise", "did you mean 'data.pack_size'"]),
    "wrong_type": (lines(GOOD), ["train.train_iters=many"], ["train_iters", "int"]),
    "not_an_override": (lines(GOOD), ["train.train_iters"], ["key=value"]),
    "unknown_template": (lines(GOOD), ["data.chat_template=nano4"], ["nano4", "nano3"]),
    "unknown_tokenizer": (lines(GOOD), ["data.tokenizer=tinny"], ["tinny", "tiny"]),
    "ratios_that_do_not_add_up": (lines(GOOD), ["data.train_ratio=0.5"], ["train_ratio", "add up to 1"]),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """For each case, what the command answered and the files that are there afterwards. Run two at a time: each is a process."""

    def ask(case):
        content, overrides, _ = CASES[case]
        folder = tmp_path_factory.mktemp(case)
        if content is not None:
            (folder / "chats.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        done = nemotron("nano3", "sft", "-c", "tiny", "data.path=chats.jsonl", *overrides, cwd=folder)
        return case, (done, {p.relative_to(folder).as_posix() for p in folder.rglob("*")})

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(ask, CASES))


def without_cache(names):
    """The files of a folder, without rows that were tokenized before the error and are kept for the next attempt."""
    return {n for n in names if "/data_prep/runs" not in n} - {"output", "output/nano3", "output/nano3/data_prep"}


@pytest.mark.parametrize("case", CASES)
def test_a_training_run_refuses_it_before_anything_is_written(answers, case):
    content, _, named = CASES[case]
    done, left = answers[case]
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "what to do:" in done.stderr, done.stderr
    for word in named:
        assert word in done.stderr, done.stderr
    assert without_cache(left) == ({"chats.jsonl"} if content is not None else set())


@pytest.mark.parametrize("case", ["missing_file", "not_json"])
def test_data_preparation_refuses_it_too(tmp_path, case):
    content, _, named = CASES[case]
    if content is not None:
        (tmp_path / "chats.jsonl").write_text(content)
    done = nemotron("super3", "data", "prep", "sft", "-c", "tiny", "path=chats.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and all(word in done.stderr for word in named), done.stderr
    assert without_cache({p.relative_to(tmp_path).as_posix().replace("super3", "nano3") for p in tmp_path.rglob("*")}) <= {"chats.jsonl"}


def test_no_data_at_all(tmp_path):
    """The recipe names no chats: they are the user's."""
    done = nemotron("nano3", "sft", cwd=tmp_path)
    assert done.returncode == 1 and "data.path=chats.jsonl" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--run", "--batch"])
def test_submission_is_refused_and_not_run_here_instead(tmp_path, option):
    done = nemotron("nano3", "sft", "-c", "tiny", option, "cluster", cwd=tmp_path)
    assert done.returncode == 1 and "not there yet" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("nano3", "fly"), ("nano4", "sft"), ("nano3", "sft", "--colour"), ("nano3", "data", "prep", "sft", "--sample", "0")])
def test_a_command_nobody_knows_is_a_usage_error(tmp_path, words):
    assert nemotron(*words, cwd=tmp_path).returncode == 2
