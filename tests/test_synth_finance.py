"""Questions about accounts: they add up, the answer is exact, and a changed row is refused whatever was changed."""

import random
import re
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from synth_rows import configs_of, prepared, reasons, right, spoilt

from nemotron_nb.synth.finance import (
    LINES, MEASURES, broken_identities, draw_company, question_text, read_tables, rounded, statement_tables, work_out,
)  # fmt: skip
from nemotron_nb.synth.row import Drop


def rows():
    return right("finance", 200, 215)


def test_right_rows_pass_and_are_prepared(tmp_path):
    assert reasons("finance", rows()) == {"": len(rows())}
    prepared(rows(), tmp_path)


def companies(count):
    for seed in range(count):
        try:
            yield draw_company(random.Random(seed))
        except Drop as drop:
            assert drop.reason == "insolvent"


def test_accounts_add_up_and_are_read_back():
    found = list(companies(300))
    assert len(found) > 250
    for company in found:
        assert broken_identities(company.years) == []
        years = read_tables(statement_tables(company))
        assert years == {y: {n: year[n] for lines in LINES.values() for n in lines} for y, year in company.years.items()}


def test_any_changed_amount_breaks_an_identity():
    """Lines of a year that stands alone at the edge may hang on the year before, which is not shown: they are counted."""
    kept = []
    for company in list(companies(30)):
        for number in company.years:
            for name in (n for lines in LINES.values() for n in lines):
                years = {n: dict(year) for n, year in company.years.items()}
                years[number][name] += 1
                kept += [] if broken_identities(years) else [name]
    assert kept == []


def test_rounding_is_half_up_and_exact():
    rng = random.Random(0)
    for _ in range(3000):
        value, places = Fraction(rng.randint(-(10**9), 10**9), rng.choice((3, 7, 8, 1000, 2000, 99991))), rng.randint(0, 3)
        with localcontext() as context:
            context.prec = 60
            exact = Decimal(value.numerator) / Decimal(value.denominator)
            wanted = exact.quantize(Decimal(1).scaleb(-places), "ROUND_HALF_UP")
        assert rounded(value, places) == wanted


def test_measures_by_hand():
    year = {"Revenue": 1000, "Cost of sales": 600, "Gross profit": 400, "Short-term debt": 10, "Long-term debt": 90, "Cash": 130}
    assert MEASURES["gross_margin"].of(year) == 40
    assert MEASURES["net_debt"].of(year) == -30
    years = {2020: year, 2021: {**year, "Revenue": 1600}}
    asked = {"kind": "growth", "line": "Revenue", "first": 2020, "last": 2021, "places": 1}
    assert work_out(years, asked)[0] == 60
    assert work_out(years, {"kind": "change", "measure": "gross_margin", "first": 2020, "last": 2021})[0] == -15
    assert work_out(years, {"kind": "best_year", "measure": "gross_margin"})[0] == 2020
    with pytest.raises(Drop, match="no_one_best"):
        work_out(years, {"kind": "best_year", "measure": "net_debt"})
    with pytest.raises(Drop, match="no_denominator"):
        work_out({2020: {**year, "Revenue": 0}}, {"kind": "value", "measure": "gross_margin", "year": 2020})


def edit(row, turn, pattern, new):
    text, count = re.subn(pattern, new, row["messages"][turn]["content"], count=1, flags=re.M)
    row["messages"][turn]["content"] = text
    return bool(count)


def one_more(match):
    return f"{(int(match[1]) + 1) % 10 or 1}{match[2]}"


def a_digit_of_a_table(row):
    return edit(row, 0, r"(?<=[a-z] \| )(\d)([\d,]+ \|)", one_more)


def a_sign_of_a_table(row):
    return edit(row, 0, r"(?<=[a-z] )\| ([\d,]{3,}) \|", r"| (\1) |")


def a_line_lost(row):
    return edit(row, 0, r"^\| Inventories.*\n", "")


def a_year_lost(row):
    return edit(row, 0, r"^\| \| (\d+) \|", r"| |")


def another_unit(row):
    text = row["messages"][0]["content"]
    row["messages"][0]["content"] = text.replace("thousands)", "x)").replace("millions)", "thousands)").replace("x)", "millions)")


def another_digit_of_the_answer(row):
    return edit(row, 1, r"(\d)(\D*)\Z", lambda m: f"{(int(m[1]) + 1) % 10}{m[2]}")


def another_unit_of_the_answer(row):
    return edit(row, 1, r"(times|days|%|millions|thousands)(\**\.?)\Z", r"apples\2")


def more_after_the_answer(row):
    row["messages"][1]["content"] += "\nOr thereabouts."


def another_year_in_the_question(row):
    return edit(row, 0, r"(in|for|to|between|year|of) (20\d\d)(?=[^|]*\?)", lambda m: f"{m[1]} {int(m[2]) + 1}")


def another_rule_of_rounding(row):
    return edit(row, 0, "rounded half up to", "rounded down to")


def another_step(row):
    return edit(row, 1, r"(\d)(\D*\n)", lambda m: f"{(int(m[1]) + 1) % 10}{m[2]}")


def answer_of_a_user(row):
    row["messages"][1]["role"] = "user"


WRONGS = {
    a_digit_of_a_table: {"identity_broken"}, a_sign_of_a_table: {"identity_broken"}, a_line_lost: {"unreadable_tables"},
    a_year_lost: {"unreadable_tables"}, another_unit: {"other_unit"},
    another_digit_of_the_answer: {"wrong_answer"}, another_unit_of_the_answer: {"wrong_answer"},
    more_after_the_answer: {"wrong_answer"}, another_year_in_the_question: {"other_question"},
    another_rule_of_rounding: {"other_question"}, another_step: {"other_steps"}, answer_of_a_user: {"wrong_answer"},
}  # fmt: skip


@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    wrong = spoilt(rows(), spoil)
    assert len(wrong) >= 40
    assert set(reasons("finance", wrong)) <= WRONGS[spoil]


def test_rows_differ_and_settings():
    assert len({row["synth"]["answer"] for row in rows()}) > 150
    asked = [row["synth"]["check"]["asked"] for row in rows()]
    assert len({question_text(a, "X", "millions") for a in asked}) > 180
    assert {kind: settings.rows for kind, settings in configs_of("finance").items()} == {"default": 10000, "tiny": 200}
