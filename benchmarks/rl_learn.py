"""Claim: GRPO on the careless start lifts "no call where no tool is declared" from about 0.5 to at least 0.9 in 40 steps, without a dip below the
start, and sums and calls are not worse than before, within what chance explains.

    python benchmarks/rl_learn.py MODEL_FOLDER [--seeds 0 1 2] [--steps N] [--every 5] [--method grpo|dpo|genrm]

MODEL_FOLDER is the start that `nemotron nano3 rl -c tiny` makes: output/nano3/sft/*careless-chats*/model. The tasks are those of that run: 72 to
train on, 24 to measure on, 8 answers to each, so a rate of a kind is of 64 answers. The settings are those of -c tiny, or of -c dpo. With genrm it is
a judge that learns, from *careless-verdicts*/model of `nemotron nano3 rl -c genrm`, and the rate is its reward on pairs it has not seen.
"""

import argparse
import math
import tempfile
import time
from collections import Counter
from dataclasses import replace

from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.rl.grpo import draw_and_judge, grpo_steps, make_policy, measure
from nemotron_nb.rl.preferences import dpo_step, own_pairs, reference_logp, share_pushed_down
from nemotron_nb.rl.prepare import distinct_tasks, prepare_tasks
from nemotron_nb.rl.training import usable_tasks
from nemotron_nb.stages.rl import rl_config
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig


def steps_of(method, policy, tasks, config):
    """The lines of all steps; the weights move between them."""
    if method != "dpo":
        for line, _ in grpo_steps(policy, tasks, config.grpo):
            yield line
        return
    drawing = replace(config.grpo, num_generations_per_prompt=config.dpo.solutions)
    pairs = own_pairs(draw_and_judge(policy, tasks, 0, drawing), policy.tokenizer, config.dpo.pairs_per_task, config.dpo.seed)
    reference = reference_logp(policy.model, pairs)
    for step in range(config.dpo.max_num_steps):
        yield dpo_step(policy, pairs, reference, step, config.dpo) | {"pairs": len(pairs)}


def tasks_of(method, config):
    """(tasks to train on, tasks to measure on) of the run of the command."""
    if method != "genrm":
        held_out = distinct_tasks(24, "held-out")
        return distinct_tasks(72, "train", [t.id for t in held_out]), held_out
    with tempfile.TemporaryDirectory() as folder:
        made = prepare_tasks(config.data, folder)
        return usable_tasks(made.train), usable_tasks(made.val)


def interval(rate, count):
    """Half of a 95 % interval of a difference of two rates like this one."""
    return 1.96 * math.sqrt(2 * rate * (1 - rate) / count)


def learn(folder, seed, given):
    """Train with one seed and say what was seen."""
    tokenizer = load_tokenizer(folder)
    config = rl_config("nano3", "tiny" if given.method == "grpo" else given.method).settings
    steps = given.steps or (config.dpo if given.method == "dpo" else config.grpo).max_num_steps
    grpo, dpo = replace(config.grpo, max_num_steps=steps, seed=seed), replace(config.dpo, max_num_steps=steps, seed=seed)
    config = replace(config, grpo=grpo, dpo=dpo)
    policy = make_policy(build_model(ModelConfig(name=folder), tokenizer.vocab_size), tokenizer, grpo)
    tasks, held_out = tasks_of(given.method, config)
    answers = {kind: n * grpo.num_generations_per_prompt for kind, n in Counter(t.environment for t in held_out).items()}
    seen = {0: measure(policy, held_out, grpo)["rewards"]}
    started, took, used, line = time.perf_counter(), 0.0, time.process_time(), {}
    for line in steps_of(given.method, policy, tasks, config):
        if line["step"] % given.every == 0 or line["step"] == steps:
            took += time.perf_counter() - started
            seen[line["step"]] = measure(policy, held_out, grpo)["rewards"]
            print(f"seed {seed} step {line['step']:2} " + " ".join(f"{k} {v:.2f}" for k, v in seen[line["step"]].items()), flush=True)
            started = time.perf_counter()
    for kind, before in seen[0].items():
        values, noise = [r[kind] for r in seen.values()], interval(before, answers.get(kind, 64))
        word = "better" if values[-1] - before > noise else "worse" if before - values[-1] > noise else "within noise"
        print(f"seed {seed} {kind:8} before {before:.2f}  lowest {min(values):.2f}  after {values[-1]:.2f}  {word} (+-{noise:.2f})", flush=True)
    if given.method == "dpo":
        print(f"seed {seed} {line['pairs']} pairs; chosen {line['chosen']:+.2f}, rejected {line['rejected']:+.2f}: {share_pushed_down(line):.0%} of the margin is pushing down")
    print(f"seed {seed} {took:.0f} s of training, {time.process_time() - used:.0f} s of processor time with measurements", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0: those of the configuration")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--method", choices=("grpo", "dpo", "genrm"), default="grpo")
    given = parser.parse_args()
    for seed in given.seeds:
        learn(given.folder, seed, given)
