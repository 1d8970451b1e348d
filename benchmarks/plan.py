"""Claim: the planner's parameters are Megatron's to the last one, its memory is what PyTorch keeps within 5 %, its hours of data preparation are those of a run within a third.

    python benchmarks/plan.py                 all of it; the parts that need Megatron-Bridge say so where it is missing
    python benchmarks/plan.py --only engine   one part: engine, megatron, parameters, recipes, prep

- engine: bytes that the PyTorch engine keeps of a forward pass, counted tensor by tensor, against the formulas
- megatron: the same in Megatron on a processor with stand-ins; its buffers and its optimizer on a rank of a fake world;
  Megatron-Bridge's own estimator on a GPT model
- parameters: Megatron's own model of Nano and Super on the meta device against the formulas
- recipes: what fits where, of the published recipes
- prep: data preparation with 1 and 2 processes against hours calculated from bytes, cores and a rate

No number is of a GPU; the column for it is filled where there is one, and by nothing else.
"""

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemotron_nb.megatron import measure
from nemotron_nb.megatron.memory import FORMATS, Work
from nemotron_nb.megatron.parameters import Layout, Shape, exact_parameters, parameters_of_stage, shape_of, total_parameters
from nemotron_nb.megatron.plan import judge
from nemotron_nb.megatron.time import GPUS
from nemotron_nb.megatron.versions import installed_version
from nemotron_nb.train.settings import NANO, SUPER
from nemotron_nb.viz import table

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from plan_shapes import MID, SMALL  # noqa: E402

LARGER = replace(SMALL, pattern="MEMEM*EMEMEM*EME", hidden=512, mamba_heads=16, heads=16, expert_size=320, shared_size=640, latent=0, vocab=8192)
NANO_SHAPE, SUPER_SHAPE = shape_of(NANO), shape_of(SUPER, mtp_depths=2)


def engine() -> None:
    """The PyTorch engine at three sizes."""
    for shape, sequences, length in ((SMALL, 4, 128), (replace(MID, mtp_depths=0, mtp_pattern=""), 2, 256), (LARGER, 2, 512)):
        work = Work(sequences * length, formats=FORMATS["fp32"], kernels="torch", sequence=length)
        print(f"\nPyTorch engine: {total_parameters(shape) / 1e6:.1f} M parameters, {sequences} x {length} tokens, float32")
        asked = shape, sequences, length
        print(measure.compared(measure.predicted(shape, work), measure.measure_torch(*asked), measure.kept_on_gpu(*asked)))


def megatron() -> None:
    """Megatron with stand-ins: what is kept, buffers, optimizer, the estimator of Megatron-Bridge."""
    gpt, flat, world = Shape("*-" * 4, 256, heads=8, kv_heads=8, head_dim=32, dense_size=1024, vocab=1024), replace(SMALL, latent=0), Layout(8, tp=2, ep=4, sp=True)
    forward = [(SMALL, 4, 128, "float32"), (MID, 2, 256, "bfloat16")]
    calls = [measure.megatron_call(*asked) for asked in forward] + [measure.static_call(flat, world, shared) for shared in (True, False)]
    *kept, dealt, copied, four, eight = measure.with_megatron(*calls, *(measure.bridge_call(replace(gpt, pattern="*-" * n), Layout(8), 4096, 1) for n in (4, 8)))
    for (shape, sequences, length, dtype), found in zip(forward, kept, strict=True):
        formats = FORMATS["fp32" if dtype == "float32" else "bf16"]
        work = Work(sequences * length, formats=formats, kernels="plain", sequence=length)
        print(f"\nMegatron with stand-ins: {total_parameters(shape) / 1e6:.1f} M parameters, {sequences} x {length} tokens, {dtype}")
        print(measure.compared(measure.predicted(shape, work), found))
    rows = []
    for name, shared, found in (("distributed", True, dealt), ("not distributed", False, copied)):
        formulas = measure.static_groups(flat, world, shared)
        rows += [(name, kind, f"{formulas[kind] / 1e6:.3f}", f"{size / 1e6:.3f}", f"{formulas[kind] / size:.3f}", "-") for kind, size in found.items()]
    print(f"\nRank 0 of {world}")
    print(table(rows, header=["optimizer", "", "formula, MB", "measured, MB", "ratio", "on a GPU"]))
    lines = measure.activation_lines(gpt, Layout(8), Work(4096))
    layers = sum(line.bytes for line in lines if not line.name.startswith(("start", "end")))
    static = sum(measure.static_groups(gpt, Layout(8)).values())
    theirs = {"parameters": four["parameters"], "weights, gradients, optimizer": four["static"], "kept by 4 layers": eight["kept"] - four["kept"]}
    ours = dict(zip(theirs, (total_parameters(gpt), static, layers), strict=True))
    print("\nA GPT model of 4 layers, and Megatron-Bridge's estimator (which counts LayerNorm and two masks of dropout)")
    print(table([(name, f"{ours[name]:,.0f}", f"{n:,.0f}", f"{ours[name] / n:.3f}") for name, n in theirs.items()], header=["", "formulas", "Megatron-Bridge", "ratio"]))


def parameters() -> None:
    """Megatron's own model of both families."""
    rows = []
    for name, shape, layout in (("Nano", NANO_SHAPE, Layout(1)), ("Nano", NANO_SHAPE, Layout(32, 4, 2, 1, 8, sp=True)), ("Super", SUPER_SHAPE, Layout(32, ep=8)), ("Super", SUPER_SHAPE, Layout(256, 8, 4, 1, 16, sp=True))):
        ranks = [stage * layout.world // layout.pp for stage in range(layout.pp)]
        for stage, counted in enumerate(exact_parameters(shape, layout, ranks)):
            formula = sum(parameters_of_stage(shape, layout, stage).values())
            rows.append((name, layout, stage, f"{formula:,}", f"{sum(counted.values()):,}", "equal" if formula == sum(counted.values()) else "DIFFERENT"))
    print("\nParameters of a rank")
    print(table(rows, header=["model", "layout", "stage", "formulas", "Megatron's own model", ""]))


def recipes() -> None:
    """What fits where."""
    reduced, modules = FORMATS["bf16_reduced"], ("layernorm", "moe_act", "moe", "core_attn")
    asked = {
        "Nano SFT, 16 GPUs": (NANO_SHAPE, Layout(16, ep=8), Work(4096), 64),
        "Nano SFT, 262,144, 128 GPUs": (NANO_SHAPE, Layout(128, tp=4, cp=8, ep=16, sp=True), Work(262_144, formats=reduced), 16),
        "Nano pretraining, 16 GPUs": (NANO_SHAPE, Layout(16, ep=8), Work(8192, formats=replace(FORMATS["bf16"], gradient=2), recompute=("moe", "layernorm")), 1024),
        "Super SFT, published default": (SUPER_SHAPE, Layout(32, ep=8), Work(4096, formats=replace(reduced, gradient=4)), 64),
        "Super SFT, TP8 EP16, 32 GPUs": (SUPER_SHAPE, Layout(32, tp=8, ep=16, sp=True), Work(4096, formats=reduced), 64),
        "Super LoRA, published layout": (SUPER_SHAPE, Layout(32), Work(4096, adapter=32), 64),
        "Super LoRA, EP8": (SUPER_SHAPE, Layout(32, ep=8), Work(4096, adapter=32), 64),
        "Super pretraining, 64 GPUs": (SUPER_SHAPE, Layout(64, pp=2, ep=32), Work(4096, formats=reduced, recompute=modules), 1280),
        "Super SFT, 262,144, 128 GPUs": (SUPER_SHAPE, Layout(128, tp=4, cp=32, ep=32, sp=True), Work(262_144, formats=reduced), 16),
    }  # fmt: skip
    kinds, rows = ("a100-80", "h100-80", "h200-141", "b200-192", "gb200-192"), []
    for name, (shape, layout, work, batch) in asked.items():
        judged = [judge(shape, layout, work, GPUS[kind], batch) for kind in kinds]
        when = judged[1].time
        rows.append((name, layout, f"{judged[0].memory.total / 1e9:.0f} GB", *("fits" if j.fits else "-" for j in judged), f"{when.bound:.1f}", f"{when.fast:.1f} - {when.slow:.1f}"))
    print("\nPublished recipes: memory of the fullest rank, what holds it, seconds of a step on H100 (calculated, not measured)")
    print(table(rows, header=["recipe", "layout", "needs", *kinds, "bound, s", "expected, s"]))


def core_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def prep() -> None:
    """Data preparation: a rate from two runs, and other runs calculated with it. Core seconds: the machine may do other things."""
    import chats

    from nemotron_nb.data.prep import PrepConfig, prepare
    from nemotron_nb.stages.plan import prep_seconds

    def run(rows: int, workers: int) -> tuple[float, float, int]:
        """(core seconds, seconds on the wall, bytes of input) of a preparation."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chats.jsonl"
            chats.write_chats(path, rows)
            cpu, wall = core_seconds(), time.perf_counter()
            prepare(PrepConfig(path=str(path), output_dir=f"{folder}/out", pack_size=4096, workers=workers))
            return core_seconds() - cpu, time.perf_counter() - wall, path.stat().st_size

    run(200, 1)  # imports and tables
    (small, _, few), (large, wall, many) = run(500, 1), run(3000, 1)
    rate = (many - few) / (large - small)
    fixed = max(0.0, small - few / rate)
    rows = [("3,000 chats, 1 process", f"{many / 1e6:.1f}", f"{large:.1f}", f"{prep_seconds(many, 1, rate, fixed):.1f}", "the rate is from this", f"{wall:.1f}")]
    for workers in (1, 2):
        found, wall, size = run(6000, workers)
        expected = prep_seconds(size, 1, rate, fixed)
        name = f"6,000 chats, {workers} process{'es' if workers > 1 else ''}"
        rows.append((name, f"{size / 1e6:.1f}", f"{found:.1f}", f"{expected:.1f}", f"{expected / found:.2f}", f"{wall:.1f}"))
    print(f"\nData preparation: {rate / 1e6:.2f} MB a second and core, {fixed:.1f} s that no core shortens; load of the machine {os.getloadavg()[0]:.1f}")
    print(table(rows, header=["run", "MB", "measured, core s", "calculated, core s", "ratio", "wall, s"]))


PARTS: dict[str, Callable[[], None]] = {"engine": engine, "megatron": megatron, "parameters": parameters, "recipes": recipes, "prep": prep}


def main() -> None:
    """Print the comparisons."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=PARTS, action="append", help="a part; may be given several times")
    chosen = options.parse_args().only or list(PARTS)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; no GPU was asked")
    for name in chosen:
        if name in ("megatron", "parameters") and not installed_version("megatron-bridge"):
            print(f"\n{name}: left out, megatron-bridge is not installed (.ci/setup dev installs it)")
            continue
        PARTS[name]()


if __name__ == "__main__":
    main()
