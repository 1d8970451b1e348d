"""Isolation, measured: what is reset does not leak, what is not reset does, and the measurement can tell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from precision import float_error, near

from nemotron_nb.core import UserError
from nemotron_nb.data.pack import make_pack
from nemotron_nb.train import leaks
from nemotron_nb.train.batches import rows_of
from nemotron_nb.train.leaks import LAYOUTS, RESETS, gradient_map, leak_map, one_row_hidden
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

SIZES = (9, 17, 5, 12)
RIGHT = ("rows of the engine", "one row, all reset")


def off_diagonal(between):
    """Everything that goes from one sequence to another."""
    return between * ~np.eye(len(between), dtype=bool)


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slower on two threads, far slower where others work too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    """Every kind of layer, twice, so that a leak has two ways to go on."""
    return build_model(ModelConfig(pattern="M*EM*E", hidden_size=32, mamba_heads=2, experts=4, expert_size=16), vocab_size=64, seed=3)


@pytest.fixture(scope="module")
def pack():
    """Four sequences of random tokens."""
    rng = np.random.default_rng(1)
    return make_pack([rng.integers(1, 64, n) for n in SIZES], [np.ones(n, np.uint8) for n in SIZES])


def test_layouts_differ_in_their_resets_alone(model, pack):
    tokens = torch.from_numpy(pack.input_ids.astype(np.int64))
    with torch.no_grad():
        whole = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        alone = torch.cat([model.model(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in tokens.split(SIZES)])
        unit = float_error(lambda m: m.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0], model)
        assert near(one_row_hidden(model, tokens, SIZES, ()), whole, unit)
        assert near(one_row_hidden(model, tokens, SIZES, RESETS), alone, unit)
        for missing in RESETS:
            assert not near(one_row_hidden(model, tokens, SIZES, set(RESETS) - {missing}), alone, unit), missing


@pytest.mark.parametrize("layout", RIGHT)
def test_nothing_reaches_another_sequence(model, pack, layout):
    found = leak_map(model, pack, layout, probes=20)
    assert found.isolated and found.largest_leak <= found.rounding < 1e-3 and "nothing reaches" in repr(found)
    assert (np.diag(found.between) > 1e-3).all(), "a token matters to its own sequence"
    assert off_diagonal(gradient_map(model, pack, layout)).max() == 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in RIGHT])
def test_a_missing_reset_is_seen_forward_and_back(model, pack, layout):
    found = leak_map(model, pack, layout, probes=20)
    gradients = gradient_map(model, pack, layout)
    assert not found.isolated and "LEAKS" not in repr(found) and "by up to" in repr(found)
    assert found.between[0, 1] > found.rounding and gradients[0, 1] > 0, "the neighbour is reached"
    assert np.tril(found.between, -1).max() <= found.rounding and np.tril(gradients, -1).max() == 0, "the past is not"


def test_each_way_reaches_as_far_as_its_operation():
    """One layer each: attention reaches everybody, the convolution three tokens into the next, the scan everybody."""
    tokens = make_pack([np.arange(1, 1 + n) for n in (6, 6, 6)], [np.ones(n, np.uint8) for n in (6, 6, 6)])
    one = build_model(ModelConfig(pattern="M", hidden_size=32, mamba_heads=2), vocab_size=64, seed=1)
    found = leak_map(one, tokens, "convolution not reset", probes=20)
    last = found.changes[list(found.probes).index(5)]
    assert (last[6:9] > found.rounding).all() and found.between[0, 2] <= found.rounding
    early = found.changes[list(found.probes).index(2)]
    assert early[6:].max() <= found.rounding, "four tokens back is out of its sight"
    assert leak_map(one, tokens, "scan not reset", probes=20).between[0, 2] > 0
    attention = build_model(ModelConfig(pattern="M*", hidden_size=32, mamba_heads=2), vocab_size=64, seed=1)
    assert (told := leak_map(attention, tokens, "attention not reset", probes=20)).between[0, 2] > told.rounding


def test_an_engine_that_forgets_the_borders_is_caught(model, pack, monkeypatch):
    def without_borders(pack):
        return rows_of(replace(pack, seq_start_id=pack.seq_start_id[:1], conversation_ids=("0",)))

    monkeypatch.setattr(leaks, "rows_of", without_borders)
    found = leak_map(model, pack)
    assert not found.isolated and found.between[0, 3] > found.rounding
    assert off_diagonal(gradient_map(model, pack)).max() > 0


@pytest.mark.parametrize("max_tokens", (1, 40, 8192))
def test_the_engine_is_isolated_however_rows_are_grouped(model, pack, max_tokens):
    def grouped_so(*arguments):
        return leaks.engine_rows(*arguments, max_tokens=max_tokens)

    assert leak_map(model, pack, grouped_so).isolated


def test_the_engine_and_a_row_with_all_resets_have_the_same_losses(model, pack):
    tokens, counted = torch.from_numpy(pack.input_ids.astype(np.int64)), torch.ones(len(pack), dtype=torch.bool)
    counted[[end - 1 for _, end in pack.spans]] = False
    with torch.no_grad():
        (one, nll), (other, again) = (LAYOUTS[name](model, pack, tokens, counted) for name in RIGHT)
        units = [float_error(lambda m, k=k: LAYOUTS[RIGHT[1]](m, pack, tokens, counted)[k], model) for k in (0, 1)]
    assert near(nll, again, units[1]) and near(one, other, units[0])


def test_the_model_is_left_as_it_was(model, pack):
    before = {name: p.clone() for name, p in model.named_parameters()}
    shared = model.get_input_embeddings()
    gradient_map(model, pack)
    with pytest.raises(RuntimeError):
        gradient_map(model, pack, lambda *arguments: (_ for _ in ()).throw(RuntimeError("a layout that fails")))
    assert model.get_input_embeddings() is shared and all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sequences_of_one_and_two_tokens(model):
    tiny = make_pack([np.array([5, 6, 7]), np.array([8]), np.array([9, 10])], [np.ones(3, np.uint8), np.ones(1, np.uint8), np.ones(2, np.uint8)])
    for layout in RIGHT:
        assert leak_map(model, tiny, layout).isolated
    assert not leak_map(model, tiny, "nothing reset").isolated


def test_pictures_say_what_they_show(model, pack):
    maps = [leak_map(model, pack, name, probes=2) for name in ("rows of the engine", "nothing reset")]
    picture = leaks.leak_picture(maps)
    assert "rows of the engine: nothing reaches another conversation" in picture.text and "nothing reset: a change" in picture.text
    assert picture.png.startswith(b"\x89PNG") and len(picture.png) < 150_000
    data, about = maps[0]._repr_mimebundle_()
    assert "image/png" in data and about["image/png"]["alt"]
    isolation = leaks.isolation_picture(pack)
    assert "9, 17, 5, 12 tokens" in isolation.text and "reset 4 times" in isolation.text


def test_an_unknown_layout_is_refused(model, pack):
    with pytest.raises(UserError, match="did you mean 'nothing reset'"):
        leak_map(model, pack, "nothing rest")
