"""Advantages: fractions as the oracle, the traps of the arithmetic, and what leaves a group."""

import math
import random
import sys
from fractions import Fraction

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.rl.advantage import (
    LIVE,
    SILENT,
    UNJUDGED,
    AdvantageRules,
    advantage_strip,
    group_advantages,
    value_group,
)


def by_hand(rewards, leave_one_out, normalize):
    found = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :] if leave_one_out else rewards
        b = sum(others) / Fraction(len(others))
        s2 = sum((x - b) ** 2 for x in others) / (len(others) - 1) if len(others) > 1 else Fraction(0)
        found.append(float(r - b) / (math.sqrt(s2) + 1e-6) if normalize and s2 > 0 else float(r - b))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_fractions(seed, leave_one_out, normalize):
    rng = random.Random(seed)
    base = rng.choice([0, 3, 100, 10_000])
    rewards = [base + Fraction(rng.randrange(100), 100) for _ in range(rng.randrange(2, 17))]
    got = group_advantages(
        [float(r) for r in rewards], leave_one_out=leave_one_out, normalize=normalize, deviation_floor=0.0
    )
    lost = 1e6 * sys.float_info.epsilon  # of 10,000 beside the hundredth that it is divided by
    assert got == pytest.approx(
        by_hand(rewards, leave_one_out, normalize), rel=8 * lost, abs=8 * lost
    )


def test_the_published_example_and_the_traps():
    assert group_advantages([1, 0, 0, 0]) == pytest.approx(
        [1, *[-1 / math.sqrt(3)] * 3], abs=2 * 1e-6
    )  # the published numbers leave out the 1e-6 that is added to the deviation
    assert group_advantages([100.01, 100.02, 100.03, 100.015])[0] == pytest.approx(
        -1.5275, abs=0.5e-3
    )  # one pass in float32 says -0.0117
    close = [0.13092, 0.98764, 0.13099]
    assert max(group_advantages(close, deviation_floor=0.0)) > 10_000 > 1 > max(group_advantages(close))
    assert (
        group_advantages([0.5]) == [0.0] and group_advantages([]) == [] and group_advantages([None, 1.0]) == [0.0, 0.0]
    )
    for wrong in ([0.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(UserError):
            group_advantages(wrong)
    with pytest.raises(UserError):
        group_advantages([0, 1], deviation_floor=-1)


def test_failed_answers_leave_the_group_and_cut_ones_stay_in_the_baseline():
    group = value_group([1, None, 0, 0], [False] * 4)
    assert group.advantages == pytest.approx([*group_advantages([1, 0, 0])[:1], 0.0, *group_advantages([1, 0, 0])[1:]])
    assert (group.trained, group.status, group.failed) == ((True, False, True, True), LIVE, 1)
    cut = value_group([1, 0, 0, 0], [False, False, False, True], AdvantageRules(overlong_filtering=True))
    assert (
        cut.advantages == pytest.approx(group_advantages([1, 0, 0, 0]))
        and cut.trained == (True, True, True, False)
        and cut.filtered == 1
    )
    assert value_group([1, 1, None], [False] * 3).status == SILENT
    alone = value_group([1, None, None], [False] * 3)
    assert alone.status == UNJUDGED and not any(alone.trained)


def test_the_strip_escapes():
    picture = advantage_strip(["<script>", "x"], [None, -0.5])
    assert "<script>" not in picture.html and "advantage -0.500" in picture.html
