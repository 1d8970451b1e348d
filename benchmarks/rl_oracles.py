"""Claim: NeMo RL's own typed configuration accepts ours, and its loss, gradient, advantages and DPO loss are ours.

    git clone https://github.com/NVIDIA-NeMo/RL CHECKOUT        (the figures of the lessons: revision 7ea279ab)
    python benchmarks/rl_oracles.py --reference CHECKOUT [--problems 200]

Nothing of NeMo RL is installed. Its files are imported as they stand; Ray, vLLM, W&B and what else is needed to run it, but not to read a
configuration or to compute a loss, is replaced by stand-ins, which are listed. Its check of the version of transformers is told what it
wants to hear. Where a key of ours is in no type and in no file of theirs, it is listed: their types accept unknown keys without a word.
"""

import argparse
import importlib.abc
import importlib.machinery
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typing_extensions
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError
from pydantic_core import core_schema

from nemotron_nb.loss.policy import clipped_loss, dpo_loss
from nemotron_nb.ops.config import flatten
from nemotron_nb.rl.advantage import group_advantages
from nemotron_nb.rl.nemo_rl import MOVED
from nemotron_nb.stages.rl import cluster_config, rl_config

STAND_INS = "ray vllm wandb mlflow swanlab megatron nemo_automodel sglang tensorrt_llm torchdata nemo_gym pynvml uvicorn fastapi soundfile tensordict aiohttp".split()
STAGES = {  # ours -> their file, upon which ours is laid
    ("nano3", "default"): "examples/nemo_gym/grpo_nanov3.yaml",
    ("super3", "default"): "examples/nemo_gym/nemotron-3-super/stage1_rlvr.yaml",
    ("super3", "rlvr"): "examples/nemo_gym/nemotron-3-super/stage1_rlvr.yaml",
    ("super3", "swe1"): "examples/nemo_gym/nemotron-3-super/stage2_swe1.yaml",
    ("super3", "swe2"): "examples/nemo_gym/nemotron-3-super/stage2_swe2.yaml",
    ("super3", "rlhf"): "examples/nemo_gym/nemotron-3-super/stage3_rlhf.yaml",
}


class Anything(type):
    """A class whose attributes, items and calls are again anything; as a decorator it changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(f"{cls.__name__}.{name}")

    def __call__(cls, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and not named and callable(given[0]) else anything(f"{cls.__name__}()")

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


def anything(name: str) -> Any:
    """A stand-in; as a type of a configuration it takes any value."""
    return Anything(name, (), {"__get_pydantic_core_schema__": classmethod(lambda c, source, handler: core_schema.any_schema())})


class StandIn(types.ModuleType):
    """A module that has everything."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = anything(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for each package that is not needed here."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        top = name.partition(".")[0]
        if top not in STAND_INS:
            return None
        self.used.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to execute."""


def import_reference(checkout: Path) -> Finder:
    """Make `nemo_rl` of the checkout importable."""
    import transformers  # noqa: F401  (before its version is told: importing more of it sets the true one again)
    from transformers import AutoProcessor, AutoTokenizer  # noqa: F401
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase  # noqa: F401

    sys.modules["transformers"].__version__ = "5.11.0"
    typing.TypedDict = typing_extensions.TypedDict  # before Python 3.12 pydantic wants this one
    finder = Finder()
    for name in [n for n in sys.modules if n.partition(".")[0] in STAND_INS]:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(checkout))
    return finder


def typed_fields(kind: Any) -> dict[str, Any] | None:
    """name -> type of a model or a typed dictionary; of several alternatives all their fields; None where anything may stand."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if typing_extensions.is_typeddict(kind):
        return typing_extensions.get_type_hints(kind)
    parts = [found for part in typing.get_args(kind) if (found := typed_fields(part)) is not None]
    return {name: t for part in parts for name, t in part.items()} if parts else None


def untyped(kind: Any, tree: Any, before: str = "") -> Iterator[str]:
    """Dotted names of a configuration that no type of theirs declares; below an open dictionary nothing is known."""
    fields = typed_fields(kind)
    if fields is None or not isinstance(tree, Mapping):
        return
    for name, value in tree.items():
        if name not in fields:
            yield f"{before}{name}"
        else:
            yield from untyped(fields[name], value, f"{before}{name}.")


def check_configuration(checkout: Path, family: str, name: str, file: str) -> None:
    """Lay ours upon their file, and let their types read it."""
    from nemo_rl.algorithms.grpo import MasterConfig
    from nemo_rl.utils.config import load_config, register_omegaconf_resolvers

    register_omegaconf_resolvers()
    theirs = load_config(checkout / file)
    mine = cluster_config(replace(rl_config(family, name).settings, model="/path/to/model")).values
    mine = {MOVED.get(key, key): value for key, value in mine.items()}
    before = flatten(OmegaConf.to_container(theirs))
    for key, value in mine.items():
        OmegaConf.update(theirs, key, value, force_add=True)
    OmegaConf.update(theirs, "env.nemo_gym.uv_venv_dir", "/tmp/venvs", force_add=True)  # there: a variable of the environment
    whole = OmegaConf.to_container(theirs, resolve=False)
    try:
        resolved = OmegaConf.to_container(theirs, resolve=True)
        MasterConfig(**resolved)
        verdict = "accepted"
    except ValidationError as error:
        resolved, verdict = whole, "REFUSED: " + "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    keys = set(mine)
    nowhere = [key for key in untyped(MasterConfig, resolved) if any(k == key or k.startswith(key + ".") for k in keys) and not any(b == key or b.startswith(key + ".") for b in before)]
    other = {k: (before[k], v) for k, v in mine.items() if k in before and before[k] != v and not str(before[k]).startswith("${") and "path" not in k and k != "policy.model_name"}
    added = [k for k in mine if k not in before and not any(b.startswith(k + ".") for b in before)]
    print(f"{family} {name}: {verdict}; {len(mine)} keys of ours, {len(mine) - len(other) - len(added)} as in {file}")
    print(f"    in no type and in no file of theirs: {', '.join(nowhere) or 'none'}")
    print(f"    we name, their file does not: {', '.join(added) or 'none'}")
    for key, (there, here) in other.items():
        print(f"    {key}: theirs {there}, ours {here}")


def problem(generator: torch.Generator, rows: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    """Log-probabilities, advantages and a mask of some answers."""
    draw = lambda scale: -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64) * scale
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 0] = True
    logp = draw(1.0)
    near = lambda: logp + 0.3 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    return {"logp": logp, "old": near(), "sampled": near(), "reference": near(), "advantages": torch.randn(rows, generator=generator, dtype=torch.float64), "mask": mask}


RULES = [
    {},
    {"clip_c": 3.0},
    {"level": "sequence"},
    {"level": "sequence", "sequence_ratios": True},
    {"correction": "tis", "correction_high": 1.5},
    {"correction": "icepop", "correction_low": 0.7, "correction_high": 1.4},
    {"correction": "seq-mask-tis", "correction_low": 0.8, "correction_high": 1.2},
    {"kl_penalty": 0.1},
    {"kl_penalty": 0.1, "kl_type": "k2", "on_policy_kl": False},
]


def their_loss(p: Mapping[str, torch.Tensor], rule: Mapping[str, Any], logp: torch.Tensor) -> torch.Tensor:
    """NeMo RL's loss of a problem; its columns begin with a token that is not predicted."""
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    correction = rule.get("correction", "plain")
    config = ClippedPGLossConfig(
        ratio_clip_min=0.2, ratio_clip_max=0.28, ratio_clip_c=rule.get("clip_c"), token_level_loss=rule.get("level", "token") == "token",
        sequence_level_importance_ratios=rule.get("sequence_ratios", False), use_importance_sampling_correction=True,
        truncated_importance_sampling_type=None if correction == "plain" else correction,
        truncated_importance_sampling_ratio=rule.get("correction_high"), truncated_importance_sampling_ratio_min=rule.get("correction_low"),
        reference_policy_kl_penalty=rule.get("kl_penalty", 0.0), reference_policy_kl_type=rule.get("kl_type", "k3"),
        kl_input_clamp_value=None, kl_output_clamp_value=None, use_on_policy_kl_approximation=rule.get("on_policy_kl", True),
    )  # fmt: skip
    shifted = lambda t: torch.cat([torch.zeros(len(t), 1, dtype=t.dtype), t], 1)
    data = BatchedDataDict(
        token_mask=shifted(p["mask"].double()), sample_mask=torch.ones(len(logp), dtype=torch.float64),
        advantages=shifted(p["advantages"][:, None].expand_as(logp)), prev_logprobs=shifted(p["old"]),
        generation_logprobs=shifted(p["sampled"]), reference_policy_logprobs=shifted(p["reference"]),
    )  # fmt: skip
    sizes = torch.tensor(float(len(logp)), dtype=torch.float64), p["mask"].sum().double()
    return ClippedPGLossFn(config)(logp, data, global_valid_seqs=sizes[0], global_valid_toks=sizes[1])[0]


def check_losses(count: int) -> None:
    """Loss and gradient, ours beside theirs, in double precision."""
    generator = torch.Generator().manual_seed(0)
    worst = {str(rule): [0.0, 0.0] for rule in RULES}
    for k in range(count):
        p, rule = problem(generator), RULES[k % len(RULES)]
        mine, theirs = (p["logp"].clone().requires_grad_() for _ in range(2))
        denominator = float(p["mask"].sum()) if rule.get("level", "token") == "token" else float(len(p["mask"]))
        reference = p["reference"] if rule.get("kl_penalty") else None
        ours = clipped_loss(mine, p["old"], p["sampled"], p["advantages"], p["mask"], denominator=denominator, reference_logp=reference, **rule)
        other = their_loss(p, rule, theirs)
        ours.backward()
        other.backward()
        seen = worst[str(rule)]
        seen[:] = [max(seen[0], float((ours - other).detach().abs())), max(seen[1], float((mine.grad - theirs.grad).abs().max()))]
    for rule, (loss, gradient) in worst.items():
        print(f"loss {rule}: largest difference {loss:.1e}, of the gradient {gradient:.1e}")


def check_dpo(count: int) -> None:
    """The loss of pairs, with plain fine-tuning on the chosen answers."""
    from nemo_rl.algorithms.loss.loss_functions import DPOLossConfig, DPOLossFn
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    generator, worst = torch.Generator().manual_seed(1), [0.0, 0.0]
    for _ in range(count):
        p = problem(generator)
        mine, theirs = (p["logp"].clone().requires_grad_() for _ in range(2))
        parts = lambda t: (t[0::2], t[1::2])
        ours = dpo_loss(*parts(mine), *parts(p["reference"]), beta=0.05, sft_weight=0.2, chosen_mask=p["mask"][0::2], rejected_mask=p["mask"][1::2])
        before = lambda t: torch.cat([torch.zeros(len(t), 1, dtype=t.dtype), t], 1)
        data = BatchedDataDict(token_mask=before(p["mask"].double()), sample_mask=torch.ones(len(mine), dtype=torch.float64), reference_policy_logprobs=torch.cat([p["reference"], torch.zeros(len(mine), 1, dtype=torch.float64)], 1))
        config = DPOLossConfig(reference_policy_kl_penalty=0.05, preference_loss_weight=1.0, sft_loss_weight=0.2)
        other = DPOLossFn(config)(theirs, data, torch.tensor(float(len(mine)), dtype=torch.float64), p["mask"].sum().double())[0]
        ours.backward()
        other.backward()
        worst = [max(worst[0], float((ours - other).detach().abs())), max(worst[1], float((mine.grad - theirs.grad).abs().max()))]
    print(f"DPO: largest difference {worst[0]:.1e}, of the gradient {worst[1]:.1e}")


def check_advantages(count: int) -> None:
    """Advantages of groups, theirs in single precision as they are computed there."""
    from nemo_rl.algorithms.utils import calculate_baseline_and_std_per_prompt

    generator = torch.Generator().manual_seed(2)
    kinds = {"0 or 1": lambda n: torch.randint(0, 2, (n,), generator=generator).float(), "3 + up to 0.5": lambda n: 3 + torch.rand(n, generator=generator) / 2, "100 + up to 0.05": lambda n: 100 + torch.rand(n, generator=generator) / 20}
    for name, draw in kinds.items():
        worst = 0.0
        for _ in range(count):
            rewards = draw(8)
            mean, deviation = calculate_baseline_and_std_per_prompt(torch.zeros(8, 1), rewards, torch.ones(8))
            theirs = torch.where(deviation > 0, (rewards - mean) / (deviation + 1e-6), rewards - mean)
            ours = torch.tensor(group_advantages(rewards.tolist(), deviation_floor=0.0))
            worst = max(worst, float(((theirs - ours).abs() / (1 + ours.abs())).max()))
        print(f"advantages of rewards {name}: largest relative difference {worst:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of NVIDIA-NeMo/RL")
    parser.add_argument("--problems", type=int, default=200)
    given = parser.parse_args()
    stand_ins = import_reference(given.reference)
    for (family, name), file in STAGES.items():
        check_configuration(given.reference, family, name, file)
    check_losses(given.problems)
    check_dpo(given.problems // 2)
    check_advantages(given.problems // 2)
    print("stand-ins for:", ", ".join(sorted(stand_ins.used)))
