"""A run folder that never was, for the tests that read one."""

import json
import math
from pathlib import Path

from nemotron_nb.core import write_atomic, write_json
from nemotron_nb.ops.run_folder import environment, set_status

HOSTILE = "<script>alert(1)</script><b>&amp;"


def step(number: int) -> dict:
    loss = 1 + 4 * math.exp(-number / 10)
    return {
        "kind": "train",
        "step": number,
        "stage": "token" if number <= 30 else "sample",
        "loss": loss,
        "loss_token": loss,
        "loss_sample": 1.1 * loss,
        "lr": 1e-3 * min(1, number / 5),
        "grad_norm": 1.0,
        "tokens": 900,
        "trained_tokens": 300,
        "conversations": 8,
        "epoch": number / 10,
        "seconds": 0.1,
    }


def evaluation(number: int, loss: float, good: bool) -> dict:
    said = {
        "conversation_id": "c1",
        "prompt": HOSTILE,
        "expected": "4<|im_end|>",
        "generated": HOSTILE + str(number),
        "closed_think": good,
        "well_formed_tool_call": None,
        "ended": good,
        "well_formed": good,
    }
    example = {
        "conversation_id": "c1",
        "pieces": ["<|im_start|>", "user\n", HOSTILE, "4", "<|im_end|>"],
        "roles": ["user", "user", "user", "assistant", "assistant"],
        "trained": [0, 0, 0, 1, 1],
        "nll": [None, None, None, loss, loss / 2],
    }
    return {
        "step": number,
        "loss_token": loss,
        "loss_sample": 1.1 * loss,
        "example": example,
        "generations": [said] * 4,
        "well_formed_rate": 0.75 if good else 0.0,
        "num_generations": 4,
    }


MANIFEST = {
    "format_version": 1,
    "source": f"chats {HOSTILE}.jsonl",
    "tokenizer": "tiny",
    "template": "nano3",
    "pack_size": 512,
    "rows": 103,
    "accepted": 100,
    "rejects": {"unknown_role": 2, "no_messages": 1},
    "dropped_sequences": {"too_long": 1},
    "sequences": 120,
    "tokens": 9000,
    "trained_tokens": 3000,
    "truncated_sequences": 1,
    "truncated_tokens": 40,
    "dropped_tokens": 600,
    "splits": {
        "train": {"conversations": 90, "sequences": 110, "packs": 18, "tokens": 8800, "trained_tokens": 2750, "fill": 0.955},
        "valid": {"conversations": 6, "sequences": 6, "packs": 1, "tokens": 480, "trained_tokens": 150, "fill": 0.94},
        "test": {"conversations": 4, "sequences": 4, "packs": 1, "tokens": 320, "trained_tokens": 100, "fill": 0.625},
    },
    "length_histogram": {"64": 40, "128": 60, "256": 19, "512": 1},
    "warnings": ["one sequence was cut"],
}


def metrics_lines() -> list[dict]:
    valid = [{"kind": "valid", "step": s, "loss_token": 1.2, "loss_sample": 1.4, "trained_tokens": 90, "conversations": 6} for s in (0, 40)]
    return [{"kind": "start", "parameters": 1000, "train_iters": 40, "plan": [["token", 30], ["sample", 10]]}, valid[0], *map(step, range(1, 41)), valid[1], {"kind": "end", "steps": 40, "seconds": 4.0}]


def fabricated_run(folder: Path, state: str = "done") -> Path:
    """Fill `folder` with the files of a run of forty steps, with hostile text wherever a chat's text may stand."""
    set_status(folder, "running")
    set_status(folder, state, message=HOSTILE if state == "failed" else "")
    write_atomic(folder / "config.yaml", "family: nano3\noptimizer:\n  lr: 0.001\ntrain:\n  train_iters: 40\n")
    write_json(folder / "origins.json", {"family": "the command itself", "optimizer.lr": "built in", "train.train_iters": "command line"})
    write_json(folder / "env.json", environment())
    write_json(folder / "manifest.json", MANIFEST)
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics_lines()))
    write_json(folder / "evaluation_before.json", evaluation(0, 5.125, False))
    write_json(folder / "evaluation_after.json", evaluation(40, 1.25, True))
    return folder
