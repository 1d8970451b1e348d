"""Low effort and budgets: the reward in fractions, budgets met exactly, forced tokens never trained."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from precision import FACTOR

from nemotron_nb.core import UserError
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.rl.effort import EffortSettings, effort_reward, sample_budgeted, with_effort
from nemotron_nb.rl.grpo import GrpoSettings, draw_and_judge, make_policy, prompt_ids, step_record
from nemotron_nb.rl.judgement import said
from nemotron_nb.rl.rollout import Ask, Draw, continue_all, continue_slowly, read_rollouts, rollout_row, write_rollouts
from nemotron_nb.rl.sample_tasks import sample_tasks
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

TOKENIZER = load_tokenizer("tiny")
CLOSE = TOKENIZER.special_ids["</think>"]


def model_that_thinks_now_and_then():
    model = build_model(ModelConfig(hidden_size=32, pattern="ME*", experts=2), TOKENIZER.vocab_size, seed=1)
    with torch.no_grad():
        model.lm_head.weight[[CLOSE, TOKENIZER.im_end_id, *range(300, 1400, 100)]] *= 14
    return model


@pytest.mark.parametrize("reward", [0, 1, Fraction(1, 2)])
@pytest.mark.parametrize("length", [0, 1, 1499, 3000, 3001, 100_000])
def test_the_reward_by_hand(reward, length):
    weight = min(Fraction(1), Fraction(1, 5) * (1 - Fraction(length, 3000)))
    exact = reward + reward * max(weight, 0) + min(weight, 0)
    assert abs(effort_reward(float(reward), length, EffortSettings()) - float(exact)) <= FACTOR * 8 * 2.0**-52


@pytest.mark.parametrize("budget", [1, 2, 5, 40])
def test_budgets_are_met_exactly_and_what_is_forced_is_not_trained(budget, tmp_path):
    model, prompts = model_that_thinks_now_and_then(), {f"t{k}": prompt_ids(t, TOKENIZER) for k, t in enumerate(sample_tasks(2))}
    how = {"end_id": TOKENIZER.im_end_id, "max_new_tokens": 12}
    found, slow = (
        sample_budgeted(partial(draw, model, **how), prompts, dict.fromkeys(prompts, budget), 4, TOKENIZER, 12, seed=3)
        for draw in (continue_all, continue_slowly)
    )
    rollouts = [r for group in found for r in group]
    assert [r.ids for r in rollouts] == [r.ids for group in slow for r in group]
    for r in rollouts:
        forced = [s for s in r.segments if s.who == "forced"]
        assert bool(forced) == r.info["cut"] and len(r.logp) <= 12
        thought = r.ids[len(r.prompt) : r.ids.index(CLOSE, len(r.prompt))] if CLOSE in r.ids[len(r.prompt) :] else ()
        if r.info["cut"]:
            at = forced[0].start
            assert at - len(r.prompt) == budget == r.info["thought"] and CLOSE in r.ids[at : forced[0].end]
            assert not any(r.mask[at : forced[0].end]) and rollout_row(r).mask.sum() == len(r.logp)
        else:
            assert len(thought) <= budget
    plain = continue_slowly(model, [Ask(r.prompt, Draw(r.task, 0, r.member, 3)) for r in rollouts], **how)
    same = [(r, p) for r, p in zip(rollouts, plain) if not r.info["cut"]]
    assert all(r.drawn == p.ids for r, p in same), "a budget that is not reached changes no draw"
    assert budget == 40 or any(r.info["cut"] for r in rollouts)
    assert [r.segments for r in read_rollouts(write_rollouts(tmp_path / "r.jsonl", rollouts))] == [r.segments for r in rollouts]


def test_a_step_asks_pays_and_counts():
    effort = EffortSettings(low_start=0.5, low_end=0.5, bound=4, budget_share=1.0, min_budget=2, max_budget=4)
    settings = GrpoSettings(num_prompts_per_step=6, num_generations_per_prompt=4, max_new_tokens=10, effort=effort)
    policy = make_policy(model_that_thinks_now_and_then(), TOKENIZER, settings)
    answers = draw_and_judge(policy, sample_tasks(6), 0, settings, lambda task, reply: said(1.0, "always"))
    low = [a for a in answers if a.task.extra.get("effort") == "low"]
    cut = [a for a in answers if a.task.extra.get("budget")]
    assert low and cut and len(low) + len(cut) == 6
    assert all(j.reward == effort_reward(1.0, len(r.logp), effort) for a in low for r, j in zip(a.rollouts, a.judgements))
    assert all(j.reward == 1.0 for a in cut for j in a.judgements)
    line = step_record(answers, 0)
    assert line["low_effort"]["tasks"] == len(low) and line["budgets"]["answers"] == 4 * len(cut)
    measured = draw_and_judge(policy, sample_tasks(6), -1, settings, lambda task, reply: said(1.0, "always"))
    assert "low_effort" not in step_record(measured, -1), "what is measured is asked as it is"


def test_choice_follows_the_name_and_settings_are_checked():
    tasks, some = sample_tasks(40), EffortSettings(0.3, 0.1, budget_share=0.3)
    first = [with_effort(f"t{k}", t, 2, 9, some) for k, t in enumerate(tasks)]
    assert first == [with_effort(f"t{k}", t, 2, 9, some) for k, t in enumerate(tasks)]
    assert first != [with_effort(f"t{k}", t, 3, 9, some) for k, t in enumerate(tasks)]
    for wrong in ({"low_start": -0.1}, {"bound": 0}, {"min_budget": 5, "max_budget": 4}, {"budget_scale": "lg"}):
        with pytest.raises(UserError):
            EffortSettings(**wrong)
