"""Filters: what is found, what must live, that the fast count is the naive one, and that no list can stop the machine."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.filters import (
    OPEN_LICENCES,
    REASONS,
    FilterPolicy,
    Verdict,
    apply_filters,
    check,
    filter_report,
    findings,
    licence_findings,
    load_families,
    plain_form,
    repeats,
    repeats_by_hand,
    repetition_findings,
    safe_pattern,
    split_code,
    structure_findings,
    words,
)
from nemotron_nb.data.records import Conversation, Reject, parse_conversation, read_chats
from nemotron_nb.data.sample import sample_path

REAL = Path(__file__).parents[2] / "shared" / "data"
USER, YES, RESULT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}, {"role": "tool", "content": "1"}
SCHEMA = {
    "type": "object",
    "properties": {"s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": ["number", "null"]}, "e": {"enum": ["a", 1]}, "a": {"type": "array"}, "o": {"type": "object"}, "b": {"type": "boolean"}, "u": {"type": "float"}, "x": True},
    "required": ["s"],
}
TOOL = {"name": "f", "parameters": SCHEMA}


def call(*names, **arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"name": n, "arguments": arguments or {"s": "x"}} for n in names or ("f",)]}


def chat(*messages, tools=(TOOL,), **more):
    return Conversation(tuple(messages), tuple(tools), id="c", source="file", line=7, **more)


def says(text, thought=""):
    return chat(USER, {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {}))


def reasons(conversation, policy=FilterPolicy(), **more):
    return [reason for reason, _ in findings(conversation, policy, **more)]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, YES], []),
        ([USER, YES, USER], []),
        ([USER, call(), RESULT, YES], []),
        ([USER, call("f", "f"), RESULT, RESULT, YES], []),
        ([USER, call()], []),
        ([USER, call("f", "f"), RESULT], ["call_without_result"]),
        ([USER, call("f", "f"), RESULT, YES], ["call_without_result"]),
        ([USER, call(), USER, YES], ["call_without_result"]),
        ([USER, call(), call(), RESULT, YES], ["call_without_result"]),
        ([USER, RESULT, YES], ["result_without_call"]),
        ([USER, YES, RESULT, RESULT, YES], ["result_without_call"]),
        ([USER, call(), RESULT, RESULT, RESULT, YES], ["too_many_results"]),
        ([USER, call("g"), RESULT, YES], ["undeclared_tool"]),
        ([USER, {"role": "assistant", "content": "\n "}, USER, YES], ["empty_answer"]),
        ([USER, {"role": "assistant", "content": "", "train": False}, USER, YES], []),
        ([USER, {"role": "assistant", "content": "a</think>b"}], ["unbalanced_think"]),
        ([USER, {"role": "assistant", "content": "b", "reasoning_content": "<think>"}], ["unbalanced_think"]),
        ([{"role": "system", "content": "s"}, USER, YES], []),
        ([{"role": "system", "content": "s"}, {"role": "system", "content": "s"}, USER, YES], ["second_system"]),
    ],
)
def test_structure(messages, expected):
    assert [r for r, _ in structure_findings(chat(*messages))] == expected


def test_calls_without_definitions_and_the_last_word():
    assert reasons(chat(USER, call(), RESULT, YES, tools=())) == ["calls_without_definitions"]
    assert reasons(chat(USER, YES, USER), FilterPolicy(require_answer=True)) == ["last_message_not_assistant"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"s": "", "i": 3, "n": 1.5, "e": 1, "a": [], "o": {}, "b": False, "u": "any", "x": None, "unknown": 1}, []),
        ({"s": "", "i": 3.0, "n": None}, []),
        ({"i": 1}, ["missing_argument"]),
        ({"s": None}, ["wrong_argument_type"]),
        ({"s": "", "i": True}, ["wrong_argument_type"]),
        ({"s": "", "i": 3.5}, ["wrong_argument_type"]),
        ({"s": "", "i": "3"}, ["wrong_argument_type"]),
        ({"s": "", "n": True}, ["wrong_argument_type"]),
        ({"s": "", "b": 0}, ["wrong_argument_type"]),
        ({"s": "", "a": {}}, ["wrong_argument_type"]),
        ({"s": "", "e": "b"}, ["argument_not_allowed"]),
    ],
)
def test_arguments_against_the_declaration(arguments, expected):
    assert reasons(chat(USER, call(**arguments), RESULT, YES)) == expected


@pytest.mark.parametrize("schema", [None, {}, [], "x", {"properties": []}, {"properties": {"s": None}, "required": "s"}, {"$ref": "http://127.0.0.1:1/x"}, {"properties": {"s": {"type": 5, "enum": 7, "pattern": "(a+)+$"}}}, {"properties": {"s": {"type": []}}}])
def test_declarations_of_any_shape_are_read_and_never_run(schema):
    assert reasons(chat(USER, call(s="a" * 50 + "!"), RESULT, YES, tools=[{"name": "f", "parameters": schema}])) == []


def test_undeclared_arguments_are_refused_only_where_the_declaration_says_so():
    closed = {"name": "f", "parameters": SCHEMA | {"additionalProperties": False}}
    assert reasons(chat(USER, call(s="", z=1), RESULT, YES)) == []
    assert reasons(chat(USER, call(s="", z=1), RESULT, YES, tools=[closed])) == ["argument_not_allowed"]


TOKENS = st.one_of(st.lists(st.sampled_from("abc"), max_size=80), st.builds(lambda part, n, tail: (part * n)[:90] + tail, st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20), st.integers(1, 30), st.lists(st.sampled_from("xyz"), max_size=40)))


@settings(max_examples=300, deadline=None)
@given(TOKENS, st.integers(1, 6), st.integers(0, 60))
def test_the_fast_count_of_repeats_is_the_naive_one(tokens, ngram, more):
    fast, slow = repeats(tokens, ngram, ngram + more), repeats_by_hand(tokens, ngram, ngram + more)
    assert len(fast) == len(slow) and np.allclose(fast, slow, rtol=0, atol=np.finfo(float).eps)


def test_windows_of_fifty_thousand_words_are_counted_as_by_hand():
    tokens = [str(i * i % 9973) for i in range(100_000)]  # by hand, all windows would take billions of steps
    shares = repeats(tokens, 8, 50_000)
    for start in (0, 1, 25_000, 50_000):
        assert shares[start] == pytest.approx(repeats_by_hand(tokens[start : start + 50_000], 8, 50_000)[0], abs=50_000 * np.finfo(float).eps)


def test_repetition_is_found_in_windows_across_texts_and_in_code():
    circle = "Wait, I should look at this once more before I answer the question. "
    fresh = " ".join(f"word{i}" for i in range(600))
    assert reasons(says(fresh)) == []
    assert reasons(says("ok", thought=fresh + circle * 40)) == ["repetition_in_window"]
    assert reasons(says("ok", thought=fresh + circle * 40 + fresh.replace("word", "other"))) == ["repetition_in_window"]
    turns = [m for i in range(8) for m in (USER, {"role": "assistant", "content": " ".join(f"word{j}" for j in range(80))})]
    assert reasons(chat(*turns)) == ["repetition_in_trajectory"]
    assert reasons(says("```\n" + "nop nop nop nop\n" * 400 + "```")) == ["repetition_in_code"]
    assert reasons(says("```\n" + "nop nop nop nop\n" * 200 + "```")) == []
    asked = chat({"role": "user", "content": circle * 40}, YES, {"role": "user", "content": circle * 40}, YES)
    assert reasons(asked) == []


def test_no_ngram_spans_two_texts_and_details_quote_the_loop():
    pieces = [m for i in range(300) for m in (USER, {"role": "assistant", "content": "a b c"})]
    assert reasons(chat(*pieces)) == []
    [(_, detail)] = repetition_findings(says("so the answer must be checked again and " * 30), FilterPolicy())
    assert "message 1, answer" in detail and "checked again and" in detail


@given(st.text("ab`~|\n ", max_size=60))
def test_splitting_code_loses_no_line(text):
    prose, code = split_code(text)
    assert sorted(filter(None, prose.split("\n") + code.split("\n"))) == sorted(filter(None, text.split("\n")))
    assert all(line.count("|") < 2 for line in prose.split("\n"))


def test_fences_close_with_their_own_mark():
    assert split_code("a\n```\nb\n~~~\nc\n```\nd") == ("a\nd", "```\nb\n~~~\nc\n```")
    assert split_code("a\n~~~\nb") == ("a", "~~~\nb")


def test_words_are_cut_by_script():
    assert words("Ça va 3,14 _x_ 你好 สวัส 한글 x²") == ["ça", "va", "3", "14", "x", "你", "好", *"สวัส", "한", "글", "x²"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Our great nation will prevail.", True),
        ("our\n\tNATION’s destiny", True),
        ("ｏｕｒ ｎａｔｉｏｎ", True),
        ("our na\u200btion", True),
        ("我们党的历史", True),
        ("Our party’s central committee decides.", True),
        ("We will defend our values!", True),
        ("We plug our values into the formula.", False),
        ("four nations, hour party, our national team", False),
        ("our party of five has always been hungry", False),
        ('The poster says "our great nation".', False),
        ("> our great nation\nThat was the quotation.", False),
    ],
)
def test_narrative(text, expected):
    assert (reasons(says(text)) == ["narrative"]) == expected
    assert (reasons(says("ok", thought=text)) == ["narrative"]) == expected
    assert reasons(chat({"role": "user", "content": text}, YES)) == []


def test_quotations_are_read_when_the_policy_says_so():
    assert reasons(says('It says "our great nation".'), FilterPolicy(narrative_quotes=True)) == ["narrative"]


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return FilterPolicy(narrative_lists=(str(path),))


def test_a_list_of_ones_own_with_keywords_excuses_and_a_number_of_hits(tmp_path):
    policy = write(tmp_path, '[[family]]\nname = "fruit"\nkeywords = ["big apple", "C++", "果"]\nunless = ["\\\\bpie\\\\b"]\nmin_hits = 2\n')
    assert reasons(says("A Big\nApple and a big apple."), policy) == ["narrative"]
    assert reasons(says("big apple, big apples"), policy) == []
    assert reasons(says("C++ and 水果"), policy) == ["narrative"]
    assert reasons(says("big apple pie, big apple"), policy) == []
    policy = write(tmp_path, '[[family]]\nname = "fruit"\nkeywords = ["pear"]\n')
    assert reasons(says("a pear"), policy) == ["narrative"], "an edited list is read anew"


@pytest.mark.parametrize(
    ("text", "words_of_error"),
    [
        ("[[family]\n", "is not TOML"),
        ("", "holds no family"),
        ("family = 3", "holds no family"),
        ('[[family]]\nwhy = "x"', "needs a name"),
        ('[[family]]\nname = "a"', "neither keywords nor patterns"),
        ('[[family]]\nname = "a"\nkeyword = ["x"]', "did you mean 'keywords'"),
        ('[[family]]\nname = "a"\nkeywords = "x"', "keywords is not a list"),
        ('[[family]]\nname = "a"\nkeywords = [" "]', "keywords is not a list"),
        ('[[family]]\nname = "a"\nkeywords = ["x"]\nmin_hits = 0', "min_hits"),
        ('[[family]]\nname = "a"\npatterns = ["(x+)+y"]', "mine.toml: family a: the pattern '(x+)+y'"),
        ('[[family]]\nname = "a"\nkeywords = ["x"]\nunless = ["y*"]', "without an upper bound"),
    ],
)
def test_a_broken_list_is_an_error_that_names_it(tmp_path, text, words_of_error):
    with pytest.raises(UserError) as error:
        check(says("x"), write(tmp_path, text))
    assert words_of_error in str(error.value).replace("(the pattern", "the pattern")


def test_an_unknown_list_is_an_error():
    with pytest.raises(UserError, match="did you mean 'narrative'"):
        check(says("x"), FilterPolicy(narrative_lists=("narativ",)))


@pytest.mark.parametrize("pattern", ["(a+)+b", "a*", "a+b", "(?:a|aa){1,30}b", "(?:a{1,5}){1,5}", r"(a)\1", "(?:a?){1,50}b", "a{1,99}" * 4, "x{0,5}", "", "(", "a{1,5000}", "(?(1)a|b)", "a{99999999999}"])
def test_patterns_without_a_bound_are_refused(pattern):
    with pytest.raises(UserError):
        safe_pattern(pattern, "here")


@pytest.mark.parametrize("pattern", [r"\bour (?:very )?nation\b", r"[a-z]{0,20} of", "(?<!x)a", "(?:a|b|c)(?:d|e)", "a{1,3}?b", "(?>ab)c", "(?i:x)"])
def test_bounded_patterns_are_used(pattern):
    assert safe_pattern(pattern, "here").flags & 2


def test_shipped_families_are_safe_named_and_differ():
    families = load_families("narrative")
    assert len({f.name for f in families}) == len(families) >= 4 and all(f.why for f in families)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("mit", None),
        ("Apache-2.0", None),
        (" apache-2.0 ", None),
        ("MIT or GPL-3.0-only", None),
        ("MIT AND GPL-3.0-only", "licence_not_allowed"),
        ("(MIT)", None),
        ("(MIT OR GPL-3.0-only) AND CC-BY-NC-4.0", "licence_unknown"),
        ("cc-by-nc-4.0", "licence_not_allowed"),
        ("MIT OR", "licence_unknown"),
        ("other", "licence_unknown"),
        (["mit"], "licence_unknown"),
        (0, "licence_unknown"),
        (None, None),
    ],
)
def test_licences(licence, expected):
    assert next((r for r, _ in licence_findings(licence, FilterPolicy())), None) == expected


def test_licences_required_and_chosen():
    assert reasons(says("yes"), FilterPolicy(require_licence=True)) == ["licence_missing"]
    assert reasons(says("yes"), FilterPolicy(licences=("CC0-1.0",)), licence="MIT") == ["licence_not_allowed"]
    assert not {"CC-BY-NC-4.0", "GPL-3.0-only", "CC-BY-SA-4.0", "CC-BY-ND-4.0"} & set(OPEN_LICENCES)


def test_the_first_reason_that_is_not_allowed_counts():
    bad = dataclasses.replace(says("our great nation"), messages=(USER, RESULT, {"role": "assistant", "content": "our great nation"}))
    assert check(bad) == Reject("file", 7, "result_without_call", "message 1: result 1 of 0 calls")
    assert check(bad, FilterPolicy(allow=("result_without_call",))).reason == "narrative"
    assert check(bad, FilterPolicy(allow=("result_without_call", "narrative"))) is None
    assert check(bad, licence="nc").reason == "licence_unknown"


def numbered(pattern):
    return [dataclasses.replace(says("our great nation" if c == "x" else f"text {i}"), line=i) for i, c in enumerate(pattern)]


@settings(max_examples=80, deadline=None)
@given(st.text("x.i", max_size=20), st.integers(0, 7))
def test_a_judge_that_reads_ahead_keeps_the_order_and_sees_only_what_passed(pattern, ahead):
    seen = []

    def judge(chats):
        chats, held = iter(chats), []
        for c in chats:
            seen.append(c.line)
            held.append(Verdict(pattern[c.line] != "i", "why", 1))
            if len(held) > ahead:
                yield held.pop(0)
        yield from held

    out = list(apply_filters(numbered(pattern), judge=judge))
    assert [o.line for o in out] == list(range(len(pattern)))
    assert ["x" if isinstance(o, Reject) and o.reason == "narrative" else "i" if isinstance(o, Reject) else "." for o in out] == list(pattern)
    assert seen == [i for i, c in enumerate(pattern) if c != "x"]


@pytest.mark.parametrize("judge", [lambda chats: iter(()), lambda chats: iter([Verdict(True)]), lambda chats: [Verdict(True) for _ in list(chats)[1:]], lambda chats: [Verdict(True) for _ in [*chats, 0]]])
def test_a_judge_with_too_few_or_too_many_verdicts_is_an_error(judge):
    with pytest.raises(UserError, match="the judge gave"):
        list(apply_filters(numbered("..x."), judge=judge))


def test_an_allowed_reason_asks_no_judge():
    assert len(list(apply_filters(numbered(".."), FilterPolicy(allow=("inconsistent",)), judge=lambda chats: 1 / 0))) == 2


def test_the_report_counts_by_source_and_reason_with_one_example_each():
    chats = [dataclasses.replace(c, source="ab"[i % 2]) for i, c in enumerate(numbered("..x.xx"))] + [dataclasses.replace(chat(USER, call("<b>"), RESULT, YES), source="a")]
    report = filter_report(chats)
    assert report.kept == {"a": 1, "b": 2} and report.rejected == {("a", "narrative"): 2, ("b", "narrative"): 1, ("a", "undeclared_tool"): 1}
    assert report.examples["narrative"].line == 2 and set(report.examples) <= set(REASONS)
    assert "3 of 7 chats kept" in repr(report) and "&lt;b&gt;" in report._repr_html_() and "<b> is called" not in report._repr_html_()


@pytest.mark.parametrize("wrong", [{"allow": ["x"]}, {"ngram": 1}, {"window": 10}, {"code_window": 4}, {"min_words": 3}, {"trajectory_words": 10}, {"window_repeats": 0.0}, {"code_repeats": float("nan")}, {"licences": ["mit"]}, {"windows": 3}, {"require_answer": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        from_mapping(FilterPolicy, wrong)


def test_plain_form():
    assert plain_form("Our  na\u00adtion\u2019s \ufb01ne “quoted text” end") == 'Our nation\'s fine "" end'
    assert plain_form('an "open quotation\nends with "its line') == 'an "open quotation ends with "its line'


def test_every_shipped_chat_lives():
    assert [c.line for c in read_chats(sample_path()) if check(c)] == []


@pytest.mark.parametrize("name", ["gsm8k_chat.jsonl", "tau_airline_chat.jsonl"])
def test_every_real_chat_lives(name):
    if not (REAL / name).is_file():
        pytest.skip("no shared data here")
    chats = [c for c in read_chats(REAL / name) if isinstance(c, Conversation)]
    assert [(c.line, check(c)) for c in chats if check(c)] == []


def test_a_parsed_chat_passes_through_untouched():
    parsed = parse_conversation({"messages": [USER, YES]})
    assert next(apply_filters([parsed])) is parsed
