"""Phases and their samples: ends, shares, passes, resuming, long context, and the published tables."""

import json
from pathlib import Path

import numpy as np
import pytest

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.blend import load_blend
from nemotron_nb.pretrain.curriculum import (
    FAMILIES, Curriculum, Phase, published_curriculum, published_numbers, published_phases, published_table,
)
from nemotron_nb.pretrain.mixing import (
    CurriculumReader, LongContext, LongContextReader, curriculum_picture, lengths_of_steps, shares, shares_table,
)
from nemotron_nb.pretrain.indexed import IndexedWriter
from nemotron_nb.pretrain.order import Mixture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three sources; the ids of each say which it is; the second lies in two files."""
    folder, rng, made = tmp_path_factory.mktemp("files"), np.random.default_rng(0), {}
    for k, (name, count) in enumerate((("web", 200), ("code", 60), ("code", 20), ("wiki", 30))):
        sizes = rng.integers(5, 60, count)
        with IndexedWriter(folder / f"{name}{k}", "uint16") as writer:
            writer.add(np.full(sizes.sum(), 100 + "web code wiki".split().index(name)), sizes)
        made.setdefault(name, []).append(folder / f"{name}{k}")
    return made


BROAD, GOOD = {"web": 6, "code": 4}, {"wiki": 1, "code": 3}


def curriculum(**end):
    return Curriculum([Phase(BROAD, "broad", **(end or {"until_fraction": 0.75})), Phase(GOOD, "good")], 80, 10, 32)


@pytest.mark.parametrize(("end", "step"), [({"until_step": 20}, 20), ({"until_tokens": 20 * 320 - 5}, 20), ({"until_fraction": 0.25}, 20)])
def test_an_end_in_steps_tokens_or_as_a_fraction(end, step):
    assert curriculum(**end).spans() == [range(0, step), range(step, 80)]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "no phases"),
        ([{"weights": {}}], "without sources"),
        ([{"weights": {"a": 0.0}}], "weight 0.0 of 'a'"),
        ([{"weights": {"a": float("nan")}}], "weight nan of 'a'"),
        ([{"weights": {"a": 1.0}, "until_step": 3, "until_tokens": 9}], "both until_step and until_tokens"),
        ([{"weights": {"a": 1.0}, "until_step": 81}, {"weights": {"a": 1.0}}], "ends at step 81, and the training has 80"),
        ([{"weights": {"a": 1.0}, "until_fraction": 1.0}, {"weights": {"a": 1.0}}], "would have no step"),
        ([{"weights": {"a": 1.0}, "until_step": 9}, {"weights": {"a": 1.0}, "until_step": 9}, {"weights": {"a": 1.0}}], "begins and ends at step 9"),
        ([{"weights": {"a": 1.0}}, {"weights": {"a": 1.0}}], "does not say where it ends"),
        ([{"weights": {"a": 1.0}, "until_step": 40}], "the last steps would have nothing to read"),
        ([{"weights": {"a": 1.0}, "until_stp": 40}], "did you mean 'until_step'"),
    ],
)
def test_curricula_that_make_no_sense(phases, said):
    given = {"phases": phases, "steps": 80, "batch_size": 10, "sequence_length": 32}
    with pytest.raises(UserError, match=said):
        from_mapping(Curriculum, given)


def test_each_step_reads_the_sources_of_its_phase_in_their_shares(files):
    reader = CurriculumReader(curriculum(), files, seed=3)
    batches = [reader[step] for step in range(80)]
    assert all(set(np.unique(b.tokens)) <= {100, 101} for b in batches[:60])
    assert all(set(np.unique(b.tokens)) <= {101, 102} for b in batches[60:])
    for span, asked in ((range(60), {100: 0.6, 101: 0.4}), (range(60, 80), {102: 0.25, 101: 0.75})):
        read = np.concatenate([batches[s].tokens[:, 0] for s in span])
        for token, share in asked.items():
            assert abs((read == token).mean() - share) < 2 / len(read) * 2
    for share in shares(reader):
        assert share.dealt == pytest.approx(share.asked, abs=0.01)
        tokens = sum(r.tokens for r, n in zip(reader.mixtures[0 if share.phase == "broad" else 1].readers, reader.names[0 if share.phase == "broad" else 1]) if n == share.source)
        assert share.passes == pytest.approx(share.tokens / tokens)


def test_a_phase_reads_on_where_a_resumed_megatron_run_would(files):
    """The second blend is laid out for the whole training and read from the sample that comes next."""
    reader = CurriculumReader(curriculum(), files, seed=3)
    whole = Mixture([(1.0, files["wiki"][0]), *[(3.0, p) for p in files["code"]]], 800, 32, 3)
    tokens = [m.tokens for m in whole.readers]
    code = sum(tokens[1:])
    whole = Mixture([(1.0, files["wiki"][0]), *[(3.0 * t / code, p) for t, p in zip(tokens[1:], files["code"])]], 800, 32, 3)
    assert np.array_equal(reader[60].tokens, np.stack([whole[i].tokens for i in range(600, 610)]))
    again = CurriculumReader(curriculum(), files, seed=3)
    assert all(np.array_equal(again[s].labels, reader[s].labels) for s in (79, 0, 60))
    with pytest.raises(IndexError):
        reader[80]


def test_sources_without_files_and_ids_beyond_the_model(files):
    with pytest.raises(UserError, match="no files of the source 'webs'(.|\n)*did you mean 'web'"):
        CurriculumReader(Curriculum([Phase({"webs": 1})], 8, 1, 32), files, 1)
    with pytest.raises(UserError, match="holds the token id 101"):
        CurriculumReader(curriculum(), files, 1, vocab_size=101)


def test_pictures_say_what_was_asked_and_dealt(files):
    reader = CurriculumReader(curriculum(), files, seed=3)
    assert "broad/web asked 60.0%, dealt 60.0%" in curriculum_picture(reader).text
    assert "passes over the whole training" in shares_table(reader).text


def test_long_context_mixes_lengths_and_keeps_the_tokens_of_a_step(files):
    phase = LongContext({256: 0.75, 32: 0.25}, tokens=512 * 40 + 100, tokens_per_step=512, weights=GOOD)
    lengths = lengths_of_steps(phase)
    assert len(lengths) == 40 and np.bincount(lengths)[[32, 256]].tolist() == [10, 30]
    reader = LongContextReader(phase, files, 5)
    assert all(reader[s].tokens.shape == (512 // lengths[s], lengths[s]) for s in range(40))
    firsts = [s for s in range(40) if lengths[s] == 32][:2]
    assert not np.array_equal(reader[firsts[0]].tokens, reader[firsts[1]].tokens)
    for given, said in [({"lengths": {300: 1.0}}, "no whole number"), ({"lengths": {}}, "lengths are"), ({"tokens": 5}, "less than one step")]:
        with pytest.raises(UserError, match=said):
            LongContext(**{"lengths": {256: 1.0}, "tokens": 5120, "tokens_per_step": 512, "weights": GOOD} | given)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_published_number_has_its_source(family):
    content = published_curriculum(family)
    numbers = list(published_numbers(content))
    named = (*content["sources"], "calculated")
    assert len(numbers) > 25 and all(source.startswith(named) for _, _, source, _ in numbers)
    main = content["main"]
    assert sum(p["tokens"]["value"] for p in main["phases"]) == main["tokens"]["value"]
    per_step = main["sequence_length"]["value"] * main["batch_size"]["value"]
    assert abs(main["steps"]["value"] * per_step / main["tokens"]["value"] - 1) < 1e-4
    assert main["tokens"]["value"] == 25_000_000_000_000 and "sources" not in published_table(family).text[:60]


def test_supers_shares_add_up_and_become_phases():
    phases = published_phases("super3")
    assert [round(sum(p.weights.values()), 6) for p in phases] == [100, 100]
    assert [len(p.weights) for p in phases] == [16, 14]
    main = published_curriculum("super3")["main"]
    whole = Curriculum(phases, main["steps"]["value"], 3072, 8192)
    assert whole.ends[0] == 794_723
    with pytest.raises(UserError, match="not public"):
        published_phases("nano3")
    with pytest.raises(UserError, match="did you mean 'nano3'"):
        published_curriculum("nano")


@pytest.mark.parametrize("path", sorted((ROOT / "papermill_runs").glob("*/pretrain/blends/*.json")), ids=lambda p: f"{p.parts[-4]}-{p.stem}")
def test_the_published_blends_are_read(path):
    blend = load_blend(path)
    assert all(d.path.startswith("hf://") and d.weight > 0 for d in blend.datasets)
    if path.parts[-4] == "nano3":
        assert {d.weight for d in blend.datasets} == {1.0} and len(blend.datasets) == {"public": 23, "public_tiny": 5}[path.stem]
    assert json.loads(path.read_text()).keys() == {"datasets"}
