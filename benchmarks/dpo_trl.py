"""Claim: the preference part of the DPO loss, and its gradient, are TRL's.

    pip install --no-deps --target FOLDER trl==0.13.0
    python benchmarks/dpo_trl.py --reference FOLDER [--problems 200]

The method `DPOTrainer.dpo_loss` is read out of TRL's file and called as it stands; the trainer around it, which needs a version of
transformers of its own, is not built. TRL adds no term for the chosen answers, so sft_weight is 0 here.
"""

import argparse
import ast
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nemotron_nb.loss.policy import dpo_loss


def loss_of(folder: Path):
    """Their method, as a function."""
    tree = ast.parse((folder / "trl/trainer/dpo_trainer.py").read_text(encoding="utf-8"))
    trainer = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DPOTrainer")
    method = next(n for n in trainer.body if isinstance(n, ast.FunctionDef) and n.name == "dpo_loss")
    kinds = SimpleNamespace(**{f"{k}_DIVERGENCE": SimpleNamespace(value=k) for k in ("ALPHA", "JS", "REVERSE_KL")})
    known = {"torch": torch, "F": F, "FDivergenceType": kinds}
    exec(compile(ast.Module([method], []), "dpo_trainer.py", "exec"), known)
    return known["dpo_loss"]


def difference(theirs, rng: torch.Generator) -> tuple[float, float]:
    """(loss, largest gradient) of one random problem: how far ours is from theirs."""
    pairs, beta = int(torch.randint(1, 9, (), generator=rng)), float(torch.rand((), generator=rng)) + 0.01
    values = [50 * torch.randn(pairs, generator=rng, dtype=torch.float64) for _ in range(4)]
    mine, other = ([v.clone().requires_grad_(k < 2) for k, v in enumerate(values)] for _ in range(2))
    ours = dpo_loss(*mine, beta=beta, sft_weight=0.0)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), reference_free=False, f_divergence_type="REVERSE_KL", loss_type="sigmoid",
        beta=beta, label_smoothing=0.0,
    )  # fmt: skip
    losses, _, _ = theirs(trainer, *other)
    ours.backward(), losses.mean().backward()
    gradient = max(float((a.grad - b.grad).abs().max()) for a, b in zip(mine[:2], other[:2]))
    return abs(float((ours - losses.mean()).detach())), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=200)
    given = parser.parse_args()
    theirs, rng = loss_of(given.reference), torch.Generator().manual_seed(0)
    found = [difference(theirs, rng) for _ in range(given.problems)]
    print(f"{given.problems} problems: loss differs by at most {max(f[0] for f in found):.1e}, gradient by {max(f[1] for f in found):.1e}")


if __name__ == "__main__":
    main()
