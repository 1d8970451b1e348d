"""The corpus that the library makes: the same bytes for the same seed, nothing in it that is asked later."""

import json
import re

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.data.sample import sample_path
from nemotron_nb.pretrain import world
from nemotron_nb.pretrain.world import SHARES, SOURCES, SPLIT_SHARES, documents, shop_facts, sum_facts, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, and its documents by split."""
    made = write_world(tmp_path_factory.mktemp("made") / "world", megabytes=0.5)
    blend = json.loads(made.blend.read_text())
    read = lambda path: [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
    return made, {split: [t for e in entries for t in read(e["path"])] for split, entries in blend.items()}


def test_the_same_arguments_give_the_same_bytes_and_others_do_not(tmp_path, made):
    folder, again = made[0].blend.parent, write_world(tmp_path / "again", megabytes=0.5).blend.parent
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*.jsonl"))
    assert len(paths) == 3 * len(SOURCES)
    assert all((folder / p).read_bytes() == (again / p).read_bytes() for p in paths)
    other = write_world(tmp_path / "other", megabytes=0.05, seed=1).blend.parent
    assert all((folder / p).read_bytes()[:200] != (other / p).read_bytes()[:200] for p in paths)


def test_no_document_is_told_twice_in_any_split(made):
    told = [text for texts in made[1].values() for text in texts]
    assert len(told) == len(set(told)) == sum(made[0].documents.values())


def test_sizes_follow_the_shares(made):
    for split, share in SPLIT_SHARES.items():
        size = sum(len(t.encode()) for t in made[1][split])
        assert size == pytest.approx(5e5 * share, abs=900 * len(SHARES)), split
    assert sum(SHARES.values()) == pytest.approx(1) and set(SHARES) == set(SOURCES)


def test_held_out_sums_and_shipped_questions_stand_nowhere(made):
    """By other means than the library's: every equation in every document, every question of every shipped chat."""
    told = "\n".join(text for texts in made[1].values() for text in texts)
    held = {f.prompt.strip(" =") for f in sum_facts() if f.held_out}
    shown = {f"{a} {'×' if s == '*' else s} {b}" for a, s, b in re.findall(r"(\d+) ([-+×*]) (\d+) =", told)}
    assert len(held) > 80 and not held & shown and len(shown) > 1000
    chats = [json.loads(line) for line in sample_path().open(encoding="utf-8")]
    asked = {m["content"] for c in chats for m in c["messages"] if m["role"] == "user" and any(x.isdigit() for x in m["content"])}
    assert len(asked) > 200 and not [q for q in asked if q in told]


def test_the_facts_of_the_shop_are_told_and_right(made):
    train = "\n".join(made[1]["train"])
    facts = shop_facts()
    assert sum(f.prompt + f.answer in train for f in facts) > 0.9 * len(facts)
    assert {f.language for f in facts} == {"en", "fr", "es", "it", "de", "ja"}
    for match in re.finditer(r"The (\w+) lamp costs (\d+) euros", train):
        assert world.LAMPS[match[1]]["price"] == int(match[2])


def test_every_equation_is_right(made):
    for text in made[1]["train"]:
        for a, sign, b, x in re.findall(r"(?<![\d+×*-] )\b(\d+) ([-+×]) (\d+) = (\d+)\b", text):
            assert world.SIGNS[sign](int(a), int(b)) == int(x), text


def test_what_was_left_out_is_counted():
    left_out, seen = {}, set()
    first = list(documents("catalogue", "train", 9000, seen=seen, left_out=left_out))
    assert set(left_out) <= {"held_out_sum", "shipped_question", "told_before", "empty"} and left_out
    assert len(seen) == len(first)


def test_too_small_and_there_already(tmp_path):
    with pytest.raises(UserError, match="0.01 megabytes"):
        write_world(tmp_path / "x", 0.01)
    (tmp_path / "y").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_world(tmp_path / "y", 0.05)
