"""Searches of many steps: right rows pass, wrong ones do not, whatever is wrong with them."""

import json
import random
import re

import pytest
from synth_rows import configs_of, made, prepared, reason, reasons, right, spoilt

from nemotron_nb.core import UserError
from nemotron_nb.synth.look import diversity_of
from nemotron_nb.synth.search import (
    FORMS, RELATIONS, Library, SearchSettings, distances, draw_facts, draw_walk, edges_of, names_that_touch, ways_of,
    without_shortcuts,
)  # fmt: skip


def test_right_rows_pass_and_are_prepared(tmp_path):
    rows = right("search")
    assert reasons("search", rows) == {"": 200}
    assert len({row["synth"]["answer"] for row in rows}) > 190
    prepared(rows, tmp_path)


def test_riddles_are_said_in_many_ways():
    """Of all stretches of four words in a thousand questions nearly half are said once, in each half of the rows."""
    rows = right("search", 1000)
    assert diversity_of(rows).stretches >= 0.45
    assert min(diversity_of(half).stretches for half in (rows[:500], rows[500:])) >= 0.5
    forms = {row["synth"]["check"]["form"]: [] for row in rows}
    for row in rows:
        forms[row["synth"]["check"]["form"]].append(row)
    assert set(forms) == set(FORMS) and min(diversity_of(some).stretches for some in forms.values()) >= 0.45


def test_a_grammar_of_wordings():
    assert ways_of("a [b|c] [d|] ; [e|f]") == ("a b d", "a b ", "a c d", "a c ", "e", "f")
    with_places = [way for r in RELATIONS.values() for way in (*r.asks, *r.whose)]
    assert len(with_places) > 300 and all(re.fullmatch(r"[^\[\]|;{}]*\{x\}[^\[\]|;{}]*", way) for way in with_places)


def results(row):
    return [i for i, m in enumerate(row["messages"]) if m["role"] == "tool"]


def change_a_result(row):
    i = results(row)[len(results(row)) // 2]
    row["messages"][i]["content"] = row["messages"][i]["content"].replace("e", "o", 1)


def change_a_query(row):
    call = row["messages"][2]["tool_calls"][0]["function"]
    call["arguments"] = call["arguments"].replace('"}', ' Zanzibar elephants of Yarosvik"}').replace('": "', '": "not ', 1)
    return "browse" in call["name"]


def swap_results(row):
    messages, found = row["messages"], results(row)
    messages[found[0]]["content"], messages[found[-1]]["content"] = messages[found[-1]]["content"], messages[found[0]]["content"]
    return messages[found[0]]["content"] != messages[found[-1]]["content"]


def lose_a_result(row):
    del row["messages"][results(row)[0]]


def wrong_answer(row):
    row["messages"][-1]["content"] = "Answer: " + row["synth"]["check"]["start"]


def no_answer(row):
    row["messages"].pop()


def more_than_the_answer(row):
    row["messages"][-1]["content"] += " or another"


def forget_the_last_fact(row):
    for i in reversed([i for i in results(row) if row["synth"]["answer"] in row["messages"][i]["content"]]):
        del row["messages"][i - 1 : i + 1]


def answer_in_the_question(row):
    row["messages"][1]["content"] += f" I hope it is not {row['synth']['answer'].upper()}."


def another_question(row):
    row["messages"][1]["content"] = "What is the oldest town?"


def two_answers(row):
    check, answer = row["synth"]["check"], row["synth"]["answer"]
    last = check["relations"][-1]
    check["facts"] += [[f[0], last, "Somebody Else", 0] for f in check["facts"] if f[1] == last and f[2] == answer]


def shortcut(row):
    check = row["synth"]["check"]
    check["facts"].append([check["start"], "neighbour", row["synth"]["answer"], 0])


def name_in_a_name(row):
    check = row["synth"]["check"]
    check["facts"].append([row["synth"]["answer"] + "shire", "neighbour", "Nowhere", 0])


def too_many_calls(row):
    row["synth"]["check"]["calls"] = 2


def unknown_tool(row):
    row["messages"][2]["tool_calls"][0]["function"]["name"] = "ask_a_friend"


WRONGS = {
    change_a_result: {"other_result"}, change_a_query: {"other_result"}, swap_results: {"other_result"},
    lose_a_result: {"call_without_result"}, wrong_answer: {"wrong_answer"}, no_answer: {"wrong_answer"},
    more_than_the_answer: {"wrong_answer"}, forget_the_last_fact: {"hop_without_source"},
    answer_in_the_question: {"answer_in_question"}, another_question: {"other_question"}, two_answers: {"several_answers"},
    shortcut: {"shortcut"}, name_in_a_name: {"name_in_name"}, too_many_calls: {"too_many_calls"}, unknown_tool: {"unknown_tool"},
}  # fmt: skip


@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    wrong = spoilt(right("search")[:100], spoil)
    assert len(wrong) >= 10
    assert set(reasons("search", wrong)) <= WRONGS[spoil]


def test_a_row_made_alone_is_the_row_of_the_run():
    from nemotron_nb.synth.search import STEPS
    from nemotron_nb.synth.steps import Workshop, make_row

    assert make_row("search", STEPS, Workshop(SearchSettings()), 57, "recipe") == made("search", 200)[57]


@pytest.mark.parametrize("seed", range(20))
def test_the_walk_is_the_shortest_way_and_the_only_one(seed):
    rng = random.Random(seed)
    facts = draw_facts(rng)
    walk = draw_walk(rng, edges_of(facts), 7)
    cut = without_shortcuts(facts, walk)
    assert set(cut) <= set(facts) and set(walk) <= set(cut)
    far = distances(cut, walk[0][0])
    assert [far[fact[2]] for fact in walk] == [1, 2, 3, 4, 5, 6, 7]


def test_a_graph_of_circles_is_walked_without_end_and_without_harm():
    ring = [("A", "next", "B", 0), ("B", "next", "C", 0), ("C", "next", "A", 0)]
    with pytest.raises(Exception, match="no walk of 4 hops"):
        draw_walk(random.Random(0), edges_of(ring), 4)
    assert Library(ring).search("next")["results"][0]["title"] == "A"
    assert names_that_touch("An", ["Ann", "Bo", "An"]) == ["Ann"]


def test_facts_of_a_file(tmp_path):
    facts = [fact for seed in range(40) for fact in draw_facts(random.Random(seed))]
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps({"head": a, "relation": r, "tail": b}) + "\n" for a, r, b, _ in facts))
    rows = right("search", 50, 120, triples=str(path), triples_licence="CC0-1.0")
    assert set(reasons("search", rows)) == {""}
    assert rows[0]["synth"]["parents"][0]["name"] == "triples.jsonl" and rows[0]["license"] == "CC0-1.0"
    prepared(rows, tmp_path)


@pytest.mark.parametrize("line", ['{"head": "A"}', "[]", '{"head": "A", "relation": "r", "tail": 3}', "nonsense", '{"head": "", "relation": "r", "tail": "B"}'])
def test_a_file_that_is_none(tmp_path, line):
    path = tmp_path / "triples.jsonl"
    path.write_text('{"head": "A", "relation": "r", "tail": "B"}\n' + line + "\n")
    with pytest.raises(UserError, match="triples.jsonl:2"):
        made("search", 1, triples=str(path))


def test_settings():
    assert {kind: settings.rows for kind, settings in configs_of("search").items()} == {"default": 10000, "tiny": 200}
    for bad in ({"fewest_hops": 9}, {"fewest_hops": 0}, {"most_calls": 3}):
        with pytest.raises(UserError):
            SearchSettings(**bad)
    assert reason("search", right("search")[0]) == ""
