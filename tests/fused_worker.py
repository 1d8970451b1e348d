"""Several processes that share a vocabulary: `fork_shards`, or `run_shards`, which starts `fused_worker.py SHARD_SIZES FOLDER` for that.

A process fails if a number is not that of the whole vocabulary.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from forked import forked_ranks
from loss_problems import dense_loss, dense_nll, dense_units, exact, gradients, problem
from precision import assert_as_exact, float_errors

from nemotron_nb.core import UserError
from nemotron_nb.loss.fused import linear_nll, loss_path, masked_linear_cross_entropy


def run_shards(shards: tuple[int, ...], folder: Path, environment: dict[str, str]) -> None:
    """The checks in a new process, which has this environment when it imports the library, and forks a child for each part."""
    command = [sys.executable, __file__, json.dumps(shards), str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def fork_shards(shards: Sequence[int], folder: Path) -> None:
    """The checks in a child of this process for each part of the vocabulary; all must be right."""
    forked_ranks(be_rank, len(shards), shards, folder, folder=folder)


def be_rank(rank: int, shards: Sequence[int], folder: Path) -> None:
    """Join the others, check everything, part."""
    store = dist.FileStore(str(folder / "store"), len(shards))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(shards), timeout=datetime.timedelta(seconds=300))
    main(rank, shards)
    dist.destroy_process_group()


def main(rank: int, shards: Sequence[int]) -> None:
    """Every check, as the process that holds `shards[rank]` words."""
    group = dist.new_group(list(range(len(shards))))
    start, end = sum(shards[:rank]), sum(shards[: rank + 1])
    hidden, weight, labels, weights = problem(11, 4, sum(shards), dtype=torch.float32)
    interpreted = loss_path(hidden, weight)[0] == "triton"
    labels[:4] = torch.tensor([0, sum(shards) - 1, shards[0] - 1, shards[0]])  # both sides of a cut
    mine = weight.detach()[start:end].clone().requires_grad_()
    shard = {"tp_group": group, "vocab_start": start}
    for options in ({}, {"z_coef": 0.1}, {"softcap": 3.0}):
        want = exact(dense_loss, hidden, weight, labels, weights.float(), 0.5, **options)
        units = dense_units(dense_loss, hidden, weight, labels, weights.float(), 0.5, **options)
        for strategy in ("speed", "memory"):
            for workspace_bytes in (None,) if interpreted else (None, 200):  # 200: several chunks, of which each part alone would make another number
                buffer = torch.zeros_like(mine) if options else None
                loss, stats = masked_linear_cross_entropy(
                    hidden, mine, labels, weights, scale=0.5, strategy=strategy, workspace_bytes=workspace_bytes, grad_accum=buffer, **shard, **options
                )
                inputs = (hidden,) if options else (hidden, mine)
                got = gradients(loss, *inputs) + ([buffer] if options else [])
                assert_as_exact(got, [want[0], want[1], want[2][start:end]], units)
    low_hidden, low_weight, low_mine = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight, mine))  # one part may hold its sum in one chunk, another not
    if not interpreted:
        loss, _ = masked_linear_cross_entropy(low_hidden, low_mine, labels, weights, scale=0.5, strategy="speed", workspace_bytes=60, **shard)
        want = exact(dense_loss, low_hidden, low_weight, labels, weights.float(), 0.5)
        units = dense_units(dense_loss, low_hidden, low_weight, labels, weights.float(), 0.5)
        assert_as_exact(gradients(loss, low_hidden, low_mine), [want[0], want[1], want[2][start:end]], units)
    upstream = torch.linspace(-1, 1, 11)
    plain = lambda h, w: torch.autograd.grad(dense_nll(h, w, labels)[0], (h, w), upstream.to(h.dtype))  # noqa: E731
    want = plain(*(t.detach().double().requires_grad_() for t in (hidden, weight)))
    got = torch.autograd.grad(linear_nll(hidden, mine, labels, **shard), (hidden, mine), upstream)
    assert_as_exact(got, [want[0], want[1][start:end]], float_errors(plain, hidden, weight))

    nothing = masked_linear_cross_entropy(hidden, mine, labels, torch.zeros(11), **shard)[0]
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, (hidden, mine)))
    labels[int(weights.nonzero()[0])] = sum(shards)  # a word that no process has
    for strategy in ("speed", "memory"):
        try:
            loss = masked_linear_cross_entropy(hidden, mine, labels, weights, strategy=strategy, **shard)[0]
            assert interpreted and loss.isnan(), "neither refused nor nan"
        except UserError as error:
            assert not interpreted and "outside the vocabulary of all shards" in str(error)


if __name__ == "__main__":
    fork_shards(json.loads(sys.argv[1]), Path(sys.argv[2]))
