"""Loss accounting with real processes: two and four ranks, uneven, idle, and context slices give the loss and gradient of one device."""

import datetime

import pytest
import torch
import torch.distributed as dist
from forked import forked_ranks
from precision import EXACT, FACTOR, sum_error

from nemotron_nb.core import UserError
from nemotron_nb.loss.fused import masked_linear_cross_entropy
from nemotron_nb.loss.mtp import count_depths, depth_lengths, mtp_cross_entropy, mtp_loss_by_hand, mtp_targets, mtp_weights
from nemotron_nb.loss.schedule import LOSS_STAGES
from nemotron_nb.loss.two_stage import (
    Denominators,
    MeanPair,
    accounting,
    accounting_ladder,
    accounting_table,
    answer_lengths,
    count,
    loss_by_hand,
    token_weights,
    unit_of,
    weights_of,
)

SEQUENCES = [[0, 0] + [1] * n for n in (1, 2, 3, 17, 41)] + [[0, 0, 0]]  # the last has nothing to train
CHATS = ["a", "b", "a", "c", "a", "d"]  # three sequences are one chat
HIDDEN, VOCAB = 5, 13


def batch() -> dict[str, torch.Tensor]:
    """A batch with very uneven sequences that differ in difficulty, [3, T, H] hidden states for three depths."""
    r = torch.Generator().manual_seed(3)
    mask = torch.tensor([bit for s in SEQUENCES for bit in s])
    sequence_of = torch.arange(len(SEQUENCES)).repeat_interleave(torch.tensor([len(s) for s in SEQUENCES]))
    hidden = torch.randn(3, len(mask), HIDDEN, generator=r, dtype=torch.float64) * (1 + sequence_of[:, None])
    return {"hidden": hidden, "labels": torch.randint(VOCAB, (len(mask),), generator=r), "mask": mask, "sequence_of": sequence_of}


def head() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def nll_under(weight: torch.Tensor):
    """Indices of labels -> their losses, with full logits."""
    b = batch()
    return lambda piece: torch.nn.functional.cross_entropy(b["hidden"][0][piece] @ weight.T, b["labels"][piece], reduction="none")


# ---- the ladder


def test_the_ladder_tells_right_from_wrong():
    weight, b = head().requires_grad_(), batch()
    rungs = accounting(nll_under(weight), weight, b["mask"], b["sequence_of"])
    assert len(rungs) == 2 * 13 and all(r.agrees for r in rungs if not r.known_mistake)
    wrong = {stage: {r.way for r in rungs if r.stage == stage and not r.agrees} for stage in LOSS_STAGES}
    assert wrong["token"] == {"mean of micro-batch means", "mean of rank means", "mask one label late"}
    assert wrong["sample"] == wrong["token"] | {"|O_c| counted on a slice", "weights cast to integers", "|B| = int(sum of weights)", "silent chats in |B|"}
    assert all(max(r.loss_gap, r.gradient_gap) > 0.01 for r in rungs if not r.agrees)
    for stage in LOSS_STAGES:
        expected = loss_by_hand(nll_under(weight)(torch.arange(len(b["mask"]))), b["mask"], b["sequence_of"], stage).item()
        assert all(r.loss == pytest.approx(expected, rel=EXACT) for r in rungs if r.stage == stage and r.agrees)


def test_the_ladder_by_arithmetic():
    """Two chats of one and three trained labels, losses 3 and 1, a parameter that multiplies them."""
    nll, mask, sequence_of = torch.tensor([3.0, 1, 1, 1]).double(), torch.ones(4, dtype=torch.long), torch.tensor([0, 1, 1, 1])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = {(r.stage, r.way): r.loss for r in accounting(lambda piece: scale * nll[piece], scale, mask, sequence_of)}
    assert found["token", "one device"] == 1.5 and found["sample", "4 ranks, one idle"] == 2.0
    assert found["token", "mean of rank means"] == 1.0  # ranks [3], [1, 1, 1], [], []
    assert found["sample", "weights cast to integers"] == 1.5
    # slices: parts 0 and 3 of each chat, parts 1 and 2: {3, 1} with |O_c| 1 each, and {1, 1} of the second chat alone
    assert found["sample", "|O_c| counted on a slice"] == pytest.approx((3 + 1 + 1) / 3, rel=EXACT)


def test_the_ladder_can_be_seen_and_read():
    weight, b = head().requires_grad_(), batch()
    rungs = accounting(nll_under(weight), weight, b["mask"], b["sequence_of"])
    assert accounting_table(rungs).text.count("WRONG") == sum(not r.agrees for r in rungs) == 10
    picture = accounting_ladder(rungs)
    assert picture.png.startswith(b"\x89PNG") and "in the sample stage 7 ways have a wrong loss or gradient" in picture.text


def test_a_model_in_float32_is_judged_with_its_own_tolerance():
    weight, b = head().requires_grad_(), batch()
    in_float32 = lambda piece: nll_under(weight)(piece).float()
    rungs = accounting(in_float32, weight, b["mask"], b["sequence_of"], tolerance=sum_error(len(b["mask"])))
    assert [r.agrees for r in rungs] == [r.agrees for r in accounting(nll_under(weight), weight, b["mask"], b["sequence_of"])]
    assert not all(r.agrees for r in accounting(in_float32, weight, b["mask"], b["sequence_of"], tolerance=EXACT) if not r.known_mistake)


def test_a_batch_without_training_has_no_ladder():
    weight, b = head().requires_grad_(), batch()
    with pytest.raises(UserError, match="no trained token"):
        accounting(nll_under(weight), weight, torch.zeros_like(b["mask"]), b["sequence_of"])


@pytest.mark.parametrize("lengths", [[3], [1, 1], [2, 7, 1]])
def test_right_ways_are_right_for_small_batches_without_padding(lengths):
    nll = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sequence_of, scale = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.ones((), dtype=torch.float64, requires_grad=True)
    rungs = accounting(lambda piece: scale * nll[piece], scale, torch.ones_like(sequence_of), sequence_of)
    assert all(r.agrees for r in rungs if not r.known_mistake) and len(rungs) == 26


def test_a_model_with_a_leak_is_found():
    """A loss that depends on what else is in the piece: no accounting can be right, and the right rungs say so."""
    weight, b = head().requires_grad_(), batch()
    honest = nll_under(weight)
    rungs = accounting(lambda piece: honest(piece) + 0.01 * honest(piece).mean(), weight, b["mask"], b["sequence_of"])
    assert not all(r.agrees for r in rungs if not r.known_mistake)


# ---- both means


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", ["sequence", "conversation"])
def test_mean_pairs_add_up_however_the_batch_is_cut(unit, seed):
    b, nll = batch(), nll_under(head())
    owner = unit_of(b["sequence_of"], CHATS, unit)
    T, lengths, counts = len(owner), answer_lengths(b["mask"], owner), count(b["mask"], owner)
    piece_of = torch.randint(4, (T,), generator=torch.Generator().manual_seed(seed))
    pieces = [(piece_of == p).nonzero().squeeze(1) for p in range(4)]
    record = sum((MeanPair.of(nll(piece), lengths[piece]) for piece in pieces), MeanPair.counted(counts)).record()
    for stage in LOSS_STAGES:
        expected = loss_by_hand(nll(torch.arange(T)), b["mask"], owner, stage).item()
        assert record[f"loss_{stage}"] == pytest.approx(expected, rel=EXACT)
    assert (record["trained_tokens"], record["conversations"]) == (counts.tokens, counts.conversations)
    assert type(record["trained_tokens"]) is type(record["conversations"]) is int


def test_what_is_untrained_is_not_read():
    lengths = torch.tensor([0, 1])
    spoilt = MeanPair.counted(Denominators(1, 1)) + MeanPair.of(torch.tensor([float("nan"), 2.0], requires_grad=True), lengths)
    assert spoilt.record()["loss_token"] == 2.0 and not spoilt.sums.requires_grad
    with pytest.raises(UserError, match="no trained token"):
        MeanPair.nothing().record()


# ---- real processes


def layouts(ranks: int) -> dict[str, list[torch.Tensor]]:
    """Name -> what each rank holds."""
    b = batch()
    rows = [(b["sequence_of"] == s).nonzero().squeeze(1) for s in range(len(SEQUENCES))]
    deal = {2: {"uneven": ([0, 1, 2, 3], [4, 5]), "idle": ([0, 1, 2, 3, 4], [5])}, 4: {"uneven": ([0, 1], [2], [3], [4, 5]), "idle": ([0, 1, 2], [3, 4], [5], [])}}
    found = {name: [torch.cat([*(rows[s] for s in part), rows[0][:0]]) for part in parts] for name, parts in deal[ranks].items()}
    groups = [range(len(rows))] if ranks == 2 else [(0, 1, 2, 5), (3, 4)]  # four ranks: two data-parallel groups of two context slices
    parts = [[rows[s].tensor_split(4) for s in group] for group in groups]
    found["context slices"] = [torch.cat([torch.cat([p[c], p[3 - c]]) for p in part]) for part in parts for c in (0, 1)]
    return found


class Head(torch.nn.Module):
    """The output weight, with the loss inside, so that data parallelism sees its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(head())

    def forward(self, hidden, labels, weights, scale):
        call = mtp_cross_entropy if hidden.dim() == 3 else masked_linear_cross_entropy
        loss, stats = call(hidden, self.weight, labels, weights, scale=scale)
        return loss, stats.nll


def averaged(group, wrap, *arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient averaged over the ranks, the gradient by PyTorch's own data parallelism if `wrap`; nll of this rank."""
    module = Head()
    called = torch.nn.parallel.DistributedDataParallel(module, process_group=group) if wrap else module
    loss, nll = called(*arguments)
    loss.backward()
    total, gradient = loss.detach() / group.size(), module.weight.grad / (1 if wrap else group.size())
    dist.all_reduce(total, group=group)
    if not wrap:
        dist.all_reduce(gradient, group=group)
    return total, gradient, nll


def results_of(rank: int, group) -> dict:
    """What the ranks of a group compute together: right, with local counts, with three depths, and both means."""
    ranks, b, results = group.size(), batch(), {}
    targets, masks = mtp_targets(b["labels"], b["mask"], b["sequence_of"])
    depths = depth_lengths(masks, b["sequence_of"]), count_depths(masks, b["sequence_of"])
    lengths, counts = answer_lengths(b["mask"], b["sequence_of"]), count(b["mask"], b["sequence_of"])
    for layout, pieces in layouts(ranks).items():
        piece = pieces[rank]
        hidden, labels, seen = b["hidden"][:, piece], b["labels"][piece], (b["mask"][piece], b["sequence_of"][piece])
        own = count(*seen)
        for stage in LOSS_STAGES:
            weights = weights_of(lengths[piece], stage, torch.float64)
            *results[ranks, layout, stage, "global"], nll = averaged(group, ranks == 2, hidden[0], labels, weights, ranks / counts.of(stage))
            local = token_weights(*seen, stage, torch.float64), 1 / own.of(stage) if own.tokens else 0.0
            *results[ranks, layout, stage, "local"], _ = averaged(group, False, hidden[0], labels, *local)
            weights = mtp_weights(depths[0][:, piece], depths[1], stage, dtype=torch.float64)
            *results[ranks, layout, stage, "mtp"], _ = averaged(group, False, hidden, targets[:, piece], weights, float(ranks))
        seen_here = MeanPair.of(nll, lengths[piece])
        results[ranks, layout, "record"] = (seen_here + (MeanPair.nothing() if rank else MeanPair.counted(counts))).all_reduced(group).record()
        if layout != "context slices":  # whole conversations: each rank may count its own
            assert (seen_here + MeanPair.counted(own)).all_reduced(group).record() == results[ranks, layout, "record"]
    return results


def rank_main(rank: int, folder: str) -> None:
    """One of four processes: first the first two of them are a group, then all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=datetime.timedelta(seconds=120))
    two, four = dist.new_group([0, 1]), dist.new_group([0, 1, 2, 3])
    results = results_of(rank, two) if rank < 2 else {}
    results |= results_of(rank, four)
    if rank == 1:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def computed_by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    forked_ranks(rank_main, 4, str(folder), folder=folder)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("layout", ["uneven", "idle", "context slices"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_loss_and_the_gradient_of_one_device(ranks, layout, computed_by_ranks):
    b, weight = batch(), head().requires_grad_()
    labels, _ = mtp_targets(b["labels"], b["mask"], b["sequence_of"])
    full = torch.nn.functional.cross_entropy((b["hidden"] @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(3, -1)
    for stage in LOSS_STAGES:
        oracles = {"global": loss_by_hand(full[0], b["mask"], b["sequence_of"], stage), "mtp": mtp_loss_by_hand(full, b["mask"], b["sequence_of"], stage)}
        for name, expected in oracles.items():
            loss, gradient = computed_by_ranks[ranks, layout, stage, name]
            torch.testing.assert_close(loss, expected.detach(), rtol=EXACT, atol=0)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight, retain_graph=True)[0], rtol=FACTOR * EXACT, atol=EXACT)
        right, wrong = (computed_by_ranks[ranks, layout, stage, how][1] for how in ("global", "local"))
        assert (wrong - right).abs().max() > 0.01 * right.abs().max()  # each rank divides by its own count
        assert computed_by_ranks[ranks, layout, "record"][f"loss_{stage}"] == pytest.approx(oracles["global"].item(), rel=EXACT)
    counts = count(b["mask"], b["sequence_of"])
    assert [computed_by_ranks[ranks, layout, "record"][k] for k in ("trained_tokens", "conversations")] == [counts.tokens, counts.conversations] == [64, 5]
