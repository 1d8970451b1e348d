"""Claim: GRPO on the careless start model lifts "no call where no tool is declared" from about 0.5 to at least 0.9 in 30 steps, without a dip below the start.

    python benchmarks/rl_learn.py MODEL_FOLDER [--seeds 0 1 2] [--steps 30]

The start model is made by `nemotron_nb.rl.sample_tasks.write_careless_chats` and `nemotron nano3 sft -c tiny data.path=... train.train_iters=350 "loss.stages=[{stage: token}]"`.
"""

import argparse
import time

from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.rl.grpo import GrpoSettings, grpo_steps, make_policy, measure
from nemotron_nb.rl.sample_tasks import sample_tasks
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig


def learn(folder, seed, steps):
    tokenizer = load_tokenizer(folder)
    settings = GrpoSettings(max_num_steps=steps, seed=seed)
    policy = make_policy(build_model(ModelConfig(name=folder), tokenizer.vocab_size), tokenizer, settings)
    held_out, tasks = sample_tasks(24, seed="held-out"), sample_tasks(12 * steps, seed=f"train/{seed}")
    before, started, lowest = measure(policy, held_out, settings), time.perf_counter(), 1.0
    for line, _ in grpo_steps(policy, tasks, settings):
        lowest = min(lowest, line["rewards"]["no_tool"])
        rewards = " ".join(f"{k} {v:.2f}" for k, v in line["rewards"].items())
        print(
            f"seed {seed} step {line['step']:2} {rewards}  groups {line['groups']}  length {line['mean_length']:.1f}  gap {line.get('largest_logp_gap', 0):.1e}  {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    after = measure(policy, held_out, settings)
    print(
        f"seed {seed}: before {before['rewards']}\n        after {after['rewards']}\n        lowest no_tool of a step {lowest:.2f}, {time.perf_counter() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    for seed in given.seeds:
        learn(given.folder, seed, given.steps)
