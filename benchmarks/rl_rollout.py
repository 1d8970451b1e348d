"""Tokens per second of the group sampler on the tiny model, beside its slow twin and `generate.sampling.generate`.

Run by hand: python benchmarks/rl_rollout.py [MODEL_FOLDER]. Without a folder the model has random weights, so that almost
no row ends early and every row is as long as the limit. Rates are given for the clock and for the processor's time: on a
machine that is shared the second says more.
"""

import statistics
import sys
import time

import torch

from nemotron_nb.data.template import chunks
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.rl.rollout import Ask, Draw, continue_slowly, sample_groups
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


def rate(name, act, repeats=REPEATS):
    """Tokens per second of the clock and of the processor, medians; printed. The second one."""
    clock, processor, tokens = [], [], 0
    for _ in range(repeats):
        before = time.perf_counter(), time.process_time()
        tokens = act()
        clock.append(tokens / (time.perf_counter() - before[0]))
        processor.append(tokens / (time.process_time() - before[1]))
    print(
        f"{name:40} {statistics.median(clock):7,.0f} tokens/s, {statistics.median(processor):7,.0f} "
        f"for a second of the processor ({tokens:,} tokens)",
        flush=True,
    )
    return statistics.median(processor)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else ""
    tokenizer = load_tokenizer(folder or "tiny")
    model = build_model(ModelConfig(name=folder) if folder else ModelConfig(), tokenizer.vocab_size).eval()
    prompts = {f"q{k}": prompt_ids(tokenizer, QUESTION.format(a=k * 37, b=k + 5)) for k in range(PROMPTS)}
    threads = torch.get_num_threads()
    print(f"{PROMPTS} prompts x {GROUP} answers of at most {LIMIT} tokens, {threads} threads, median of {REPEATS}")
    end, rates = tokenizer.im_end_id, {}

    def groups(rows):
        """Drawn tokens of all groups."""
        return sum(len(r.drawn) for g in sample_groups(model, prompts, GROUP, end, LIMIT, rows=rows) for r in g)

    for rows in (16, 64, 256):
        rates[rows] = rate(f"rl.rollout, {rows} rows side by side", lambda: groups(rows))
    side_by_side = 64 * (max(map(len, prompts.values())) + LIMIT)
    plain = list(prompts.values())
    peer = rate(
        "generate.sampling.generate, 64 rows",
        lambda: sum(map(len, generate(model, plain, end, LIMIT, side_by_side, Sampling(1.0), None, GROUP))),
    )
    asks = [Ask(tuple(ids), Draw(name, 0, 0)) for name, ids in list(prompts.items())[:2]]
    slow = rate("the slow twin", lambda: sum(len(c.ids) for c in continue_slowly(model, asks, end, LIMIT)), 1)
    print(f"at 64 rows: {rates[64] / peer:.1f} times generate, {rates[64] / slow:.0f} times the slow twin (processor)")


if __name__ == "__main__":
    main()
