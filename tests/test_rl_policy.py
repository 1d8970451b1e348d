"""The policy loss and the loss for pairs, against fractions, finite differences, and themselves cut in other ways."""

import functools
import math
import random
from fractions import Fraction

import pytest
import torch
from precision import EXACT, float_error, near

from nemotron_nb.core import UserError
from nemotron_nb.loss.policy import (
    CORRECTIONS,
    PolicyRules,
    PolicyStats,
    clipped_loss,
    dpo_loss,
    kl_estimate,
    policy_terms,
)

LOW, HIGH = Fraction(1, 5), Fraction(7, 25)

close = functools.partial(pytest.approx, rel=EXACT, abs=EXACT)  # all is in float64


def by_hand(answers, *, level="token", c=None, weight=lambda w, ws: w):
    """The loss in fractions; `answers` holds (advantage, [(ratio, weight)])."""
    losses = []
    for A, tokens in answers:
        ws = [w for _, w in tokens]
        row = []
        for rho, w in tokens:
            loss = max(-A * rho, -A * min(max(rho, 1 - LOW), 1 + HIGH))
            loss = min(loss, -A * c) if c is not None and A < 0 else loss
            row.append(weight(w, ws) * loss)
        losses.append(row)
    if level == "token":
        return sum(map(sum, losses)) / sum(map(len, losses))
    return sum(sum(row) / len(row) for row in losses) / len(losses)


def random_answers(seed):
    rng = random.Random(seed)
    fraction = lambda: Fraction(rng.randrange(2, 40), 10)
    return [
        (Fraction(rng.randrange(-30, 31), 10), [(fraction(), fraction()) for _ in range(rng.randrange(1, 6))])
        for _ in range(rng.randrange(2, 7))
    ]


def tensors(answers):
    T = max(len(tokens) for _, tokens in answers)
    mask = torch.zeros(len(answers), T, dtype=torch.bool)
    logp, old, sampled = (torch.full((len(answers), T), math.nan, dtype=torch.float64) for _ in range(3))
    for r, (_, tokens) in enumerate(answers):
        for t, (rho, w) in enumerate(tokens):
            mask[r, t], old[r, t] = True, -2.0
            logp[r, t], sampled[r, t] = -2.0 + math.log(rho), -2.0 - math.log(w)
    return logp, old, sampled, torch.tensor([float(a) for a, _ in answers], dtype=torch.float64), mask


@pytest.mark.parametrize("seed", range(20))
def test_loss_in_fractions(seed):
    answers = random_answers(seed)
    args = tensors(answers)
    tokens = sum(len(t) for _, t in answers)
    cases = [
        ({}, {}),
        ({"clip_c": 3.0}, {"c": 3}),
        ({"correction": "none"}, {"weight": lambda w, ws: 1}),
        ({"correction": "tis", "correction_high": 1.5}, {"weight": lambda w, ws: min(w, Fraction(3, 2))}),
        (
            {"correction": "icepop", "correction_low": 0.55, "correction_high": 2.05},
            {"weight": lambda w, ws: w if Fraction(11, 20) <= w <= Fraction(41, 20) else 0},
        ),
        (
            {"correction": "seq-mask-tis", "correction_low": 0.917, "correction_high": 1.683},
            {"weight": lambda w, ws: w if 0.917 <= math.prod(map(float, ws)) ** (1 / len(ws)) <= 1.683 else 0},
        ),
    ]
    for ours, theirs in cases:
        for level, denominator in (("token", tokens), ("sequence", len(answers))):
            expected = float(by_hand(answers, level=level, **theirs))
            assert clipped_loss(*args, denominator=denominator, level=level, **ours).item() == close(expected)


def test_one_ratio_an_answer():
    args = tensors(
        [
            (Fraction(1), [(Fraction(2), Fraction(2)), (Fraction(1, 2), Fraction(1))]),
            (Fraction(-2), [(Fraction(3), Fraction(1))]),
        ]
    )
    loss = clipped_loss(*args, denominator=2, level="sequence", sequence_ratios=True)
    assert loss.item() == close(
        (2 * -1.0 + 6.0) / 2
    )  # ratio sqrt(2 * 1/2) = 1, weight 2 * 1 = 2; ratio 3, weight 1


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradient_against_differences(correction, kl):
    g = torch.Generator().manual_seed(7)
    logp = -2 * torch.rand(4, 5, generator=g, dtype=torch.float64)
    noise = lambda s: logp + s * torch.randn(4, 5, generator=g, dtype=torch.float64)
    old, sampled, reference, A = noise(0.4), noise(0.3), noise(0.3), torch.randn(4, generator=g, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=g) < 0.8
    bounds = {
        "tis": {"correction_high": 1.2},
        "icepop": {"correction_low": 0.5, "correction_high": 1.5},
        "seq-mask-tis": {"correction_low": 0.7, "correction_high": 1.6},
    }.get(correction, {})
    f = lambda x: clipped_loss(
        x,
        old,
        sampled,
        A,
        mask,
        denominator=9,
        clip_c=2.0,
        level="sequence",
        correction=correction,
        reference_logp=reference,
        kl_penalty=0.3,
        kl_type=kl,
        **bounds,
    )
    x = logp.clone().requires_grad_()
    f(x).backward()
    h = 1e-6
    numeric = torch.stack(
        [(f(logp + h * e) - f(logp - h * e)) / (2 * h) for e in torch.eye(20, dtype=torch.float64).view(-1, 4, 5)]
    ).view(4, 5)
    assert (x.grad - numeric).abs().max() < EXACT / h + h  # the rounding of 1 over the step, and the square of the step
    assert (x.grad[~mask] == 0).all()


def test_the_divergence_without_the_sampler_keeps_its_gradient():
    """Value of the weight 1, gradient as if the tokens had been drawn from the policy: that of the expectation."""
    p = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    exact = torch.autograd.grad((p.log_softmax(0).exp() * (p.log_softmax(0) - q)).sum(), p)[0]
    logp, probability = p.log_softmax(0), p.detach().log_softmax(0).exp()
    zero, one = torch.zeros(6, 1, dtype=torch.float64), torch.ones(6, 1, dtype=torch.bool)
    for kl in ("k1", "k3"):
        terms = policy_terms(
            logp[:, None],
            logp.detach()[:, None],
            logp.detach()[:, None],
            zero[:, 0],
            one,
            PolicyRules(kl_penalty=1.0, kl_type=kl, on_policy_kl=False),
            q[:, None],
        )
        assert torch.allclose(terms.divergence, kl_estimate(logp, q, kl).detach(), rtol=EXACT, atol=EXACT)
        got = torch.autograd.grad((terms.loss * probability).sum(), p, retain_graph=True)[0]
        assert torch.allclose(got, exact, rtol=0, atol=EXACT)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cuts_ranks_and_order_change_rounding_only(level):
    g = torch.Generator().manual_seed(3)
    logp, old, sampled = (-torch.rand(16, 20, generator=g) for _ in range(3))
    A, mask = torch.randn(16, generator=g), torch.rand(16, 20, generator=g) < 0.6
    mask[:, 0] = True
    denominator = int(mask.sum()) if level == "token" else 16
    f = lambda rows: clipped_loss(
        logp[rows], old[rows], sampled[rows], A[rows], mask[rows], denominator=denominator, level=level
    )
    whole = f(torch.arange(16))

    def plain(logp, old, sampled, A):
        return clipped_loss(logp, old, sampled, A, mask, denominator=denominator, level=level)

    unit = float_error(plain, logp, old, sampled, A)
    for parts in (
        torch.arange(16).split(1),
        torch.arange(16).split(5),
        torch.randperm(16, generator=g).split(4),
        [torch.arange(r, 16, 3) for r in range(3)],
    ):
        assert near(sum(map(f, parts)), whole, unit)
    owner = torch.arange(16)[:, None].expand_as(mask)[mask]
    pack = clipped_loss(
        *(t[mask] for t in (logp, old, sampled)),
        A[owner],
        torch.ones_like(owner, dtype=torch.bool),
        denominator=denominator,
        level=level,
        sequence_of=owner,
    )
    assert near(pack, whole, unit)


def test_stats_add_up_and_bad_settings_are_refused():
    args = tensors(random_answers(5))
    terms = policy_terms(*args)
    parts = [PolicyStats.of(policy_terms(*(t[r : r + 1] for t in args))) for r in range(len(args[0]))]
    whole, summed = PolicyStats.of(terms).record(), sum(parts, PolicyStats()).record()
    assert whole == close(summed) and whole["largest_logp_gap"] == close(float(terms.gap.abs().max()))
    for wrong in (
        {"level": "tokens"},
        {"clip_c": 1.0},
        {"correction": "tis"},
        {"correction": "icepop", "correction_high": 2.0},
        {"correction_low": 0.1},
        {"sequence_ratios": True},
        {"kl_type": "k4"},
        {"kl_penalty": -1.0},
    ):
        with pytest.raises(UserError):
            PolicyRules(**wrong)
    with pytest.raises(UserError, match="denominator"):
        clipped_loss(*args, denominator=0)
    with pytest.raises(UserError, match="reference"):
        clipped_loss(*args, denominator=1, kl_penalty=0.1)
    with pytest.raises(UserError, match="bool mask"):
        clipped_loss(*args[:4], args[4].float(), denominator=1)


def test_pairs():
    c, r, rc, rr = (
        torch.tensor(x, dtype=torch.float64) for x in ([-10.0, -5.0], [-7.0, -9.0], [-11.0, -5.0], [-6.0, -6.0])
    )
    margins = [0.05 * ((-10 + 11) - (-7 + 6)), 0.05 * (0 - (-9 + 6))]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 2 + 0.2 * (10 + 5) / 2
    assert dpo_loss(c, r, rc, rr).item() == close(expected)
    assert dpo_loss(c, r, c, r).item() == close(math.log(2) + 0.2 * 7.5)
    assert dpo_loss(c, r, rc, rr, preference_weight=0.0, sft_weight=1.0).item() == close(7.5)
    tokens, mask = -torch.rand(3, 6, dtype=torch.float64), torch.arange(6)[None] < torch.tensor([[6], [2], [1]])
    sums, means = tokens.masked_fill(~mask, 0).sum(1), tokens.masked_fill(~mask, 0).sum(1) / mask.sum(1)
    zero = torch.zeros(3, dtype=torch.float64)
    assert dpo_loss(tokens, zero, tokens * 2, zero, chosen_mask=mask).item() == close(
        dpo_loss(sums, zero, sums * 2, zero).item()
    )
    averaged = dpo_loss(tokens, tokens, tokens * 2, tokens, chosen_mask=mask, rejected_mask=mask, average=True)
    assert averaged.item() == close(dpo_loss(means, means, means * 2, means).item())
    for wrong in (
        lambda: dpo_loss(c, r[:1], rc, rr),
        lambda: dpo_loss(c, r, rc, rr, beta=0.0),
        lambda: dpo_loss(c[:0], r[:0], c[:0], r[:0]),
        lambda: dpo_loss(c, r, rc, rr, average=True),
    ):
        with pytest.raises(UserError):
            wrong()
