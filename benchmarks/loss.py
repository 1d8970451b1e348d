"""Claim: the fused masked loss takes less time and much less memory than full logits. Time is saved by the rows that are not trained; memory by those, and by never holding all logits.

    python benchmarks/loss.py                          CPU, the sizes of the claim
    python benchmarks/loss.py --trained 1.0            all tokens trained: nothing to skip
    python benchmarks/loss.py --tokens 512 --repeats 1 a quick look
    python benchmarks/loss.py --device cuda            GPU: the whole table, one after another (about ten minutes on an H200)
    python benchmarks/loss.py --device cuda --tokens 8192 --hidden 2688 --trained 0.5 --variants rows fused_speed floor
    python benchmarks/kernel_space.py                  no GPU: bounds from data sheets and compiled code, modelled and not measured

Every variant computes the same: the mean over the trained tokens, forward and backward, on the same random numbers
(trained tokens in runs, as in chats), and is compared with a reference. Variants of other projects are measured where
they can be imported (liger-kernel, cut-cross-entropy, quack-kernels); none is needed. Who wins is printed, whoever it is.

CPU: each variant in a process of its own, float32.
- CPU seconds: `time.process_time`, median over the repeats, after one warm-up, in one thread unless told otherwise:
  on a shared machine, threads that wait for each other burn time that has nothing to do with the work.
- extra memory: how far the peak of the process's resident memory rises above inputs and gradients.

GPU: all variants in one process, bfloat16, 131 072 words.
- milliseconds: median of CUDA events, forward and backward; the level-2 cache is flushed and gradients are dropped before each.
- GiB: peak of allocated memory above inputs and gradients.
- floor: the three products of the trained rows by cuBLAS, and nothing else. `x floor` is the ratio to that.
- errors: relative, against float64; the gradient of the hidden states on 64 rows, that of the weight on 256 words.
- logits as of a trained model (loss about 1 per token) and as of a fresh one (about ln V): some variants skip small gradients.
"""

import argparse
import inspect
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_nb.loss.fused import masked_linear_cross_entropy

Loss = Callable[["Problem"], Tensor]


@dataclass
class Problem:
    """Inputs of one measurement."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    weights: Tensor  # [N], 0 or 1
    rows: Tensor  # [M] the trained rows, as a collator knows them
    scale: Tensor  # 1 / M

    @property
    def ignored(self) -> Tensor:
        """Labels with -100 where untrained, for those who know no weights."""
        return self.labels.masked_fill(self.weights == 0, -100)

    def of_rows(self) -> "Problem":
        """The trained rows alone; gathering them is part of what is measured."""
        return Problem(self.hidden[self.rows], self.weight, self.labels[self.rows], self.weights[self.rows], self.rows, self.scale)


def full_logits(p: Problem) -> Tensor:
    """The one-liner: all logits, then a mask that multiplies."""
    return p.scale * (p.weights * F.cross_entropy((p.hidden @ p.weight.T).float(), p.labels, reduction="none")).sum()


def compiled(loss: Loss) -> Loss:
    """The same through torch.compile."""
    inner = torch.compile(lambda h, w, y, t, s: loss(Problem(h, w, y, t, None, s)))
    return lambda p: inner(p.hidden, p.weight, p.labels, p.weights, p.scale)


def torch_chunked(p: Problem, chunk: int | None = None) -> Tensor:
    """PyTorch's own chunked loss."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return p.scale * F.linear_cross_entropy(p.hidden, p.weight, p.ignored, reduction="sum", ignore_index=-100, options=options)


def ours(**options: object) -> Loss:
    """This library; the trained rows are known, as they are to a collator."""
    return lambda p: masked_linear_cross_entropy(p.hidden, p.weight, p.labels, p.weights, scale=p.scale, active_idx=p.rows, **options)[0]


def liger(**options: object) -> Loss:
    """liger-kernel's fused linear cross entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    known = {**inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters, **inspect.signature(LigerFusedLinearCrossEntropyFunction.forward).parameters}
    if unknown := [name for name in options if name not in known]:
        raise ImportError(f"this liger-kernel has no {unknown[0]}")
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", **options)
    return lambda p: p.scale * loss(p.weight, p.hidden, p.ignored)


def cut(impl: str) -> Loss:
    """cut-cross-entropy, in one of its forms."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda p: p.scale * linear_cross_entropy(p.hidden, p.weight, p.ignored, reduction="sum", impl=impl)


def quack() -> Loss:
    """quack-kernels' chunked linear cross entropy."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda p: p.scale * chunked_linear_cross_entropy(p.hidden, p.weight, p.ignored, chunk_size=4096, ignore_index=-100, reduction="sum")


class _ThreeProducts(torch.autograd.Function):
    """Logits, gradient of the hidden states, gradient of the weight: by shape, not by value."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x @ weight.T)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ x


def three_products(p: Problem) -> Tensor:
    """The floor."""
    return _ThreeProducts.apply(p.hidden, p.weight)


def rows_first(make: Callable[[], Loss]) -> Callable[[], Loss]:
    """A variant that is given the trained rows alone: what a user can do for any of them."""

    def made() -> Loss:
        loss = make()
        return lambda p: loss(p.of_rows())

    return made


# name: (title, makes the loss, devices)
VARIANTS: dict[str, tuple[str, Callable[[], Loss], str]] = {
    "full": ("full logits", lambda: full_logits, "cpu cuda"),
    "compile": ("full logits, torch.compile", lambda: compiled(full_logits), "cpu cuda"),
    "rows": ("full logits, trained rows only", rows_first(lambda: full_logits), "cpu cuda"),
    "rows_compile": ("the same, torch.compile", rows_first(lambda: compiled(full_logits)), "cuda"),
    "torch": ("torch linear_cross_entropy", lambda: torch_chunked, "cpu cuda"),
    "torch_rows": ("torch, trained rows, chunk 256", rows_first(lambda: lambda p: torch_chunked(p, 256)), "cpu"),
    "torch_rows_gpu": ("torch, trained rows, chunk 4096", rows_first(lambda: lambda p: torch_chunked(p, 4096)), "cuda"),
    "liger": ("liger", liger, "cuda"),
    "liger_fp32": ("liger, sums in float32", lambda: liger(accum_dtype=torch.float32), "cuda"),
    "liger_rows": ("liger, trained rows", rows_first(liger), "cuda"),
    "liger_rows_fp32": ("liger, trained rows, float32", rows_first(lambda: liger(accum_dtype=torch.float32)), "cuda"),
    "liger_rows_large": ("liger, trained rows, chunks x16", rows_first(lambda: liger(chunk_mem_const=16)), "cuda"),
    "cce": ("cut-cross-entropy", lambda: cut("cce"), "cuda"),
    "cce_exact": ("cut-cross-entropy, exact", lambda: cut("cce_exact"), "cuda"),
    "cce_kahan": ("cut-cross-entropy, Kahan, full", lambda: cut("cce_kahan_full_c"), "cuda"),
    "quack": ("quack", quack, "cuda"),
    "quack_rows": ("quack, trained rows", rows_first(quack), "cuda"),
    "fused_speed": ("this library, speed", lambda: ours(strategy="speed"), "cpu cuda"),
    "fused_bf16": ("this library, speed, bf16 logits", lambda: ours(strategy="speed", logits_dtype="bf16"), "cuda"),
    "fused_memory": ("this library, memory", lambda: ours(strategy="memory"), "cpu cuda"),
    "floor": ("three products (floor)", rows_first(lambda: three_products), "cuda"),
}


def problem(tokens: int, hidden: int, vocab: int, trained: float, device: str = "cpu", dtype: torch.dtype = torch.float32, fresh: bool = True) -> Problem:
    """Random inputs, `trained` of the tokens trained, in runs: each 128 tokens a prompt and an answer. Not `fresh`: labels are likely words."""
    r = torch.Generator(device).manual_seed(0)
    h = torch.randn(tokens, hidden, generator=r, device=device)
    w = torch.randn(vocab, hidden, generator=r, device=device) / hidden**0.5
    labels = torch.randint(vocab, (tokens,), generator=r, device=device)
    if not fresh:  # point each hidden state at its label's row, so that the label stands about ln V above the rest
        h = h + w[labels] * (float(torch.tensor(float(vocab)).log()) - 0.5)
    weights = (torch.arange(tokens, device=device) % 128 >= round(128 * (1 - trained))).float()
    rows = weights.nonzero().squeeze(1)
    return Problem(h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), labels, weights, rows, 1 / weights.sum())


def names(options: argparse.Namespace) -> list[str]:
    """The variants to measure: those named, or all of the device."""
    known = [name for name, (_, _, devices) in VARIANTS.items() if options.device in devices.split()]
    return [n for n in (options.variants or known) if not n.startswith("torch") or hasattr(torch.nn, "LinearCrossEntropyOptions")]


# CPU


def mebibytes_at_peak() -> float:
    """Most resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure_on_cpu(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One variant, in this process: median CPU seconds, best wall seconds, extra MiB, and figures to compare results by."""
    loss_of = VARIANTS[name][1]()
    p = problem(options.tokens[0], options.hidden[0], options.vocab, options.trained[0])
    tiny = problem(64, 64, 512, 0.5)
    loss_of(tiny).backward()  # libraries and threads are up before the peak is read
    gradients = sum(t.numel() * t.itemsize for t in (p.hidden, p.weight)) / 2**20
    before = mebibytes_at_peak()
    cpu, wall = [], []
    for _ in range(options.repeats + 1):
        p.hidden.grad = p.weight.grad = None
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        loss = loss_of(p)
        loss.backward()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    extra = mebibytes_at_peak() - before - gradients
    results = {"loss": loss.item(), "dhidden": torch.linalg.vector_norm(p.hidden.grad).item(), "dweight": torch.linalg.vector_norm(p.weight.grad).item()}
    return {"cpu": statistics.median(cpu[1:]), "wall": min(wall[1:]), "extra": extra} | results


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The variant measured in a fresh process, since a peak of memory never goes down again."""
    sizes = [f"--{key}={getattr(options, key)[0]}" for key in ("tokens", "hidden", "trained")] + [f"--{key}={getattr(options, key)}" for key in ("vocab", "repeats", "threads")]
    done = subprocess.run([sys.executable, __file__, *sizes, f"--measure={name}"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"variant {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report_cpu(options: argparse.Namespace) -> None:
    """Measure every variant that this PyTorch has, check that they agree, print the table."""
    print(f"tokens {options.tokens[0]}, hidden {options.hidden[0]}, vocabulary {options.vocab}, trained {options.trained[0]:.0%}, float32, forward and backward")
    print(f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, median CPU seconds of {options.repeats}\n")
    print(f"{'variant':36}{'CPU s':>8}{'ratio':>7}{'wall s':>8}{'extra MiB':>11}{'ratio':>7}")
    full = None
    for name in names(options):
        got = in_a_process(name, options)
        full = full or got
        for key in ("loss", "dhidden", "dweight"):
            assert abs(got[key] / full[key] - 1) < 1e-4, f"{name}: {key} is {got[key]}, with {names(options)[0]} it is {full[key]}"
        print(f"{VARIANTS[name][0]:36}{got['cpu']:8.2f}{full['cpu'] / got['cpu']:7.2f}{got['wall']:8.2f}{got['extra']:11.0f}{full['extra'] / max(got['extra'], 1):7.1f}", flush=True)
    print("\nratio: the first line over this one; above 1, this one is better. Loss and gradient norms agree to 1e-4.")
    print("extra MiB: beside inputs and gradients.")


# GPU


@dataclass
class Exact:
    """What is right, in float64, where it is looked at."""

    loss: float
    rows: Tensor  # 64 trained rows
    dhidden: Tensor  # [64, H]
    dweight: Tensor  # [256, H] of the first words


def exact(p: Problem, chunk: int = 1024) -> Exact:
    """Loss and parts of the gradients in float64, a few rows at a time."""
    weight, rows, total = p.weight.detach().double(), p.rows[:: max(1, len(p.rows) // 64)][:64], 0.0
    dweight = torch.zeros(256, weight.shape[1], dtype=torch.float64, device=weight.device)

    def logit_gradients(index: Tensor) -> tuple[Tensor, Tensor]:
        """(loss sum, gradient of the logits) of some rows."""
        logits = p.hidden.detach()[index].double() @ weight.T
        loss = F.cross_entropy(logits, p.labels[index], reduction="sum")
        gradient = logits.softmax(1)
        gradient[torch.arange(len(index)), p.labels[index]] -= 1
        return loss, gradient * p.scale.double()

    for index in p.rows.split(chunk):
        loss, gradient = logit_gradients(index)
        total += (loss * p.scale).item()
        dweight += gradient[:, :256].T @ p.hidden.detach()[index].double()
        del gradient
    return Exact(total, rows, logit_gradients(rows)[1] @ weight, dweight)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((got.double() - want).norm() / want.norm()).item()


def measure_on_gpu(loss_of: Loss, p: Problem, truth: Exact, flush: Tensor, seconds: float) -> dict[str, float]:
    """Median milliseconds of forward and of both, extra GiB at the peak, errors."""
    gradients = sum(t.numel() * t.itemsize for t in (p.hidden, p.weight))

    def once() -> tuple[float, float, Tensor]:
        """One forward and backward: milliseconds of forward, of both, and the loss."""
        p.hidden.grad = p.weight.grad = None
        flush.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        loss = loss_of(p)
        marks[1].record()
        loss.backward()
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2]), loss.detach()

    for _ in range(3):
        once()
    p.hidden.grad = p.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, both, loss = once()
    extra = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
    errors = {"loss": abs(loss.item() / truth.loss - 1), "dhidden": relative(p.hidden.grad[truth.rows], truth.dhidden), "dweight": relative(p.weight.grad[:256], truth.dweight)}
    times = [once()[:2] for _ in range(max(5, min(40, int(1000 * seconds / both))))]
    forward, both = (statistics.median(t) for t in zip(*times, strict=True))
    return {"forward": forward, "both": both, "extra": extra} | errors


def waits(p: Problem) -> str:
    """Does ours make the host wait?"""
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours()(p).backward()
    except RuntimeError as error:
        return f"the host waits: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "the host never waits for this library's loss (set_sync_debug_mode)"


def report_gpu_shape(p: Problem, options: argparse.Namespace, flush: Tensor) -> None:
    """One table: every variant on one problem. A variant that fails says why and is passed over."""
    truth, found = exact(p), {}
    print(f"{'variant':34}{'forward':>9}{'both ms':>9}{'x floor':>9}{'GiB':>7}{'loss err':>10}{'dX err':>9}{'dW err':>9}")
    for name in sorted(names(options), key=lambda n: n != "floor"):  # the floor first: the rest is compared with it
        try:
            torch.cuda.empty_cache()
            got = found[name] = measure_on_gpu(VARIANTS[name][1](), p, truth, flush, options.seconds)
        except Exception as error:  # noqa: BLE001  an optional package may be missing, old, or out of memory
            print(f"{VARIANTS[name][0]:34}not measured: {type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}", flush=True)
            continue
        ratio = f"{got['both'] / found['floor']['both']:9.2f}" if "floor" in found else f"{'':9}"
        errors = "" if name == "floor" else f"{got['loss']:10.1e}{got['dhidden']:9.1e}{got['dweight']:9.1e}"
        print(f"{VARIANTS[name][0]:34}{got['forward']:9.2f}{got['both']:9.2f}{ratio}{got['extra']:7.2f}{errors}", flush=True)
    p.hidden.grad = p.weight.grad = None


def report_gpu(options: argparse.Namespace) -> None:
    """All shapes, the headline first."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, vocabulary {options.vocab}, median of runs of about {options.seconds} s")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    shapes = [(n, h, t, fresh) for fresh in (False, True) for h in options.hidden for n in options.tokens for t in options.trained]
    shapes.sort(key=lambda s: s[:3] != (8192, 2688, 0.5))
    for tokens, hidden, trained, fresh in shapes:
        p = problem(tokens, hidden, options.vocab, trained, "cuda", torch.bfloat16, fresh)
        print(f"\ntokens {tokens}, hidden {hidden}, trained {trained:.0%} ({len(p.rows)} rows), logits of a {'fresh' if fresh else 'trained'} model; {waits(p)}")
        report_gpu_shape(p, options, flush)
        del p


def main() -> None:
    """Read the options, fill in the sizes of the device, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--trained", type=float, nargs="+", help="part of the tokens that is trained")
    parser.add_argument("--repeats", type=int, default=3, help="CPU: repeats after the warm-up")
    parser.add_argument("--seconds", type=float, default=0.7, help="GPU: time for each variant, at least five runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--measure", choices=VARIANTS, help="measure one variant on the CPU in this process and print JSON")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.tokens = options.tokens or ([4096, 8192, 32768] if gpu else [2048])
    options.hidden = options.hidden or ([2688, 4096] if gpu else [512])
    options.trained = options.trained or ([0.3, 0.5, 1.0] if gpu else [0.4])
    options.vocab = options.vocab or (131072 if gpu else 32768)
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure_on_cpu(options.measure, options)))
    elif gpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing was measured")
    else:
        (report_gpu if gpu else report_cpu)(options)


if __name__ == "__main__":
    main()
