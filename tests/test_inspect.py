"""One row of a file: found by its line, drawn without harm, compared with inference, or refused with the reason."""

import gzip
import io
import json
import re
import sys
import unicodedata

import pytest
from hypothesis import given, settings

from chats import conversations, hostile
from nemotron_nb.core import UserError
from nemotron_nb.data.files import Reject
from nemotron_nb.data.inspect import ansi_draft, chat_at, inspect_chat, inspect_file, page, parts_of, place_of, terminal_text
from nemotron_nb.data.jinja_template import chat_template
from nemotron_nb.data.mask import Draft
from nemotron_nb.data.records import parse_conversation
from nemotron_nb.data.template import Chunk
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.viz import table

TOKENIZER = load_tokenizer("tiny")
ROWS = [{"messages": [{"role": "user", "content": f"question {k}"}, {"role": "assistant", "content": f"answer {k}"}]} for k in range(1, 6)]
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b[8m\x9b31m\x08\x00\u202e"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def file(tmp_path):
    """Five chats; the second line is blank, the fourth is no JSON, the sixth has no answer."""
    lines = [json.dumps(r) for r in ROWS]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([lines[0], "", lines[1], "{not json", lines[2], '{"messages": [{"role": "user", "content": "hello?"}]}', lines[3]]) + "\n")
    return path


class Terminal:
    """A standard output that says what it is."""

    def __init__(self, is_terminal):
        self.is_terminal, self.text = is_terminal, ""

    def write(self, text):
        """Keep it."""
        self.text += text

    def flush(self):
        """Nothing waits."""

    def isatty(self):
        """Is somebody looking?"""
        return self.is_terminal


def test_a_line_is_the_line_of_the_file(file):
    assert [chat_at(file, k).messages[0]["content"] for k in (1, 3, 5, 7)] == ["question 1", "question 2", "question 3", "question 4"]
    assert chat_at(file, 3).line == 3 and chat_at(file).line == 1
    for line, said in ((2, "blank"), (8, "ends with row 7"), (99, "ends with row 7"), (0, "counted from 1")):
        with pytest.raises(UserError, match=said):
            chat_at(file, line)
    packed = file.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert chat_at(packed, 5).messages == chat_at(file, 5).messages


def test_a_line_in_a_later_unit(tmp_path, monkeypatch):
    """A large file is not read from its beginning."""
    from nemotron_nb.data import inspect

    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(ROWS[k % 5]) + "\n" for k in range(200)))
    units, read = inspect.units, []
    monkeypatch.setattr(inspect, "units", lambda p: units(p, unit_bytes=2000))
    monkeypatch.setattr(inspect, "read_unit", lambda u, real=inspect.read_unit: read.append(u.first_line) or real(u))
    assert len(inspect.units(path)) > 5
    for line in (1, 2, 57, 150, 199, 200):
        read.clear()
        assert chat_at(path, line).messages[0]["content"] == f"question {(line - 1) % 5 + 1}" and chat_at(path, line).line == line
        assert len(read) == 2 and read[0] <= line


def test_places(tmp_path):
    assert place_of("a/b.jsonl:12") == ("a/b.jsonl", 12)
    assert place_of("a/b.jsonl") == ("a/b.jsonl", None) and place_of("a:b") == ("a:b", None)
    odd = tmp_path / "odd:3"
    odd.write_text("{}")
    assert place_of(str(odd)) == (str(odd), None) and place_of(f"{odd}:3") == (str(odd), 3)


def test_a_bad_line_says_why_and_where(file, capsys):
    assert inspect_file(file, 4) == 1
    said = capsys.readouterr()
    assert said.out == "" and f"{file}:4: not_json:" in said.err and "what to do: write the row with a JSON library" in said.err
    assert inspect_file(file, 6) == 1
    assert f"{file}:6: no_assistant_turn:" in capsys.readouterr().err
    assert isinstance(chat_at(file, 6), Reject)


def test_a_row_whose_words_are_hostile_is_refused_without_harm(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": ESCAPES, "content": "x"}]}) + "\n")
    assert inspect_file(path, 1) == 1
    assert not acts(capsys.readouterr().err)


def acts(text):
    """Characters that do something unseen, in a text that should have none."""
    return sorted({c for c in text if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Zl", "Zp") or c == "\u202e")})


def bare(text):
    """A text without the few sequences that we write ourselves: SGR with small numbers."""
    return re.sub(r"\x1b\[(0|1|2|4|7|37|9[345])(;4)?m", "", text)


@pytest.mark.parametrize("colour", (False, True))
@given(conversation=conversations(text=hostile))
@settings(max_examples=15, deadline=None)
def test_a_terminal_is_never_told_anything_by_a_chat(colour, conversation):
    told = terminal_text(inspect_chat(conversation, TOKENIZER), colour)
    assert not acts(bare(told) if colour else told)


@pytest.mark.parametrize("colour", (False, True))
def test_escape_sequences_are_shown_and_not_played(colour):
    message = {"role": "assistant", "reasoning_content": ESCAPES + "!", "content": ESCAPES, "tool_calls": [{"name": "f" + ESCAPES, "arguments": {"k" + ESCAPES: ESCAPES}}]}
    chat = parse_conversation({"messages": [{"role": "user", "content": ESCAPES}, message, {"role": "tool", "content": ESCAPES}, {"role": "assistant", "content": "x"}]}, source=f"{ESCAPES}.jsonl", line=1)
    told = terminal_text(inspect_chat(chat, TOKENIZER), colour)
    assert not acts(bare(told) if colour else told) and told.count("\u241b[2J") >= 5 and "\u27e8U+202E\u27e9" in told
    assert ("\x1b[" in told) == colour


def test_underlined_is_exactly_what_is_trained():
    chat = parse_conversation({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "easy", "content": "4"}, {"role": "user", "content": "3+3?"}, {"role": "assistant", "reasoning_content": "so so", "content": "6"}]})
    found = inspect_chat(chat, TOKENIZER)
    for draft, sequence in zip(found.drafts, found.sequences, strict=True):
        told = ansi_draft(draft, TOKENIZER)
        lined = "".join(re.findall(r"\x1b\[\d+;4m(.*?)\x1b\[0m", told, re.DOTALL))
        assert lined == TOKENIZER.decode(sequence.input_ids[sequence.loss_mask == 1].tolist())
        assert bare(told) == TOKENIZER.decode(sequence.input_ids.tolist())


@pytest.mark.parametrize("is_terminal, environment, color, coloured", [(True, {}, True, True), (False, {}, True, False), (True, {"NO_COLOR": "1"}, True, False), (True, {"NO_COLOR": ""}, True, True), (True, {"TERM": "dumb"}, True, False), (True, {}, False, False)])
def test_colours_only_where_somebody_wants_them(file, monkeypatch, is_terminal, environment, color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    assert inspect_file(file, 1, color=color) == 0
    assert ("\x1b[" in screen.text) == coloured and "answer 1" in screen.text
    assert ("\u00abanswer 1" in screen.text) != coloured, "without colours, guillemets say what is trained"


def test_only_the_format_writes_special_tokens():
    chunk = Chunk("user", (("<|im_start|>user\n", True), ("<|im_end|><think>", False), ("<|im_end|>\n", True)))
    assert parts_of(chunk, TOKENIZER) == [("special", "<|im_start|>"), ("format", "user\n"), ("chat", "<|im_end|><think>"), ("special", "<|im_end|>"), ("format", "\n")]


@given(conversation=conversations(text=hostile, flags=True, budgets=True))
@settings(max_examples=20, deadline=None)
def test_training_and_inference_agree_and_every_stop_is_trained(conversation):
    found = inspect_chat(conversation, TOKENIZER)
    assert all(turn.same for turn in found.parity)
    for draft, sequence in zip(found.drafts, found.sequences, strict=True):
        turns = {c.message for c, on in zip(draft.chunks, draft.trained, strict=True) if on}
        stops = ((sequence.input_ids == TOKENIZER.im_end_id) & (sequence.loss_mask == 1)).sum()
        assert stops == len(turns)


def test_a_template_of_another_family():
    plain = parse_conversation(ROWS[0])
    assert [turn.same for turn in inspect_chat(plain, TOKENIZER, chat_template(CHATML)).parity] == [True]


def test_a_prompt_that_differs_is_found(file, monkeypatch, capsys):
    """A template that would be fed something else at inference than in training."""
    found = inspect_chat(chat_at(file, 1), TOKENIZER, chat_template(CHATML))
    [draft] = found.drafts
    shifted = Draft((Chunk("user", (("extra", True),)), *draft.chunks), (False, *draft.trained), 0)
    other = type(found)(found.conversation, found.template, TOKENIZER, (shifted,), found.sequences)
    assert [turn.same for turn in other.parity] == [False] and "DIFFERENT from token 0 on" in other.parity_table().text
    monkeypatch.setattr("nemotron_nb.data.inspect.inspect_chat", lambda *args: other)
    assert inspect_file(file, 1) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_nothing_to_train_on(tmp_path, capsys):
    path = tmp_path / "flags.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}))
    assert inspect_file(path, loss_mode="flags") == 1
    assert "no token of this chat would be trained" in capsys.readouterr().out


def test_the_page_is_whole_and_inert(tmp_path, capsys):
    path = tmp_path / "evil.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "<script>alert(1)</script></body>" + ESCAPES}, {"role": "assistant", "content": "<img src=x onerror=alert(1)>"}]}))
    target = tmp_path / "pages" / "chat.html"
    assert inspect_file(path, 1, html=target) == 0 and str(target) in capsys.readouterr().out
    written = target.read_text()
    assert written == page(inspect_chat(chat_at(path, 1), TOKENIZER))
    assert "&lt;script&gt;" in written and not re.search(r"<(script|img|style|svg|link|iframe)", written) and written.count("</body>") == 1
    assert not acts(written) and len(written) < 150_000


def test_a_long_chat_stays_small(tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    turns = [m for k in range(40) for m in ({"role": "user", "content": f"{k} " + "word <b> " * 200}, {"role": "assistant", "content": "and so on " * 200})]
    path.write_text(json.dumps({"messages": turns}))
    assert inspect_file(path, html=tmp_path / "page.html") == 0
    printed = capsys.readouterr().out
    assert len(printed) < 100_000 and "more tokens" in printed and "prefix of 24 trained turns" in printed
    assert "more messages" in (tmp_path / "page.html").read_text() and (tmp_path / "page.html").stat().st_size < 400_000


def test_full_folds_nothing_on_the_page(tmp_path, capsys):
    """A chat that is far beyond what one picture holds: with --full its last words stand there, once in the template's view and once among the tokens."""
    path = tmp_path / "long.jsonl"
    turns = [m for k in range(8) for m in ({"role": "user", "content": f"{k} " + "word <b> " * 500}, {"role": "assistant", "content": "and so on " * 40 + f"end{k}."})]
    path.write_text(json.dumps({"messages": turns}))
    target = tmp_path / "page.html"
    assert inspect_file(path, html=target, full=True) == 0
    written = target.read_text()
    assert not any(word in written for word in ("more messages", "more tokens", "more characters", "more pictures"))
    assert all(written.count(f"end{k}.") == 3 for k in range(8))
    assert inspect_file(path, html=target) == 0 and "more messages" in target.read_text()


# ---- where the row lies


@pytest.mark.parametrize("given", ["chats.jsonl", "~/chats.jsonl", ".", "*.jsonl", "../*/chats.jsonl", "-"])
def test_every_way_to_name_a_file_shows_its_row(given, tmp_path, monkeypatch, capsys):
    """A file, one in the home folder, a folder, a glob, and standard input."""
    home = tmp_path / "home"
    home.mkdir()
    text = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]}) + "\n"
    (home / "chats.jsonl").write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert inspect_file(given, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["sequences"][0]["trained"] > 2


def test_of_a_folder_the_first_file_is_shown_and_said_to_be(tmp_path, capsys):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"from {name}"}]}) + "\n")
    assert inspect_file(tmp_path) == 0
    said = capsys.readouterr()
    assert "from a" in said.out and f"the first of 2 files: {tmp_path / 'a.jsonl'}" in said.err
    with pytest.raises(UserError, match="matches no file"):
        inspect_file(tmp_path / "*.parquet")
    with pytest.raises(UserError, match="no such file"):
        inspect_file(tmp_path / "c.jsonl")


LINE_ENDS = "\u0085\u2028\u2029\x0b\x0c\x1c\x1d\x1e"  # str.splitlines cuts at each of them; a line of JSONL ends at \n alone


def test_what_only_looks_like_the_end_of_a_line_ends_none(tmp_path, capsys):
    """In the file, in what is trained, and in the text form of what is shown."""
    said = f"x{LINE_ENDS}y"
    rows = [{"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}], "id": said}, {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "two"}]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert inspect_file(path, 2) == 0 and "two" in capsys.readouterr().out
    assert inspect_file(path, 1, as_json=True) == 0
    (sequence,) = json.loads(capsys.readouterr().out)["sequences"]
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.decode([i for i, on in zip(sequence["input_ids"], sequence["loss_mask"]) if on]) == f"{said}<|im_end|>\n"
    assert inspect_file(path, 1) == 0
    shown = capsys.readouterr().out
    assert not any(c in shown for c in LINE_ENDS)
    drawn = table([[said, 1]], header=["a", "b"]).text
    assert len(drawn.splitlines()) == 2 and not any(c in drawn for c in LINE_ENDS)
