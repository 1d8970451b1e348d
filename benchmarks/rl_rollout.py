"""Tokens per second of the group sampler, beside `train.evaluate.generate`, on the tiny model. Run by hand: python benchmarks/rl_rollout.py [MODEL_FOLDER]

Without a folder the model has random weights, so that almost no row ends early and every row is as long as the limit.
"""

import sys
import time

import torch

from nemotron_nb.data.template import chunks
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.rl.rollout import sample_groups
from nemotron_nb.generate.sampling import Sampling, generate
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

PROMPTS, GROUP, LIMIT, REPEATS = 12, 16, 80, 3
QUESTION = "What is {a} + {b}? Answer in one short sentence."


def prompt_ids(tokenizer, text):
    return [
        i
        for c in chunks([{"role": "user", "content": text}], add_generation_prompt=True)
        for i in tokenizer.encode_pieces(c.pieces)
    ]


def rate(act):
    """Tokens per second, the best of a few: (rate, tokens)."""
    best, tokens = 0.0, 0
    for _ in range(REPEATS):
        started = time.perf_counter()
        tokens = act()
        best = max(best, tokens / (time.perf_counter() - started))
    return best, tokens


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else ""
    tokenizer = load_tokenizer(folder or "tiny")
    model = build_model(ModelConfig(name=folder) if folder else ModelConfig(), tokenizer.vocab_size).eval()
    prompts = {f"q{k}": prompt_ids(tokenizer, QUESTION.format(a=k * 37, b=k + 5)) for k in range(PROMPTS)}
    print(
        f"{PROMPTS} prompts x {GROUP} answers of at most {LIMIT} tokens, {torch.get_num_threads()} threads, best of {REPEATS}"
    )
    rates = {}
    for rows in (16, 64, 256):
        rates[rows], tokens = rate(
            lambda: sum(
                len(r.drawn)
                for g in sample_groups(model, prompts, GROUP, tokenizer.im_end_id, LIMIT, rows=rows)
                for r in g
            )
        )
        print(f"rl.rollout, {rows:3} rows side by side: {rates[rows]:7,.0f} tokens/s ({tokens:,} tokens)")
    side_by_side = 64 * (max(map(len, prompts.values())) + LIMIT)
    slow, tokens = rate(
        lambda: sum(
            map(
                len,
                generate(
                    model, list(prompts.values()), tokenizer.im_end_id, LIMIT, side_by_side, Sampling(1.0), None, GROUP
                ),
            )
        )
    )
    print(f"train.evaluate.generate, 64 rows:       {slow:7,.0f} tokens/s ({tokens:,} tokens)")
    print(f"ratio at 64 rows: {rates[64] / slow:.1f}")


if __name__ == "__main__":
    main()
