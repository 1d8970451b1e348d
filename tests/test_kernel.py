"""The GPU kernels of the masked loss: interpreted on a CPU, compiled for chips that are not here, and, where there is a GPU, run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fused_worker import run_shards
from loss_problems import dense_loss, dense_units, exact, gradients, problem
from precision import NARROW_FACTOR, assert_as_exact, float_errors, norm

from nemotron_nb.loss.fused import masked_linear_cross_entropy

HERE = Path(__file__).parent
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes a block may ask for
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def in_a_process(*command: str, **environment: str) -> str:
    """What a fresh Python prints. Triton decides when it is loaded whether it interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=HERE, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_cases(**environment: str) -> None:
    """All of `kernel_cases.py`; none may be missing or skipped."""
    said = in_a_process("-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "kernel_cases.py", **environment)
    assert " passed" in said and "skipped" not in said, said


def test_the_cases_interpreted():
    import triton  # noqa: F401  a development environment has it: without it these tests must not pass for right

    run_cases(TRITON_INTERPRET="1")


def test_processes_that_share_a_vocabulary_interpreted(tmp_path):
    run_shards((70, 59), tmp_path, {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[] if chip == "sm_90" else pytest.mark.long) for chip in SHARED_MEMORY])
def test_compiled_for_a_chip(chip):
    """Nothing spilled, fits into registers and shared memory, products on the tensor cores, stores of 16 bytes."""
    found = json.loads(in_a_process(str(HERE / "kernel_chips.py"), chip))
    assert len(found) == 9
    for name, took in found.items():
        assert took["spilled"] == 0, (name, took)
        assert took["registers"] * 32 * took["warps"] <= 65536, (name, took)
        assert took["shared"] <= SHARED_MEMORY[chip], (name, took)
        assert took["tensor_core"] == ([TENSOR_CORE[chip]] if "tiles bf16" in name else []), (name, took)
        assert took["wide_stores"] or name.startswith("lse"), (name, took)
        assert took["barrier_between_read_and_write"] or not name.startswith("rows"), (name, took)
    names = {"lse": "lse tiles bf16", "gradient": "gradient tiles bf16", "rows": "rows fp32 to bf16"}
    for kind, row in library_rows(int(chip.removeprefix("sm_"))).items():  # none for a chip that the table does not have
        took = found[names[kind]]
        assert (took["registers"], took["shared"], took["warps"]) == (row.needs.registers, row.needs.shared, row.needs.warps), kind


def library_rows(capability: int) -> dict:
    """Rows of benchmarks/kernel_space.json with the library's choices; empty for another Triton than the table's."""
    import triton

    from nemotron_nb.loss import kernel
    from nemotron_nb.loss.compiled import read_space

    version, rows = read_space(HERE.parent / "benchmarks" / "kernel_space.json")
    tile = {key: number for key, number in kernel.tile_shape(torch.bfloat16, capability).items() if key != "GROUP"}
    ours = (tile, kernel._row_blocks(131072))
    return {r.kernel: r for r in rows if version == triton.__version__ and r.capability == capability and r.choice in ours}


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
gpu = lambda test: on_gpu[0](on_gpu[1](test))  # noqa: E731


def large(N: int, V: int, H: int = 512, trained: float = 0.5):
    """A problem in bfloat16 on the GPU, its trained rows, and a scale."""
    r = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, H, generator=r, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(V, H, generator=r, device="cuda", dtype=torch.bfloat16) / H**0.5).requires_grad_()
    labels = torch.randint(V, (N,), generator=r, device="cuda")
    weights = (torch.arange(N, device="cuda") % 128 >= 128 * (1 - trained)).float()
    return hidden, weight, labels, weights, weights.nonzero().squeeze(1), 1 / weights.sum()


@gpu
def test_the_cases_on_a_gpu():
    run_cases()


@gpu
@pytest.mark.parametrize("strategy", ["speed", "memory"])
def test_two_runs_agree_bitwise(strategy):
    hidden, weight, labels, weights, rows, scale = large(3000, 50304)
    runs = [
        gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale, active_idx=rows, strategy=strategy, workspace_bytes=1 << 26)[0], hidden, weight)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@gpu
@pytest.mark.parametrize("strategy", ["speed", "memory", "auto"])
def test_the_host_never_waits(strategy):
    """With the rows given, forward and backward are queued without a look at a number; so with a scale that is a tensor, and an upstream."""
    hidden, weight, labels, weights, rows, scale = large(1024, 4096)
    upstream, buffer = torch.tensor(0.5, device="cuda"), torch.zeros(4096, 512, device="cuda")
    for options in ({}, {"scale": 0.1}, {"scale": scale, "z_coef": 1e-4, "softcap": 30.0}):
        masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=rows, strategy=strategy, **options)[0].backward()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=rows, strategy=strategy, **options)[0] * upstream).backward()
            masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=rows, strategy=strategy, grad_accum=buffer, **options)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("strategy", ["speed", "memory"])
def test_more_logits_than_32_bits_can_count(strategy):
    """18 000 rows by 131 072 words in one tile: places beyond 2**31. The last rows are compared with full logits."""
    hidden, weight, labels, weights, rows, _ = large(18000, 131072, H=64, trained=1.0)
    assert len(rows) * 131072 > 2**31
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=rows, strategy=strategy, workspace_bytes=12 << 30, logits_dtype="bf16")
    last, w16 = hidden[-50:].detach().requires_grad_(), weight.detach()

    def plain(h, w):  # logits in 16 bits, as asked for
        nll = F.cross_entropy((h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), labels[-50:], reduction="none")
        return [nll, *torch.autograd.grad(nll.sum(), h)]

    got = [stats.nll[-50:], torch.autograd.grad(loss, hidden)[0][-50:]]
    want = plain(last.detach().double().requires_grad_(), w16.double())
    for a, b, error in zip(got, want, float_errors(plain, last, w16, measure=norm), strict=True):
        assert norm(a.double() - b.detach()) <= NARROW_FACTOR * error


@gpu
@pytest.mark.parametrize("strategy", ["speed", "memory"])
def test_memory_has_a_ceiling(strategy):
    """Workspace, the gradients, a float32 sum where there are chunks, and three copies of the trained rows."""
    hidden, weight, labels, weights, rows, scale = large(8192, 131072)
    workspace, (V, H) = 1 << 28, weight.shape
    call = lambda: masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale, active_idx=rows, strategy=strategy, workspace_bytes=workspace)[0].backward()  # noqa: E731
    call()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    sums = 4 * V * H if strategy == "speed" else 4 * len(rows) * H
    assert peak <= workspace + sums + 2 * V * H + 2 * hidden.numel() + 3 * 2 * len(rows) * H + (1 << 24)
    assert peak < 2 * 8192 * V, "less than the logits in bfloat16 alone"


@gpu
@pytest.mark.parametrize("strategy", ["speed", "memory"])
def test_compiled_graph_on_a_gpu(strategy):
    hidden, weight, labels, weights, rows, scale = large(512, 4096)
    step = lambda h, w, s: masked_linear_cross_entropy(h * 2, w, labels, weights, scale=s, active_idx=rows, strategy=strategy)[0]  # noqa: E731
    want = gradients(step(hidden, weight, scale), hidden, weight)
    got = gradients(torch.compile(step, fullgraph=True)(hidden, weight, scale), hidden, weight)
    assert_as_exact(got, want, dense_units(lambda h, w: dense_loss(h * 2, w, labels, weights, scale), hidden, weight))


@gpu
def test_the_gpu_agrees_with_the_cpu():
    hidden, weight, labels, weights = problem(40, 32, 300, dtype=torch.float32)
    want = exact(dense_loss, hidden, weight, labels, weights)
    h, w = (t.detach().cuda().requires_grad_() for t in (hidden, weight))
    got = gradients(masked_linear_cross_entropy(h, w, labels.cuda(), weights.cuda())[0], h, w)
    units = dense_units(dense_loss, h, w, labels.cuda(), weights.cuda())
    assert_as_exact([g.cpu() for g in got], want, units)
