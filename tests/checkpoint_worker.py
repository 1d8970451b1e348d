"""Two processes save and load: `run_two` starts them, `checkpoint_worker.py RANK FOLDER` is one of them. Any failure ends both with an error."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nemotron_nb.core import UserError
from nemotron_nb.train import checkpoint, lora
from nemotron_nb.train.checkpoint import Checkpoints, export_hf, full_state, import_hf, model_state, optimizer_state
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig, PeftSection

SIZES = ModelConfig(pattern="ME*M", hidden_size=64, attention_heads=2, mamba_heads=2, experts=4, expert_size=32)
PEFT = PeftSection(enabled=True, dim=4, alpha=8)


def model_of(seed: int, peft: PeftSection | None = None) -> nn.Module:
    """A tiny model, perhaps with pairs on the base of seed 0."""
    return lora.apply_lora(build_model(SIZES, 300, 0), peft, seed) if peft else build_model(SIZES, 300, seed)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1, fused=True)


def shared(model: nn.Module, how: str) -> nn.Module:
    """The model over all processes."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    _, inner = checkpoint.language_model(model)
    for layer in inner.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, rank: int) -> tuple[float, float]:
    """One step on tokens of this rank: (loss, norm of the gradient)."""
    tokens = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(10 * number + rank))
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same(a: nn.Module, a_optimizer: torch.optim.Optimizer, b: nn.Module, b_optimizer: torch.optim.Optimizer) -> None:
    """Weights and moments, to the last bit."""
    for one, other in ((model_state(a), model_state(b)), (optimizer_state(a, a_optimizer), optimizer_state(b, b_optimizer))):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(own(one[name]), own(other[name])), name


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that is saved, put together, for other processes to compare with."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in (model_state(model) | optimizer_state(model, optimizer)).items()}


def resume(folder: Path, how: str, peft: PeftSection | None, rank: int) -> None:
    """Two steps, save, two more; then anew from the checkpoint, and the same two: nothing may differ."""
    model = shared(model_of(0, peft), how)
    optimizer = optimizer_of(model)
    for number in range(2):
        step(model, optimizer, number, rank)
    checkpoints = Checkpoints(folder)
    torch.manual_seed(100 + rank)
    checkpoints.save(2, model, optimizer, {"rank": rank, "tensor": torch.tensor([rank])}, score=1.0)
    kept, drawn = whole(model, optimizer), torch.rand(3)
    if rank == 0:
        torch.save(kept, folder / "whole.pt")
    uninterrupted = [step(model, optimizer, number, rank) for number in range(2, 4)]

    again = shared(model_of(7, peft), how)
    again_optimizer = optimizer_of(again)
    extra = checkpoints.load(checkpoints.newest(), again, again_optimizer)
    assert (extra["rank"], extra["tensor"].tolist()) == (rank, [rank]), extra
    assert torch.equal(torch.rand(3), drawn), "each rank has its own random numbers back"
    assert [step(again, again_optimizer, number, rank) for number in range(2, 4)] == uninterrupted
    assert_same(model, optimizer, again, again_optimizer)


def across(source: Path, how: str, rank: int) -> None:
    """A checkpoint written in another way is read: everything in it is the same."""
    model = shared(model_of(9), how)
    optimizer = optimizer_of(model)
    Checkpoints(source).load(Checkpoints(source).newest(), model, optimizer)
    expected = torch.load(source / "whole.pt")
    found = whole(model, optimizer)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    step(model, optimizer, 5, rank)


def fail_on_one(folder: Path, rank: int) -> None:
    """An error on one rank is an error on all, and leaves the former checkpoint."""
    model = shared(model_of(0), "ddp")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, model, None)
    write = checkpoint._write_extra
    if rank == 1:
        checkpoint._write_extra = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        checkpoints.save(2, model, None)
        raise AssertionError("it was saved")
    except UserError as error:
        assert "No space left" in str(error), error
    checkpoint._write_extra = write
    dist.barrier()
    assert checkpoints.newest().step == 1 and sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001"]


def travel(folder: Path, rank: int) -> None:
    """From a shared-out model to a folder in Hugging Face form and back into one; with pairs, as adapter and merged."""
    tokenizer = folder / "tokenizer"
    if rank == 0:
        tokenizer.mkdir(parents=True)
        (tokenizer / "tokenizer.json").write_text("{}")
    dist.barrier()
    model = shared(model_of(3), "fsdp2")
    audit = export_hf(model, tokenizer, folder / "hf")
    assert audit.ok
    other = shared(model_of(4), "fsdp2")
    assert import_hf(other, folder / "hf") == {}
    a, b = full_state(model), full_state(other)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and bool(a) == (rank == 0)

    pairs = lora.apply_lora(build_model(SIZES, 300, 0), PEFT)
    for name, p in pairs.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    expected = lora.merged(pairs).state_dict()
    pairs = shared(pairs, "fsdp2")
    lora.save_adapter(pairs, folder / "adapter")
    lora.export_merged(pairs, tokenizer, folder / "merged")
    found = lora.merged_state(pairs)
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name.removeprefix("base_model.model.")], atol=8 * torch.finfo(torch.float32).eps * tensor.abs().max().item(), rtol=0), name


def main(rank: int, folder: Path) -> None:
    """All of it, in one start of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=90))
    resume(folder / "ddp", "ddp", None, rank)
    resume(folder / "fsdp2", "fsdp2", None, rank)
    resume(folder / "lora", "fsdp2", PEFT, rank)
    across(folder / "ddp", "fsdp2", rank)
    across(folder / "fsdp2", "ddp", rank)
    across(folder / "one", "fsdp2", rank)
    fail_on_one(folder / "full", rank)
    travel(folder / "travel", rank)
    dist.barrier()
    if rank == 0:
        (folder / "done.json").write_text(json.dumps({"world": dist.get_world_size()}))
    dist.destroy_process_group()


def run_two(folder: Path) -> None:
    """Start both, and wait for both to be right. One that fails takes the other with it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    said = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
