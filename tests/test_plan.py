"""The planner against what it claims to know: published sizes, the engine's own tensors, definitions, and the command."""

import ast
import importlib.metadata
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_shapes import SMALL
from typer.testing import CliRunner

from nemotron_nb.core import UserError
from nemotron_nb.megatron import failures, memory, parameters, plan, scale, time
from nemotron_nb.megatron.memory import FORMATS, Work
from nemotron_nb.megatron.parameters import Layout, shape_of
from nemotron_nb.ops.config import pretrain_config
from nemotron_nb.stages import plan as stage_plan
from nemotron_nb.train.settings import NANO, SUPER, ModelConfig

NANO_SHAPE, SUPER_SHAPE = shape_of(NANO), shape_of(SUPER, mtp_depths=2)
H100 = time.GPUS["h100-80"]


def test_the_planner_needs_neither_torch_nor_megatron():
    code = "import sys, nemotron_nb.stages.plan, nemotron_nb.megatron.plan; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("shape, total, active", [(NANO_SHAPE, 31.578e9, 3.580e9), (shape_of(SUPER), 120.669e9, 12.770e9)])
def test_totals_are_the_published_ones(shape, total, active):
    assert parameters.total_parameters(shape) == pytest.approx(total, rel=1e-4)
    assert parameters.active_in_a_token(shape) == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize("sizes", [NANO, SUPER])
def test_formulas_count_what_transformers_builds(sizes):
    from nemotron_nb.train.model import count_parameters, family_config

    assert parameters.total_parameters(shape_of(sizes)) == sum(count_parameters(family_config(sizes)).values())


@pytest.mark.parametrize("layout", [Layout(1), Layout(64, 4, 2, 2, 8, sp=True), Layout(32, 8, 4, 1, 8, sp=True)])
def test_ranks_hold_the_model_once(layout):
    """Over all stages and ranks: cut parts once, copied parts as often as there are copies."""
    shape, found = replace(SUPER_SHAPE, mtp_depths=0, mtp_pattern=""), 0.0
    letters = parameters.letters_of(shape, layout)
    for stage in range(layout.pp):
        for name, n in parameters.parameters_of_stage(shape, layout, stage).items():
            formula = next(p.formula for p in parameters.PARTS if f"{p.kind} {p.name}" == name)
            alone = parameters.evaluate(formula, letters | {"tp": 1, "ep": 1, "etp": 1})
            found += n * alone / parameters.evaluate(formula, letters)
    assert found == pytest.approx(parameters.total_parameters(shape), rel=1e-9)


def test_each_term_names_letters_that_exist():
    letters = memory.kept_letters(NANO_SHAPE, Layout(), Work(128))
    for t in memory.TENSORS:
        for kernels in memory.KERNELS:
            assert parameters.evaluate(getattr(t, kernels), letters) >= 0
    for e in time.EXCHANGES:
        assert parameters.evaluate(e.formula, time.exchange_letters(NANO_SHAPE, Layout(), Work(128), 0)) >= 0


@pytest.mark.parametrize("pattern, length", [("ME*M", 128), ("M", 100), ("M", 32), ("E", 64), ("*", 96), ("MEM*EME", 256)])
def test_the_pytorch_engine_keeps_what_the_formulas_say(pattern, length):
    from nemotron_nb.megatron.measure import measure_torch, predicted

    shape = replace(SMALL, pattern=pattern)
    measured = measure_torch(shape, 2, length)
    formulas = predicted(shape, Work(2 * length, formats=FORMATS["fp32"], kernels="torch", sequence=length))
    assert formulas.keys() == measured.keys()
    for kind in measured:
        assert formulas[kind] == pytest.approx(measured[kind], rel=0.05), kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_what_the_formulas_say():
    from nemotron_nb.megatron.measure import kept_on_gpu, predicted

    formulas = predicted(SMALL, Work(8 * 512, formats=FORMATS["fp32"], kernels="torch", sequence=512))
    assert sum(formulas.values()) == pytest.approx(kept_on_gpu(SMALL, 8, 512), rel=0.05)


def test_the_column_of_a_gpu_is_empty_without_one_and_full_with_one(monkeypatch):
    from nemotron_nb.megatron import measure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure.kept_on_gpu(SMALL, 2, 64) is None
    assert repr(measure.compared({"M": 1e6}, {"M": 1e6}, None)).split()[-1] == "-"
    assert repr(measure.compared({"M": 1e6}, {"M": 1e6}, 1.25e6)).split()[-1] == "1.250"


def test_recomputation_and_shards_only_ever_take_away():
    layout = Layout(64, tp=2, ep=8, sp=True)
    sizes = [sum(line.bytes for line in memory.activation_lines(NANO_SHAPE, layout, Work(8192, recompute=r))) for r in plan.RECOMPUTE]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    dealt, copied = (sum(x.bytes for x in memory.static_lines(NANO_SHAPE, layout, Work(1, distributed_optimizer=d))) for d in (True, False))
    assert dealt < copied
    assert sum(x.bytes for x in memory.static_lines(NANO_SHAPE, layout, Work(1, adapter=32))) < dealt
    with pytest.raises(UserError, match="core_attn"):
        memory.activation_lines(NANO_SHAPE, layout, Work(1, recompute=("core_atn",)))


def test_the_published_default_of_super_needs_what_was_worked_out_by_hand():
    """22.5 B parameters on a rank: 45 GB of weights, 45 GB of bf16 gradients (90 GB in float32), 46 GB of optimizer."""
    lines = memory.static_lines(SUPER_SHAPE, Layout(32, ep=8, sp=True), Work(4096))
    found = {kind: sum(x.bytes for x in lines if x.name.startswith(kind)) / 1e9 for kind in ("weights", "gradients", "optimizer")}
    assert found == pytest.approx({"weights": 45, "gradients": 90, "optimizer": 46}, abs=1)


def test_in_a_pipeline_the_first_stage_keeps_most_micro_batches():
    layout, work = Layout(8, pp=4), Work(1024, micro_batches=16)
    assert [memory.in_flight(layout, work, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert memory.in_flight(layout, replace(work, micro_batches=2), 0) == 2


def test_operations_are_two_for_each_active_parameter_and_more_for_attention():
    """Products of matrices, counted from the parameters; the rest of the table is scan, filter and attention."""
    for shape in (NANO_SHAPE, shape_of(SUPER)):
        found = time.operations(shape, 4096)
        extra = sum(n for name, n in found.items() if name in ("M scan", "M filter", "* scores and values"))
        vectors = 0.001 * sum(found.values())
        assert sum(found.values()) - extra == pytest.approx(2 * parameters.active_in_a_token(shape, 1), abs=vectors)
    assert time.operations(NANO_SHAPE, 8192)["* scores and values"] == 2 * time.operations(NANO_SHAPE, 4096)["* scores and values"]


@pytest.mark.parametrize("layout", [Layout(16, ep=8), Layout(32, 4, 2, 1, 8, sp=True), Layout(64, 2, 4, 2, 8, sp=True)])
def test_no_expectation_beats_the_bound(layout):
    when = time.step_time(NANO_SHAPE, layout, Work(8192, micro_batches=8), H100)
    assert 0 < when.bound <= when.fast <= when.slow
    best = when.useful / (layout.world * H100.flops)
    assert when.bound >= best * (1 - 1e-9)
    assert when.bubble == pytest.approx((layout.pp - 1) / (8 + layout.pp - 1))


def test_useful_operations_do_not_depend_on_the_layout():
    whole = time.step_time(NANO_SHAPE, Layout(8), Work(4096, micro_batches=2), H100).useful
    for layout in (Layout(8, pp=2), Layout(8, tp=2, sp=True), Layout(8, cp=4), Layout(8, ep=8)):
        work = Work(4096, micro_batches=16 // layout.dp, recompute=("full",))
        assert time.step_time(NANO_SHAPE, layout, work, H100).useful == pytest.approx(whole)


def test_what_leaves_the_domain_goes_over_the_network():
    work = Work(4096, micro_batches=4)
    inside = time.exchanged(NANO_SHAPE, Layout(16, tp=8, ep=8, sp=True), work, 0, 8)
    outside = time.exchanged(NANO_SHAPE, Layout(16, tp=8, ep=16, sp=True), work, 0, 8)
    assert inside["expert"][1] == 0 < outside["expert"][1]
    assert inside["tensor"][1] == 0
    assert time.exchanged(NANO_SHAPE, Layout(16, tp=8, ep=16, sp=True), work, 0, 72)["expert"][1] == 0


@pytest.mark.parametrize("layout, word", [
    (Layout(16, tp=16, sp=True), "groups of Mamba-2"), (Layout(12, ep=3), "share 128 experts"), (Layout(16, tp=2), "sequence parallelism"),
    (Layout(12, cp=3), "heads in"), (Layout(10, pp=4), "no multiple"), (Layout(7), "rows of a step"),
])  # fmt: skip
def test_what_megatron_refuses_is_refused(layout, word):
    assert any(word in reason for reason in plan.refusals(NANO_SHAPE, layout, 4096, 64))


def test_rows_must_be_divisible_by_twice_the_context_ranks():
    assert not plan.refusals(NANO_SHAPE, Layout(8, cp=4), 4096, 64)
    assert any("pad them" in reason for reason in plan.refusals(NANO_SHAPE, Layout(8, cp=4), 4100, 64))


def test_the_search_puts_the_fastest_that_fits_first():
    found = plan.search(SUPER_SHAPE, 32, Work(4096, formats=FORMATS["bf16_reduced"]), H100, 64)
    fitting = [j for j in found.judged if j.fits]
    assert found.best is fitting[0]
    assert [j.time.expected for j in fitting] == sorted(j.time.expected for j in fitting)
    assert found.judged[: len(fitting)] == tuple(fitting)
    assert all(j.breaks for j in found.judged[len(fitting) :])
    assert all(j.memory.total <= H100.memory for j in fitting)


def test_an_order_without_a_list_is_a_permutation_and_depends_on_its_seed():
    for samples in (1, 5, 64, 257):
        assert sorted(scale.place_of_sample(i, samples, 3) for i in range(samples)) == list(range(samples))
    assert scale.order_by_hand(64, 1) != scale.order_by_hand(64, 2)
    ranks = [list(scale.samples_of_rank(2, r, 4, 8, 100, 5)) for r in range(4)]
    assert sum(ranks, []) == scale.order_by_hand(100, 5)[16:24]


def test_goodput_is_what_a_simulation_gives():
    cluster = failures.Cluster(500, 0.5 * failures.YEAR, save=60, restart=600)
    runs = [failures.simulate(cluster, 1800, 400, seed) for seed in range(6)]
    error = (sum((r - sum(runs) / 6) ** 2 for r in runs) / 30) ** 0.5  # of the mean
    assert abs(failures.goodput(cluster, 1800) - sum(runs) / 6) < 5 * error
    best = failures.best_interval(cluster)
    assert all(failures.goodput(cluster, best) >= failures.goodput(cluster, best * f) for f in (0.5, 0.9, 1.1, 2))
    assert best == pytest.approx(math.sqrt(2 * 60 * cluster.mtbf), rel=0.1)


def asked(*arguments, code=0):
    from nemotron_nb.cli import app

    done = CliRunner().invoke(app, list(arguments))
    if code == 0 and done.exception:
        raise done.exception
    return done


@pytest.mark.parametrize("family", ["nano3", "super3"])
@pytest.mark.parametrize("words", [["sft"], ["pretrain"], ["rl"], ["sft", "-c", "tiny"], ["rl", "-c", "dpo"], ["data", "prep", "sft"]], ids=" ".join)
def test_every_stage_can_be_planned(family, words):
    fewer = ["run.nodes=4"] if words == ["pretrain"] else []  # there are more layouts of 512 GPUs than are needed here
    told = json.loads(asked(family, *words, "--plan", "--json", "--gpu", "h200-141", *fewer).stdout)
    assert told["gpu_from"] == "--gpu" and len(told) > 3


def test_a_plan_says_what_breaks_and_what_would_fit():
    said = asked("super3", "sft", "--plan", "--gpu", "h100-80").stdout
    assert "warning: TP1 PP1 CP1 EP8 DP32 does not fit h100-80" in said and "would fit" in said
    assert "does not fit" not in asked("super3", "sft", "--plan", "--gpu", "h100-80", "model.tensor_model_parallel_size=8", "model.expert_model_parallel_size=32").stdout.partition("Parameters")[0]


@pytest.mark.parametrize("arguments, words", [
    (["--plan", "--gpu", "h100"], "did you mean 'h100-80'"), (["--gpu", "h100-80"], "--gpu without --plan"),
    (["--plan", "--utilisation", "quick"], "0.1,0.38"), (["--plan", "--utilisation", "0.5,0.2"], "the smaller first"),
])  # fmt: skip
def test_what_cannot_be_planned_is_an_error(arguments, words):
    found = asked("nano3", "sft", *arguments, code=1).exception
    assert isinstance(found, UserError) and words in str(found)


def test_dry_run_warns_of_the_machine_of_the_profile(tmp_path, monkeypatch):
    for gpu, warned in (("h100-80", True), ("", True)):
        (tmp_path / "env.toml").write_text(f'[cluster]\nexecutor = "slurm"\ngpu = "{gpu}"\n')
        monkeypatch.setenv("NEMOTRON_ENV_TOML", str(tmp_path / "env.toml"))
        notes = json.loads(asked("super3", "sft", "--run", "cluster", "--dry-run", "--json").stdout)["notes"]
        assert any("does not fit h100-80" in note for note in notes) is warned
    notes = json.loads(asked("nano3", "sft", "-c", "tiny", "--dry-run", "--json").stdout)["notes"]
    assert not any("does not fit" in note for note in notes)


def test_dry_run_goes_on_where_nothing_can_be_calculated():
    told = json.loads(asked("super3", "sft", "--dry-run", "--json", "model.recompute_granularity=selective", "model.recompute_modules=[mla_up_proj]").stdout)
    assert any("cannot be calculated: nothing is known of 'mla_up_proj'" in note for note in told["notes"])


def test_the_sizes_of_the_tiny_model_are_those_that_are_trained():
    from nemotron_nb.stages.plan import tiny_shape
    from nemotron_nb.train.model import count_parameters, tiny_config

    for config in (ModelConfig(), ModelConfig(pattern="M*E", hidden_size=64, attention_heads=2, mamba_heads=2, experts=4, expert_size=32)):
        assert parameters.total_parameters(tiny_shape(config, 300)) == sum(count_parameters(tiny_config(300, config)).values())


def _said_by(recipe, kind):
    """The layout that Megatron-Bridge's own recipe writes down, from its source: it may need a GPU to be imported."""
    place = next((Path(str(f.locate())) for f in importlib.metadata.files("megatron-bridge") if str(f).endswith(f"nemotronh/h100/{recipe}.py")), None)
    names = {("nemotron_3_nano", "pretrain"): "nemotron_3_nano_pretrain_8gpu_h100_bf16_config", ("nemotron_3_nano", "sft"): "_nemotron_3_nano_finetune_model",
             ("nemotron_3_super", "pretrain"): "_nemotron_3_super_pretrain_64gpu_h100_bf16_config", ("nemotron_3_super", "sft"): "nemotron_3_super_sft_16gpu_h100_bf16_config"}  # fmt: skip
    own = next(n for n in ast.parse(place.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == names[recipe, kind])
    set_, passed = [n for n in ast.walk(own) if isinstance(n, ast.Assign)], [k for n in ast.walk(own) if isinstance(n, ast.Call) for k in n.keywords]
    pairs = [(n.targets[0].attr, n.value) for n in set_ if isinstance(n.targets[0], ast.Attribute)] + [(k.arg, k.value) for k in passed if k.arg]
    return {f"model.{name}": value.value if isinstance(value, ast.Constant) else tuple(e.value for e in value.elts) for name, value in pairs if isinstance(value, ast.Constant | ast.List)}


@pytest.mark.parametrize("recipe, kind", stage_plan.RECIPE_LAYOUTS)
def test_what_a_recipe_adds_is_what_its_source_says(recipe, kind):
    pytest.importorskip("megatron.core")
    theirs, ours = _said_by(recipe, kind), stage_plan.RECIPE_LAYOUTS[recipe, kind]
    for name, value in ours.items():
        assert (theirs.get(name) or None) == (value or None), name


def test_a_layout_that_nobody_gave_is_that_of_the_recipe():
    settings = pretrain_config("super3", "default").settings
    layout, work, _ = stage_plan.megatron_work(settings, 8192, "pretrain")
    assert (layout.tp, layout.pp, layout.ep, work.recompute) == (1, 2, 32, ("layernorm", "moe_act", "moe", "core_attn"))
    assert stage_plan.megatron_work(settings, 8192, "sft")[0].tp == 8
