"""Loss kernels on chips that are not here: occupancy by counting and by division, bounds, and the table of compiled kernels."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.loss import bound, compiled, kernel, occupancy
from nemotron_nb.loss.bound import CHIPS, Sizes
from nemotron_nb.loss.occupancy import LIMITS, Needs
from nemotron_nb.megatron.time import GPUS

VERSION, ROWS = compiled.read_space(Path(__file__).parents[1] / "benchmarks" / "kernel_space.json")


@pytest.mark.parametrize(
    "needs, blocks",
    [
        (Needs(4, 37, 0), 12),  # CUDA C++ best practices guide, occupancy: 12 blocks of 128 threads, 75 %
        (Needs(10, 37, 0), 4),  # there: 4 blocks of 320 threads, 63 %
        (Needs(16, 64, 0), 2),  # CUDA C++ programming guide, multiprocessor level: 2 x 512 x 64 registers
        (Needs(16, 65, 0), 1),  # there: one register more
        (Needs(8, 255, 147_456), 1),  # by hand: 255 registers are 8,192 a warp, two warps a part
        (Needs(8, 256, 0), 0),  # no thread has 256
        (Needs(33, 16, 0), 0),  # 1,056 threads
        (Needs(1, 16, 0), 32),  # the limit of blocks, before that of 64 warps
        (Needs(4, 32, 227 * 1024), 1),
        (Needs(4, 32, 227 * 1024 + 1), 0),
        (Needs(4, 32, 113 * 1024), 2),  # 2 x (113 + 1) KiB = 228
        (Needs(4, 32, 113 * 1024 + 1), 1),
        (Needs(4, 32, 56 * 1024), 4),  # 4 x (56 + 1)
    ],
)
def test_worked_examples(needs, blocks):
    assert occupancy.occupancy(90, needs).blocks == occupancy.blocks_by_hand(LIMITS[90], needs) == blocks


def test_tensor_memory_bounds_blocks_on_blackwell_alone():
    small = Needs(4, 64, 30_000)
    fits = {columns: occupancy.occupancy(100, replace(small, tensor_columns=columns)) for columns in (0, 128, 256, 512)}
    assert [found.blocks for found in fits.values()] == [7, 4, 2, 1] and fits[256].bound_by == ("tensor memory",)


blocks = st.builds(Needs, warps=st.integers(1, 34), registers=st.integers(1, 260), shared=st.integers(0, 240_000))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(LIMITS)), blocks, st.sampled_from([0, 32, 64, 128, 256, 512]))
def test_division_is_what_filling_an_sm_gives(capability, needs, columns):
    needs = replace(needs, tensor_columns=columns if LIMITS[capability].tensor_columns else 0)
    assert occupancy.occupancy(capability, needs).blocks == occupancy.blocks_by_hand(LIMITS[capability], needs)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(LIMITS)), blocks, st.sampled_from(["registers", "shared", "warps"]), st.integers(1, 5000))
def test_a_block_that_needs_more_never_fits_more_often(capability, needs, what, more):
    larger = replace(needs, **{what: getattr(needs, what) + more})
    assert occupancy.occupancy(capability, larger).blocks <= occupancy.occupancy(capability, needs).blocks


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 9))
def test_panels_are_those_of_a_walk_through_the_grid(m, n, group):
    assert bound.panels(m, n, group) == bound.panels_by_hand(m, n, group)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CHIPS)), st.integers(1, 70_000), st.sampled_from([2688, 4096]), st.integers(1, 4))
def test_no_strategy_undercuts_the_floor(name, M, H, resident):
    chip, s = CHIPS[name], Sizes(M, H)
    tile = (kernel.tile_shape(torch.bfloat16, chip.capability), resident)
    floor = bound.total(bound.floor_parts(chip, s))[0]
    for parts in (bound.speed_parts(chip, s, resident), bound.memory_parts(chip, s, tile, tile)):
        least, estimate = bound.total(parts)
        assert floor * (1 - 1e-12) <= least <= estimate


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CHIPS)), st.integers(1, 5000), st.integers(1, 9000), st.integers(16, 5000), st.sampled_from([64, 128, 256]))
def test_a_tile_kernel_takes_its_products_and_its_exponentials(name, m, n, k, BM):
    chip, tile = CHIPS[name], {"BM": BM, "BN": 128, "BK": 64}
    alone, shared = (bound.tile_part(chip, "lse", m, n, k, tile, resident, 0).seconds["SMs"] for resident in (1, 2))
    assert bound.product(chip, "", m, n, k, 2).seconds["products"] <= shared <= alone
    assert alone >= m * n / (16 * chip.clock * chip.sms) + 2 * m * n * k / chip.flops


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 150))
def test_the_tail_is_that_of_tiles_dealt_out_one_by_one(tiles, sms):
    busy = [0] * sms  # tiles that each SM has done; the next tile goes to one that is free first
    for _ in range(tiles):
        busy[busy.index(min(busy))] += 1
    assert bound.tail(tiles, sms) == tiles / (sms * max(busy))


def test_chips_are_those_of_the_plan():
    for name, chip in CHIPS.items():
        assert (chip.flops, chip.bandwidth) == (GPUS[name].flops, GPUS[name].bandwidth)


def test_an_interpreted_kernel_is_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="unset it"):
        compiled.compile_for(kernel.scale_kernel, {"BLOCK": 64}, 90, {})


# The table


def same_triton():
    """Another Triton makes other code: then the table says nothing about it."""
    import triton

    if triton.__version__ != VERSION:
        pytest.skip(f"the table is of triton {VERSION}, here is {triton.__version__}")


def test_the_table_has_every_choice_once():
    have = sorted((r.capability, r.kernel, sorted(r.choice.items())) for r in ROWS)
    capabilities = {chip.capability for chip in CHIPS.values()}
    assert have == sorted((c, name, sorted(choice.items())) for c in capabilities for name, choice in compiled.space())
    pinned = (Path(__file__).parents[1] / "constraints.txt").read_text()
    assert f"triton=={VERSION}\n" in pinned, "the table is of another Triton: python benchmarks/kernel_space.py --compile"


@pytest.mark.parametrize("capability", [90, 100])
def test_what_the_library_chooses_can_be_launched(capability):
    tile = {key: number for key, number in kernel.tile_shape(torch.bfloat16, capability).items() if key != "GROUP"}
    ours = {"lse": tile, "gradient": tile, "rows": kernel._row_blocks(131072), "combine": None, "scale": None}
    for name, choice in ours.items():
        row = next(r for r in ROWS if (r.kernel, r.capability) == (name, capability) and choice in (None, r.choice))
        assert row.needs and not row.spilled and occupancy.occupancy(capability, row.needs).blocks >= 1, row
        assert ("TMA" not in row.instructions) and (name not in ("lse", "gradient") or row.instructions[0] in ("wgmma", "tcgen05"))


@pytest.mark.parametrize("capability", [90, 100])
def test_a_row_drawn_from_the_table_compiles_to_the_same(capability):
    """One a chip; what spills takes the compiler ten times as long."""
    same_triton()
    row = random.Random(capability).choice([r for r in ROWS if r.capability == capability and r.needs and not r.spilled])
    assert compiled.compiled(row.kernel, row.choice, row.capability) == row


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_the_whole_table_compiles_to_the_same(part):
    same_triton()
    assert "TRITON_INTERPRET" not in os.environ
    for row in ROWS[part::4]:
        assert compiled.compiled(row.kernel, row.choice, row.capability) == row
