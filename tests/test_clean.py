"""`nemotron data clean`: what is dropped, what is not, and that nothing is lost without a word."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from typer.testing import CliRunner

from nemotron_nb.cli import app
from nemotron_nb.core import UserError
from nemotron_nb.data.clean import Cleaner, Cleaning, Spoken, clean
from nemotron_nb.data.contamination import Exam, shared_by_hand
from nemotron_nb.data.duplicates import Seen, shared_share, signature
from nemotron_nb.data.personal import personal_data, without_personal_data
from nemotron_nb.data.quality import QUALITY_RULES, broken_rule

WORDS = [f"word{k}" for k in range(300)]
NAMES = ["Anna", "Boris", "Chen", "Dana", "Emil", "Farah"]


def text_of(rng, n=80):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def problem(rng, name, numbers):
    a, b = numbers
    goods, place, tail = (rng.choice(x) for x in (
        ["lamps", "kites", "melons", "tickets"], ["at the harbour", "behind the station", "during the fair", "next to the mill"],
        ["are left in the evening", "boxes does that fill", "coins do they cost"],
    ))  # fmt: skip
    return f"On the first day {name} brings {a} {goods} {place}, sells {b} of them to a neighbour, and carries {a - b} home. How many of the {a} {tail}?"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_all_pairs(seed):
    """Texts far from the threshold on either side: the estimate may be off by its own noise, and no more."""
    rng, seen, kept = random.Random(seed), Seen(), []
    for i in range(60):
        text = text_of(rng, 150)
        if kept and rng.random() < 0.5:
            words = rng.choice(kept).split()
            changes = rng.choice([1, 60])
            for place in rng.sample(range(len(words)), changes):
                words[place] = "changed"
            text = " ".join(words)
        close = any(shared_share(text, other) >= 0.8 for other in kept)
        assert (seen.earlier(text, str(i)) is not None) == close
        if not close:
            kept.append(text)


def test_the_estimate_is_as_exact_as_its_length_allows():
    rng, off = random.Random(1), []
    for _ in range(40):
        a = text_of(rng, 200)
        b = " ".join(w if rng.random() > 0.03 else "changed" for w in a.split())
        off.append((signature(a) == signature(b)).mean() - shared_share(a, b))
    assert np.abs(off).max() < 5 * 0.5 / np.sqrt(128) and abs(np.mean(off)) < 0.03


def test_renamed_and_renumbered_questions_are_found():
    asked = [problem(random.Random(k), NAMES[k % 6], (k + 3, k % 7 + 2)) for k in range(200)]
    again = [problem(random.Random(k), NAMES[(k + 1) % 6], (3 * k + 50, k % 5 + 11)) for k in range(200)]
    exam, strict = Exam(asked), Exam(asked, 13, False)
    found = [exam.hit("Think about this. " + text) for text in again]
    assert sum(f is not None for f in found) >= 0.95 * 200
    for rule in (strict, Exam(asked, 8, False)):
        assert sum(rule.hit(text) is not None for text in again) < 0.5 * 200, "rules that read numbers as they are find far fewer"
    for text, hit in list(zip(again, found))[:40]:
        assert hit[1] == pytest.approx(max(shared_by_hand(q, "Think about this. " + text) for q in asked))
    rng = random.Random(9)
    assert not any(exam.hit(text_of(rng)) for _ in range(300))


def test_hostile_text_takes_no_time_and_breaks_nothing():
    for text in ("", "\x00" * 50, "a" * 50_000, "@" * 20_000, "1-" * 20_000, "4" * 20_000, "\ud800", "(" * 10_000, "x@" + "a." * 10_000):
        personal_data(text), broken_rule(text, "documents"), broken_rule(text, "chats"), Seen().earlier(text, "a"), Exam(["one two three four five six"]).hit(text)


def test_masks_leave_the_rest_alone():
    text = "Ask maria.lopez@posteo.de or +49 30 901820 44, not test@example.com; 12 + 30 = 42."
    masked, count = without_personal_data(text)
    assert masked == "Ask <EMAIL> or <TELEPHONE>, not test@example.com; 12 + 30 = 42." and count == 2
    assert without_personal_data(masked) == (masked, 0)


CHAT = [{"role": "user", "content": "Is the lamp on?"}, {"role": "assistant", "content": "It is."}]


def chats_with_faults():
    """Twelve planted faults that no filter of one chat alone sees, or that its thresholds let pass; and three honest chats."""
    answer = lambda text, q="Tell me about the lamps of this house, please.": {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": text}]}  # noqa: E731
    table = "| lamp | watts |\n|---|---|\n| hall | 40 |\n| stairs | 60 |"
    good = [{"messages": CHAT}, answer("The answer is 42.", "What is six times seven?"), answer(table, "A table of the lamps, please.")]
    bad = {
        "same_words": {"messages": CHAT},
        "contaminated": answer("It is nine.", problem(random.Random(4), "Zoe", (70, 9))),
        "personal": answer("Write to maria.lopez@posteo.de, she has the key."),
        "language": answer("Die Lampe im Flur ist an, und niemand hat gesagt, dass sie nicht brennen soll.", "Is it on in the hall?"),
        "looped_share": answer("so we look at the lamp again and see that it is on and then " * 5, "What now?"),
        "run_share": answer("a" * 5000 + " and on", "Say a."),
        "repeated_line_share": answer("\n".join(f"{i}. The lamp is on, so we must look at it." for i in range(199)), "Count."),
        "broken_share": answer("It\u00e2\u20ac\u2122s on, it\u00e2\u20ac\u2122s the caf\u00c3\u00a9 lamp.", "Which one?"),
        "ends_open": answer("The lamp in the hall had been on since the morning and nobody knew who had left it so, because when the children came home they", "And then?"),
    }  # fmt: skip
    return good, bad


def test_planted_faults_of_chats_are_caught_and_honest_chats_stay(tmp_path):
    good, bad = chats_with_faults()
    jsonl(tmp_path / "exam.jsonl", [{"question": problem(random.Random(4), "Anna", (12, 4))}])
    path = jsonl(tmp_path / "chats.jsonl", [*good, *bad.values()])
    ledger = clean([path], Cleaning("sft", decontaminate=[str(tmp_path / "exam.jsonl")], languages=["en"], personal="drop"), tmp_path / "out")
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [d["line"] for d in dropped] == list(range(len(good) + 1, len(good) + 1 + len(bad)))
    for name, found in zip(bad, dropped, strict=True):
        same = {"repeated_line_share": ("repeated_line_share", "looped_share"), "run_share": ("run_share", "mean_word_length")}
        assert found["reason"] in same.get(name, (name,)), (name, found)
    kept = [json.loads(line) for line in (tmp_path / "out/kept.jsonl").read_text().splitlines()]
    assert kept == good and ledger["kept"] == 3 and sum(ledger["dropped"].values()) == len(bad)


def test_each_question_can_be_left_out(tmp_path):
    prose = "The lamp in the hall had been on since the morning, and nobody knew who had left it so. When they came home they switched it off and laughed."
    says = lambda text, **given: Cleaner(Cleaning(**given), Exam([])).reason(Spoken(text, (text,)), "a")  # noqa: E731
    assert says(prose) is None
    assert says("too short")[0] == "word_count" and says("too short", quality=False) is None
    assert says("too short", thresholds={"word_count": [1, None]}) is None
    assert says(prose + " maria.lopez@posteo.de") is None and says(prose + " maria.lopez@posteo.de", personal="drop")[0] == "personal"
    for given, expected in (({}, "same_words"), ({"exact": False, "near": False}, None), ({"near": False}, "same_words")):
        cleaner = Cleaner(Cleaning(**given), Exam([]))
        cleaner.reason(Spoken(prose, (prose,)), "a")
        found = cleaner.reason(Spoken(prose.upper(), (prose,)), "b")
        assert (found and found[0]) == expected


def test_a_row_that_is_dropped_does_not_stand_for_later_ones(tmp_path):
    prose = "The lamp in the hall had been on since the morning, and nobody knew who had left it so. When they came home they switched it off and laughed."
    path = jsonl(tmp_path / "docs.jsonl", [{"text": prose + " maria.lopez@posteo.de"}, {"text": prose}])
    assert clean([path], Cleaning(personal="drop"), tmp_path / "out")["dropped"] == {"personal": 1}


def test_every_rule_has_a_text_on_both_sides():
    assert all(rule.says and (rule.documents, rule.chats) != ((None, None),) * 2 for rule in QUALITY_RULES.values())


def ask(*words):
    return CliRunner().invoke(app, list(words))


def test_the_command_cleans_and_says_what_it_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    texts = [text_of(rng, 60) for _ in range(5)]
    jsonl(tmp_path / "docs.jsonl", [{"body": t} for t in [*texts, texts[2].upper(), None, "short"]])
    done = ask("data", "clean", "pretrain", "docs.jsonl", "--out", "out", "text_field=body")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "same_words" in done.output and "out/ledger.json" in done.output
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    assert (ledger["rows"], ledger["kept"], ledger["dropped"]) == (8, 5, {"same_words": 1, "no_text": 1, "word_count": 1})
    assert [json.loads(x)["body"] for x in (tmp_path / "out/kept.jsonl").read_text().splitlines()] == texts
    said = json.loads(ask("data", "clean", "pretrain", "docs.jsonl", "--out", "again", "text_field=body", "--json").output)
    assert said["kept"] == 5 and (tmp_path / "again/kept.jsonl").read_bytes() == (tmp_path / "out/kept.jsonl").read_bytes()


def test_what_is_kept_is_masked_wherever_it_stands(tmp_path):
    """Content, thought, arguments at any depth; names of fields stay."""
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": ["maria.lopez@posteo.de"], "maria.lopez@posteo.de": 1}}}
    chat = [
        {"role": "user", "content": "Write to maria.lopez@posteo.de"},
        {"role": "assistant", "reasoning_content": "Or call +49 30 901820 44.", "content": "", "tool_calls": [call]},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    ledger = clean([tmp_path / "chats.jsonl"], Cleaning("sft", quality=False), tmp_path / "out")
    row, other = map(json.loads, (tmp_path / "out/kept.jsonl").read_text().splitlines())
    user, assistant = row["messages"]
    assert user["content"] == "Write to <EMAIL>" and assistant["reasoning_content"] == "Or call <TELEPHONE>."
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"to": ["<EMAIL>"], "maria.lopez@posteo.de": 1}
    assert ledger["masked"] == {"rows": 1, "places": 3} and other == {"messages": CHAT}
    kept = clean([tmp_path / "chats.jsonl"], Cleaning("sft", quality=False, personal="keep"), tmp_path / "kept")
    assert kept["masked"] == {"rows": 0, "places": 0} and "maria" in (tmp_path / "kept/kept.jsonl").read_text()


def test_rows_do_not_stay_in_memory(tmp_path):
    """Three times the rows need no more memory than the digests of the new ones."""
    rng, found = random.Random(0), []
    words = [f"word{rng.randrange(10**6)}" for _ in range(30_000)]
    for count in (40, 120):
        with open(tmp_path / f"{count}.jsonl", "w") as file:
            for _ in range(count):
                file.write(json.dumps({"text": " ".join(rng.sample(words, 2_000))}) + "\n")
        settings = Cleaning(near=False, quality=False, personal="keep")
        tracemalloc.start()
        try:
            ledger = clean([tmp_path / f"{count}.jsonl"], settings, tmp_path / f"out{count}")
            found.append(((tmp_path / f"{count}.jsonl").stat().st_size, tracemalloc.get_traced_memory()[1]))
        finally:
            tracemalloc.stop()
        assert ledger["kept"] == count
    (small, few), (large, many) = found
    assert many - few < (large - small) / 8


@pytest.mark.parametrize("typed, said", [
    (["rl", "docs.jsonl"], "unknown value 'rl'"),
    (["pretrain", "nowhere.jsonl"], "nowhere.jsonl"),
    (["pretrain", "docs.jsonl", "langages=[en]"], "did you mean 'languages'"),
    (["pretrain", "docs.jsonl", "decontaminate=[docs.jsonl]"], "no question in 'question'"),
    (["pretrain", "docs.jsonl", "text_field=body"], "no row would be left"),
    (["sft", "docs.jsonl"], "no row would be left"),
    (["pretrain", "docs.jsonl", "near_threshold=2"], "is no share"),
    (["pretrain", "docs.jsonl", "languages=[en"], "cannot be read: languages=[en"),
], ids=lambda x: x[-1][:30] if isinstance(x, list) else "")  # fmt: skip
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, monkeypatch, typed, said):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "docs.jsonl", [{"text": "word " * 3}])
    done = ask("data", "clean", *typed, "--out", "out")
    assert isinstance(done.exception, UserError) and said in str(done.exception), (done.output, done.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["docs.jsonl"]
