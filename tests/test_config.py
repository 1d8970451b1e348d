"""Is every value where it should be, from where it says it is?"""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemotron_nb.core import UserError
from nemotron_nb.ops.config import (
    BUILT_IN,
    COMMAND_LINE,
    FAMILIES,
    changed_names,
    config_file,
    data_prep_config,
    flatten,
    known_names,
    merge,
    nest,
    project_root,
    read_override,
    read_yaml,
    sft_config,
    to_yaml,
)

LEAVES = st.sampled_from([0, -1.5, True, None, "", "text", [], [1, 2]])
NAMES = st.sampled_from("abc")
TREES = st.dictionaries(NAMES, LEAVES | st.dictionaries(NAMES, LEAVES | st.dictionaries(NAMES, LEAVES, min_size=1), min_size=1))


@settings(deadline=None)
@given(TREES)
def test_nest_undoes_flatten(tree):
    assert nest(flatten(tree)) == tree


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 1.0
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.95])


@dataclasses.dataclass(frozen=True)
class Outer:
    seed: int = 0
    inner: Inner = Inner()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a.yaml", "b/default.yaml", COMMAND_LINE]), st.sampled_from(["seed", "inner.lr"]), st.integers(0, 9)), max_size=6))
def test_the_last_layer_wins_and_its_origin_is_kept(layers):
    effective = merge(Outer, [(origin, {name: value}) for origin, name, value in layers])
    for name, default in (("seed", 0), ("inner.lr", 1.0)):
        said = [(origin, value) for origin, n, value in layers if n == name]
        origin, value = said[-1] if said else (BUILT_IN, default)
        assert effective.values[name] == value and effective.origins[name] == origin


def test_a_list_replaces_a_list_whole():
    effective = merge(Outer, [("a.yaml", {"inner.betas": [1.0, 2.0, 3.0]}), ("b.yaml", {"inner.betas": [4.0]})])
    assert effective.settings.inner.betas == [4.0]


@pytest.mark.parametrize("origin", ["mine.yaml", COMMAND_LINE])
def test_an_unknown_name_is_refused_with_its_place_and_the_nearest_name(origin):
    with pytest.raises(UserError) as e:
        merge(Outer, [("default.yaml", {"seed": 1}), (origin, {"inner.lrr": 1e-3})])
    assert e.value.where == origin and "did you mean 'inner.lr'" in str(e.value)


def test_a_wrong_type_is_refused_even_if_a_later_layer_would_mend_it():
    with pytest.raises(UserError) as e:
        merge(Outer, [("mine.yaml", {"seed": "x"}), (COMMAND_LINE, {"seed": 1})])
    assert str(e.value).startswith("mine.yaml: seed: expected int")


def test_a_variable_of_the_environment_is_filled_in(monkeypatch):
    monkeypatch.setenv("SEED_OF_THE_DAY", "7")
    assert merge(Outer, [("a.yaml", {"seed": "${oc.decode:${oc.env:SEED_OF_THE_DAY}}"})]).settings.seed == 7
    with pytest.raises(UserError, match="NO_SUCH_VARIABLE"):
        merge(Outer, [("a.yaml", {"seed": "${oc.env:NO_SUCH_VARIABLE}"})])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optimizer.lr=1e-4", {"optimizer.lr": 1e-4}),
        ("data.sample=100", {"data.sample": 100}),
        ("run.label=two words", {"run.label": "two words"}),
        ("data.path=/a/b=c.jsonl", {"data.path": "/a/b=c.jsonl"}),
        ("a.b=[1, 2]", {"a.b": [1, 2]}),
        ("a=true", {"a": True}),
        ("a=null", {"a": None}),
    ],
)
def test_overrides_mean_what_they_look_like(typed, meant):
    assert read_override(typed) == meant


@pytest.mark.parametrize("typed", ["optimizer.lr", "=3", "--lr=3 4", "a=[1"])
def test_what_is_not_an_override_is_refused(typed):
    with pytest.raises(UserError):
        merge(Outer, [(COMMAND_LINE, read_override(typed))])


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: [1\n", "- 1\n- 2\n", "a: \x00\n"])
def test_a_broken_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match="broken.yaml"):
        read_yaml(tmp_path / "broken.yaml")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["default", "tiny"])
def test_the_committed_files_are_understood(family, name):
    sft = sft_config(family, name)
    assert sft.settings.family == family
    assert sft.settings.data == data_prep_config(family, name).settings


@pytest.mark.parametrize("family", FAMILIES)
def test_the_committed_defaults_are_the_recipe(family):
    """The numbers of the published recipe that must not drift."""
    sft = sft_config(family).settings
    assert sft.data.pack_size == 4096
    assert (sft.data.train_ratio, sft.data.valid_ratio, sft.data.test_ratio) == (0.98, 0.01, 0.01)
    assert sft.optimizer.lr == 1e-5
    assert {"nano3": "Nano-30B-A3B", "super3": "Super-120B-A12B"}[family] in sft.model.name
    assert "Nano-9B-v2" not in sft.data.tokenizer.model


@pytest.mark.parametrize("spelling", ["data.tokenizer=tekken", "data.tokenizer_model=tekken", "data.tokenizer.model=tekken"])
def test_the_tokenizer_in_each_of_its_spellings(spelling):
    effective = sft_config("nano3", "tiny", [spelling])
    assert effective.settings.data.tokenizer.model == "tekken" and effective.origins["data.tokenizer.model"] == "command line"
    assert data_prep_config("nano3", "tiny", [spelling.removeprefix("data.")]).settings.tokenizer.model == "tekken"


def test_nothing_is_marked_as_changed_in_the_recipe_itself():
    assert changed_names(sft_config("nano3").origins) == set()
    assert changed_names(sft_config("nano3", "default", ["optimizer.lr=1"]).origins) == {"optimizer.lr"}


def test_every_setting_has_an_origin_and_a_row():
    effective = sft_config("nano3", "tiny")
    assert set(effective.origins) == set(known_names(type(effective.settings)))
    assert [row["setting"] for row in effective.rows()] == list(effective.values)


def test_a_config_of_an_earlier_run_repeats_it(tmp_path):
    first = sft_config("nano3", "tiny", ["train.train_iters=7", "data.seed=3"])
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    assert sft_config("nano3", str(tmp_path / "config.yaml")).settings == first.settings
    assert OmegaConf.load(tmp_path / "config.yaml").train.train_iters == 7


def test_names_and_paths_of_configurations(tmp_path, monkeypatch):
    assert config_file("nano3", "sft", "tiny") == project_root() / "papermill_runs/nano3/sft/tiny.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("train:\n  train_iters: 3\n")
    assert sft_config("nano3", "tiny.yaml").settings.train.train_iters == 3
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        config_file("nano3", "sft", "tinny")
    with pytest.raises(UserError, match="nano3"):
        sft_config("nano4")
