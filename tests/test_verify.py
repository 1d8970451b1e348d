"""Reading numbers and boxes, verdicts, pass@k and its interval, files of questions; nothing a model writes is run or believed."""

import itertools
import json
import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.generate.verify import (
    VERIFIERS,
    Question,
    answer_of,
    boxed,
    last_number,
    pass_at,
    read_number,
    read_questions,
    score,
    solution_of,
    verify,
    wilson,
)

# ---- numbers


def with_commas(n: int) -> str:
    return f"{n:,}"


@given(st.integers(-(10**12), 10**12))
def test_whole_numbers_are_read_with_and_without_separators(n):
    assert read_number(str(n)) == read_number(with_commas(n)) == read_number(f" {n}. ") == n
    assert read_number(f"${n}$") == n and read_number(str(n).replace("-", "−")) == n


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_are_exact(a, b):
    assert read_number(f"{a}/{b}") == read_number(rf"\frac{{{a}}}{{{b}}}") == read_number(rf"\dfrac{{{a}}}{{{b}}}") == Fraction(a, b)


@given(st.decimals(-(10**9), 10**9, places=4), st.integers(-20, 20))
def test_decimals_percent_and_powers_of_ten(d, e):
    text = f"{d:f}"
    assert read_number(text) == Fraction(text) and read_number(text + "%") == read_number(text + r"\%") == Fraction(text) / 100
    value = Fraction(text) * Fraction(10) ** e
    assert read_number(f"{text}e{e}") == read_number(rf"{text} \times 10^{{{e}}}") == read_number(f"{text} × 10^{e}") == value


@pytest.mark.parametrize("text", ["", " ", "-", ".", "1,23", "12,34", "1,2345", "1.2.3", "1/0", r"\frac{1}{0}", "1//2", "nan", "inf", "-inf", "Infinity", "0x1f", "1_000", "٣", "１", "1 2", "7 apples", "+-1", "1e", "1e1000", "1e+99999", "(1)", "1+1", "2**8", "10^3", "𝟙"])
def test_what_is_no_number_or_could_be_two_is_not_read(text):
    assert read_number(text) is None


@settings(max_examples=300)
@given(st.text(max_size=120))
def test_any_text_is_read_or_not_and_never_raises(text):
    value = read_number(text)
    assert value is None or isinstance(value, Fraction)
    found = last_number(text)
    assert found is None or found in text
    assert boxed(text) is None or boxed(text) in text


@given(st.integers(0, 10**9), st.sampled_from(["It is {}.", "{} euros", "about ${}, I think", "= {}", "1 + 2 = {}", "は{}です。", "({})", "**{}**"]))
def test_the_last_number_of_a_sentence(n, sentence):
    assert read_number(last_number(sentence.format(n))) == read_number(last_number(sentence.format(with_commas(n)))) == n


@pytest.mark.parametrize(("text", "number"), [("x2", None), ("H2O and CO2", None), ("from 3 to 5", "5"), ("3-4", "4"), ("-3", "-3"), ("a -3", "-3"), ("3/4 of it", "3/4"), ("50 %", "50 %"), ("6.02 × 10^23 things", "6.02 × 10^23"), ("1,2,3", "1,2,3"), (r"\frac{3}{4}", r"\frac{3}{4}"), ("so 5!", "5"), ("10,", "10"), ("v1.2.3", None)])
def test_last_numbers(text, number):
    assert last_number(text) == number


# ---- boxes

braces = st.recursive(st.text("ab1 +", max_size=4), lambda inner: st.builds("{}{{{}}}{}".format, inner, inner, inner), max_leaves=6)


@given(braces, st.text("xyz ", max_size=5))
def test_nested_braces_come_out_whole(inside, around):
    assert boxed(rf"{around}\boxed{{{inside}}}{around}") == inside
    assert boxed(rf"\boxed{{0}} {around} \boxed{{{inside}}}") == inside
    assert boxed(rf"{around}\boxed{{{inside}") is None


def test_escaped_braces_are_characters():
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}" and boxed(r"\boxed{\{}") == r"\{"


# ---- verdicts


@pytest.mark.parametrize(("answer", "solution", "verifier", "right", "by"), [
    ("It is 72.", "72", "auto", True, "last_number"), ("It is 73.", "72", "auto", False, "last_number"), ("72 or 73", "72", "auto", False, "last_number"),
    ("72", "72.0", "numeric", True, "numeric"), ("It is 72", "72", "numeric", False, "numeric"), ("0.333333333", "1/3", "numeric", True, "numeric"), ("0.333", "1/3", "numeric", False, "numeric"),
    ("50%", "0.5", "auto", True, "last_number"), ("50%", "50", "auto", False, "last_number"), ("1,000", "1000", "auto", True, "last_number"),
    (r"\boxed{5}, not 6", "5", "auto", True, "boxed"), (r"\boxed{\dfrac{1}{2}}", "0.5", "boxed", True, "boxed"), (r"\boxed{x^{2}}", "$x^{2}$", "boxed", True, "boxed"), ("no box: 5", "5", "boxed", False, "boxed"),
    ("Paris", "Paris", "auto", True, "exact"), ("Paris!", "Paris", "exact", False, "exact"), (" a  b\n", "a b", "exact", True, "exact"), ("72", "#### 72", "auto", True, "last_number"), ("72", r"so \boxed{72}", "auto", True, "last_number"),
    ("", "1", "auto", False, "nobody"), (None, "1", "exact", False, "nobody"), ("  ", "1", "boxed", False, "nobody"),
])
def test_verdicts_and_who_gave_them(answer, solution, verifier, right, by):
    found = verify(answer, solution, verifier)
    assert (found.right, found.by, found.expected) == (right, by, solution_of(solution))


@settings(max_examples=200)
@given(st.text(max_size=60), st.text(min_size=1, max_size=20).filter(str.strip), st.sampled_from(sorted(VERIFIERS)))
def test_a_verdict_never_raises_and_exact_is_reflexive(answer, solution, verifier):
    assert verify(answer, solution, verifier).right in (True, False)
    if solution_of(solution):
        assert verify(solution_of(solution), solution, "exact").right


def test_hostile_answers_are_neither_run_nor_slow(tmp_path):
    mark = tmp_path / "was-run"
    hostile = [f"__import__('pathlib').Path({str(mark)!r}).touch()", f"\\boxed{{__import__('os').system('touch {mark}')}}", "9**9**9**9", "(" * 10**5, "\\boxed{" * 10**5, "\\boxed{" + "{" * 3 * 10**5, "{}" * 10**5, "9" * 10**6, "1e9999999999", "1," * 3 * 10**5, "-" * 10**6, "1/" * 3 * 10**5, "\\frac{" * 10**5, "1.5e" * 10**5, "$" * 10**6, "\x00\ud800\u202e"]
    started = time.process_time()
    assert not any(verify(text, "25", name).right for text in hostile for name in VERIFIERS)
    assert time.process_time() - started < 20 and not mark.exists()  # quadratic readers would take hours


def test_an_unclosed_thought_is_no_answer():
    assert answer_of("25", True) is None and answer_of("25", False) == "25"
    assert answer_of("it is 24\n</think>\nIt is 25.<|im_end|>\n", True) == "It is 25."
    assert not verify(answer_of("so 25", True), "25").right


# ---- scores


def by_enumeration(k, n, c):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    return sum(map(any, draws)) / len(draws)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n):
    for k, c in itertools.product(range(1, n + 1), range(n + 1)):
        assert pass_at(k, n, c) == pytest.approx(by_enumeration(k, n, c))


@pytest.mark.parametrize("wrong", [(0, 1, 1), (2, 1, 1), (1, 2, 3), (1, 2, -1)])
def test_pass_at_k_refuses_what_cannot_be(wrong):
    with pytest.raises(UserError, match="pass@k"):
        pass_at(*wrong)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_the_interval_holds_the_share_and_stays_in_0_to_1(n, share):
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1 and high - low > 0


@pytest.mark.parametrize(("share", "n", "expected"), [(0.5, 10, (0.236594, 0.763406)), (0.0, 20, (0.0, 0.161125)), (0.1, 50, (0.043480, 0.213617))])
def test_the_interval_against_published_values(share, n, expected):
    """Wilson (1927), as tabulated by statsmodels' proportion_confint(method="wilson")."""
    assert wilson(share, n) == pytest.approx(expected, abs=0.5e-4)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    n, p = 30, 0.2
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert 0.93 < sum(q for c, q in enumerate(chance) if wilson(c / n, n)[0] <= p <= wilson(c / n, n)[1]) < 0.98


def test_a_score_counts_hits_and_questions():
    found = score([[True, False], [False, False], [True, True]], k=2)
    assert (found.questions, found.tests, found.hits, found.total, found.value) == (3, 2, 3, 6, pytest.approx(2 / 3))
    assert (score([]).value, score([]).low, score([]).high) == (0.0, 0.0, 1.0)
    with pytest.raises(UserError, match="different numbers"):
        score([[True], [True, False]])


# ---- files


def test_bad_lines_are_listed_and_good_ones_taken(tmp_path):
    rows = ['{"problem": "a?", "solution": "1", "domain": "x"}', "", "{", '{"problem": "a?", "solution": "2"}', '{"problem": "b?"}', '{"problem": "c?", "solution": 2.5}', '{"problem": "d?", "solution": true}', '{"problem": ["e"], "solution": "1"}', "null", '{"problem": "f?", "solution": "NaN", "domain": 7}']
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(rows))
    found, rejects = read_questions(path)
    assert found == [Question("a?", "1", "x", 1), Question("c?", "2.5", "quiz", 6), Question("f?", "NaN", "quiz", 10)]
    assert [(r.line, r.reason) for r in rejects][1:] == [(4, "asked_twice"), (5, "no_solution"), (7, "no_solution"), (8, "no_problem"), (9, "no_problem")] and rejects[0].line == 3
    assert all(r.source == str(path) and r.detail for r in rejects)


def test_keys_are_those_that_are_asked_for(tmp_path):
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps({"question": "a?", "answer": "so #### 5"}))
    assert verify("It is 5.", read_questions(path, "question", "answer")[0][0].solution).right
    with pytest.raises(UserError, match="the row has question, answer"):
        read_questions(path)
