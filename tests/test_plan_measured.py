"""The planner against Megatron's own model, buffers and saved tensors. Takes a minute: Megatron is imported in processes of its own."""

from dataclasses import replace

import pytest
from plan_shapes import MID, SMALL

from nemotron_nb.megatron import measure
from nemotron_nb.megatron.memory import FORMATS, Work
from nemotron_nb.megatron.parameters import Layout, Shape, exact_parameters, parameters_of_stage, shape_of, total_parameters
from nemotron_nb.megatron.versions import installed_version
from nemotron_nb.train.settings import NANO, SUPER

pytestmark = [pytest.mark.long, pytest.mark.skipif(not installed_version("megatron-bridge"), reason="needs the extra megatron")]
FLAT, GPT = replace(SMALL, latent=0), Shape("*-" * 4, 256, heads=8, kv_heads=8, head_dim=32, dense_size=1024, vocab=1024)
FORWARD = [(SMALL, 4, 128, "float32"), (MID, 2, 256, "bfloat16"), (replace(SMALL, latent=0), 3, 64, "float32")]
STATIC = [(Layout(8, tp=2, ep=4, sp=True), True), (Layout(8, tp=2, ep=4, sp=True), False), (Layout(4, ep=2), True)]
LAYOUTS = [
    (shape_of(NANO), Layout(1)), (shape_of(NANO), Layout(32, 4, 2, 1, 8, sp=True)),
    (shape_of(SUPER, mtp_depths=2), Layout(128, 8, 2, 1, 16, sp=True)), (shape_of(SUPER, mtp_depths=2), Layout(32, ep=8)),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    calls = [measure.megatron_call(*forward) for forward in FORWARD] + [measure.static_call(FLAT, *static) for static in STATIC]
    calls += [measure.bridge_call(replace(GPT, pattern="*-" * layers), Layout(8), 4096, 1) for layers in (4, 8)]
    return measure.with_megatron(*calls)


@pytest.mark.parametrize("i", range(len(FORWARD)))
def test_megatron_keeps_what_the_formulas_say(measured, i):
    shape, sequences, length, dtype = FORWARD[i]
    work = Work(sequences * length, formats=FORMATS["fp32" if dtype == "float32" else "bf16"], kernels="plain", sequence=length)
    formulas = measure.predicted(shape, work)
    assert formulas.keys() == measured[i].keys()
    for kind, size in measured[i].items():
        assert formulas[kind] == pytest.approx(size, rel=0.05), kind


@pytest.mark.parametrize("i", range(len(STATIC)))
def test_megatrons_buffers_and_optimizer_are_as_large_as_the_formulas_say(measured, i):
    found, formulas = measured[len(FORWARD) + i], measure.static_groups(FLAT, *STATIC[i])
    for kind, size in found.items():
        assert formulas[kind] == pytest.approx(size, rel=0.05), kind


def test_megatron_bridges_estimator_differs_by_what_it_counts_besides(measured):
    four, eight = measured[-2:]
    norms, masks = (2 * 4 + 1) * GPT.hidden, 4 * 2 * 4096 * GPT.hidden  # LayerNorm's second vector; dropout
    assert four["parameters"] - total_parameters(GPT) == norms
    lines = measure.activation_lines(GPT, Layout(8), Work(4096))
    kept = sum(line.bytes for line in lines if not line.name.startswith(("start", "end")))
    assert kept + masks == pytest.approx(eight["kept"] - four["kept"], rel=0.05)


@pytest.mark.parametrize("shape, layout", LAYOUTS, ids=lambda x: str(x) if isinstance(x, Layout) else x.pattern[:8])
def test_megatrons_own_model_has_as_many_parameters(shape, layout):
    ranks = sorted({stage * layout.world // layout.pp for stage in range(layout.pp)} | {layout.world - 1})
    for rank, counted in zip(ranks, exact_parameters(shape, layout, ranks), strict=True):
        assert sum(counted.values()) == sum(parameters_of_stage(shape, layout, rank * layout.pp // layout.world).values())
