"""Is every value where it should be, from where it says it is?"""

import dataclasses

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemotron_nb.core import UserError, check_yaml, nearest, write_json
from nemotron_nb.ops import config as config_module
from nemotron_nb.ops.artifacts import Source, Store
from nemotron_nb.ops.spellings import ELSEWHERE
from nemotron_nb.ops.config import (
    PREPARED,
    BUILT_IN,
    COMMAND_LINE,
    FAMILIES,
    SftConfig,
    changed_names,
    config_file,
    file_layers,
    data_prep_config,
    derived,
    flatten,
    known_names,
    merge,
    nest,
    read_override,
    read_yaml,
    sft_config,
    to_yaml,
    typed_layers,
)
from nemotron_nb.ops.profiles import project_root
from nemotron_nb.stages.evaluate import eval_config

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


@pytest.mark.parametrize("typed, meant", [("null", "null"), ("'null'", "null"), ('"{% for m in messages %}"', "{% for m in messages %}"), ("'it''s'", "it's"), ("'", "'"), ('"a" or "b', '"a" or "b'), ("007", "007")])
def test_quotes_around_a_text_are_those_of_yaml(typed, meant):
    assert read_override(f"a.b={typed}", str) == {"a.b": meant}


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
    assert sft.settings.data == data_prep_config(family, name).settings.data


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
    assert data_prep_config("nano3", "tiny", [spelling.removeprefix("data.")]).settings.data.tokenizer.model == "tekken"


def test_nothing_is_marked_as_changed_in_the_recipe_itself():
    assert changed_names(sft_config("nano3").origins) == set()
    assert changed_names(sft_config("nano3", "default", ["optimizer.lr=1"]).origins) == {"optimizer.lr"}


def test_every_setting_has_an_origin_and_a_row():
    effective = sft_config("nano3", "tiny")
    bridge = {f"megatron.{name}" for name in effective.settings.megatron}
    assert set(effective.origins) == (set(known_names(type(effective.settings))) - {"megatron"}) | bridge
    assert [row["setting"].removesuffix(" (megatron)") for row in effective.rows()] == [name.removeprefix("megatron.") for name in effective.values]


def test_a_config_of_an_earlier_run_repeats_it(tmp_path):
    first = sft_config("nano3", "tiny", ["train.train_iters=7", "data.seed=3"])
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    again = sft_config("nano3", str(tmp_path / "config.yaml")).settings
    # What tiny.yaml says to the other engine did nothing in this run, and is not in its file.
    assert dataclasses.replace(again, megatron={}) == dataclasses.replace(first.settings, megatron={}) and again.training("", "") == first.settings.training("", "")
    assert OmegaConf.load(tmp_path / "config.yaml").train.train_iters == 7


@pytest.mark.parametrize("overrides", [["peft=lora", "model.context_parallel_size=2", "ddp.overlap_grad_reduce=false"], ["train.engine=torch"], []])
def test_a_config_of_the_published_recipe_repeats_it_too(tmp_path, overrides):
    """Names of Megatron-Bridge survive the way through the file, and those that did nothing do not become a complaint."""
    first = sft_config("super3", "default", ["data.path=x.jsonl", *overrides])
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    again = sft_config("super3", str(tmp_path / "config.yaml"))
    assert again.settings == first.settings and to_yaml(again) == to_yaml(first)


def test_names_and_paths_of_configurations(tmp_path, monkeypatch):
    assert config_file("nano3", "sft", "tiny") == project_root() / "papermill_runs/nano3/sft/tiny.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("train:\n  train_iters: 3\n")
    assert sft_config("nano3", "tiny.yaml").settings.train.train_iters == 3
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        config_file("nano3", "sft", "tinny")
    with pytest.raises(UserError, match="nano3"):
        sft_config("nano4")


ORDER = ("default.yaml", "-c", "profile", "command line")


@settings(deadline=None, max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # an example is small, and making it smaller would take minutes
@given(st.dictionaries(st.sampled_from(ORDER[1:]), st.dictionaries(st.sampled_from(["run.nodes", "train.seed", "optimizer.lr"]), st.integers(1, 9), min_size=1)))
def test_recipe_then_file_then_profile_then_command_line(tmp_path_factory, said):
    """Of the real layers, the last one that mentions a setting decides it, and its origin names that layer."""
    recipe = {"run.nodes": 2, "train.seed": 1234, "optimizer.lr": 1e-5}
    path = tmp_path_factory.mktemp("layers") / "mine.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(nest(said.get("-c", {"train.train_iters": 5})))))
    profile = ("env.toml [cluster]", said["profile"]) if "profile" in said else None
    effective = sft_config("nano3", str(path), [f"{n}={v}" for n, v in said.get("command line", {}).items()], profile)
    for name, published in recipe.items():
        last = [place for place in ORDER[1:] if name in said.get(place, {})]
        value = said[last[-1]][name] if last else published
        origin = {"-c": str(path), "profile": "env.toml [cluster]", "command line": COMMAND_LINE}[last[-1]] if last else "papermill_runs/nano3/sft/default.yaml"
        assert (effective.values[name], effective.origins[name]) == (value, origin)


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("logger.log_interval=5", "train.log_interval", 5),
        ("logger.wandb.name=sft-dev-1-gpu", "logger.wandb_exp_name", "sft-dev-1-gpu"),
        ("logger.wandb_project=p", "logger.wandb_project", "p"),
        ("cluster.gpus_per_node=1", "run.nproc_per_node", 1),
        ("cluster.num_nodes=3", "run.nodes", 3),
        ("peft=lora", "peft.enabled", True),
        ("recipe.peft=null", "peft.enabled", False),
        ("policy.dtensor_cfg.lora_cfg.dim=4", "peft.dim", 4),
        ("policy.dtensor_cfg.lora_cfg.enabled=true", "peft.enabled", True),
        ("policy.megatron_cfg.peft.lora_A_init_method=uniform", "peft.lora_A_init", "uniform"),
        ("policy.megatron_cfg.enabled=true", "train.engine", "megatron"),
        ("policy.dtensor_cfg.enabled=true", "train.engine", "torch"),
        ("tokenizer.chat_template=nano3", "data.chat_template", "nano3"),
        ("run.env.container_image=x", "run.env.container", "x"),
        ("checkpoint.load=/a", "checkpoint.load", "/a"),
        ("model.context_parallel_size=2", "megatron.model.context_parallel_size", 2),
        ("megatron.model.context_parallel_size=2", "megatron.model.context_parallel_size", 2),
        ("recipe.packed_sequence=true", "megatron.recipe.packed_sequence", True),
        ("+train.seed=3", "train.seed", 3),
    ],
)
def test_each_published_spelling_is_understood(typed, name, value):
    effective = sft_config("nano3", "default", [typed])
    assert effective.values[name] == value and effective.origins[name] == COMMAND_LINE


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("model.tensor_model_paralel_size=4", "did you mean 'model.tensor_model_parallel_size'"),
        ("train.train_itres=4", "did you mean 'train.train_iters'"),
        ("ddp.overlap_grad_reduc=true", "did you mean 'ddp.overlap_grad_reduce'"),
        ("megatron.model.no_such=1", "no setting of that name"),
        ("model=3", "unknown setting 'model'"),
        ("peft=dora", "known: lora, none, null"),
        ("run.nodes=0", "not positive"),
    ],
)
def test_what_neither_engine_knows_is_refused_with_the_nearest_of_both(typed, said):
    with pytest.raises(UserError, match=said):
        sft_config("super3", "default", [typed])


def test_settings_of_the_other_engine(tmp_path):
    """Typed, in a file or in a profile they are refused; those of the recipe are shown and not handed on."""
    name = "model.tensor_model_parallel_size"
    (tmp_path / "mine.yaml").write_text("train: {engine: torch}\nmodel: {tensor_model_parallel_size: 2}\n")
    for ask in (lambda: sft_config("nano3", "tiny", [f"{name}=2"]), lambda: sft_config("nano3", str(tmp_path / "mine.yaml")), lambda: sft_config("nano3", "tiny", [], ("env.toml", {name: 2}))):
        with pytest.raises(UserError, match="is a setting of Megatron-Bridge.*train.engine=torch"):
            ask()
    tiny = sft_config("nano3", "tiny")
    assert f"{name} (megatron)" in tiny.picture().text and tiny.settings.training("", "").megatron == {}
    assert f"{name} (megatron)" not in sft_config("nano3").picture().text
    assert sft_config("nano3").settings.training("", "").megatron[name] == 1


def test_lora_brings_the_familys_file_along():
    """Its numbers lie above the recipe and below everything else."""
    whole, lora = sft_config("super3"), sft_config("super3", "default", ["peft=lora"])
    assert (whole.settings.optimizer.lr, lora.settings.optimizer.lr) == (1e-5, 1e-4) and lora.settings.peft.enabled
    assert set(lora.settings.peft.target_modules) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj"}
    assert sft_config("super3", "lora").settings == lora.settings
    assert sft_config("super3", "default", ["optimizer.lr=3e-4", "peft=lora"]).settings.optimizer.lr == 3e-4
    assert sft_config("super3", "tiny", ["peft=lora"]).settings.optimizer.lr == 4e-3
    assert not sft_config("super3", "default", ["peft=lora", "peft=null"]).settings.peft.enabled
    assert sft_config("super3", "default", ["peft=lora", "peft=null"]).settings.optimizer.lr == 1e-5


def test_the_published_numbers_of_super():
    s = sft_config("super3").settings
    assert (s.model.mtp_num_layers, s.model.mtp_loss_scaling_factor, s.train.global_batch_size, s.scheduler.lr_warmup_samples) == (2, 0.3, 64, 30000)
    assert (s.run.ranks, s.run.env.container) == (32, "nvcr.io/nvidia/nemo:26.02.nemotron_3_super")
    assert [s.megatron[f"model.{n}"] for n in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel")] == [1, 1, 8, 1, True]
    assert sft_config("nano3").settings.run.env.container == "nvcr.io/nvidian/nemo:25.11-nano-v3.rc2"
    assert data_prep_config("nano3").settings.run.env.container == "anyscale/ray:2.49.2-py311"


def test_a_tiny_run_needs_no_cluster():
    for family in FAMILIES:
        s = sft_config(family, "tiny").settings
        assert (s.train.engine, s.run.ranks, s.run.env.container, s.checkpoint.save_interval) == ("torch", 1, "", 0)


@pytest.fixture
def store(tmp_path):
    """A register with prepared data (not real, but with the fields) in two versions, and a model."""
    register = Store(tmp_path / "artifacts")
    for version in (1, 2):
        (tmp_path / f"data{version}").mkdir()
        write_json(tmp_path / f"data{version}" / "manifest.json", {"version": version})
        register.log("SFTDataArtifact-sft", "data", tmp_path / f"data{version}", {"pack_size": 512 * version})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    register.log("ModelArtifact-pretrain", "model", tmp_path / "base")
    return tmp_path


def test_artifacts_take_the_place_of_what_they_stand_for(store):
    asked = [f"run.artifacts={store}/artifacts", "run.data=SFTDataArtifact-sft", "run.model=art://ModelArtifact-pretrain:latest"]
    effective = sft_config("super3", "default", asked)
    s = effective.settings
    assert (s.run.data, s.run.model) == ("SFTDataArtifact-sft:v2", "ModelArtifact-pretrain:v1"), "latest must be pinned"
    assert (s.data.output_dir, s.data.pack_size, s.checkpoint.pretrained_checkpoint) == (str(store / "data2"), 1024, str(store / "base"))
    assert effective.origins["data.pack_size"] == COMMAND_LINE
    assert sft_config("super3", "default", [*asked, "run.data=SFTDataArtifact-sft:v1"]).settings.data.pack_size == 512
    assert sft_config("super3", "default", [*asked, "checkpoint.pretrained_checkpoint=/mine"]).settings.checkpoint.pretrained_checkpoint == "/mine"


def test_resolvers_in_a_file(store, monkeypatch):
    monkeypatch.setenv("WHERE", "here")
    (store / "mine.yaml").write_text(
        "run: {artifacts: '" + str(store / "artifacts") + "', data: 'SFTDataArtifact-sft:v1', label: '${oc.env:WHERE}', wandb: {project: nemotron}}\n"
        "train: {global_batch_tokens: '${art:data,pack_size}'}\nlogger: {wandb_exp_name: '${run.wandb.project}-${train.seed}'}\n"
    )
    effective = sft_config("nano3", str(store / "mine.yaml"), ["train.seed=9"])
    s = effective.settings
    assert (s.train.global_batch_tokens, s.run.label, s.logger.wandb_exp_name, s.logger.wandb_project) == (512, "here", "nemotron-9", "nemotron")
    assert effective.origins["logger.wandb_project"].endswith("default.yaml")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("run.data=SFTDataArtifact-sft:v7", "SFTDataArtifact-sft there are v1, v2, latest"),
        ("run.data=SFTDataArtefact-sft", "did you mean 'SFTDataArtifact-sft'"),
        ("optimizer.lr=${no.such.name}", "cannot be resolved"),
        ("optimizer.lr=${run.output_root}", "expected float"),
        ("run.label=${art:model,path}", "model"),
    ],
)
def test_what_cannot_be_found_is_said(store, typed, said):
    with pytest.raises(UserError, match=said):
        sft_config("super3", "default", [f"run.artifacts={store}/artifacts", typed])


def test_the_derived_numbers():
    text = derived(sft_config("super3").settings, packs=6400).text
    for said in ("262,144", "468.75 steps", "30,000 samples", "100", "32 data-parallel of 32 ranks"):
        assert said in text, said
    crooked = sft_config("super3", "default", ["run.nodes=1", "model.tensor_model_parallel_size=3"]).settings
    assert "8 ranks cannot be divided" in derived(crooked).text


def test_context_parallelism_asks_for_padded_sequences():
    assert sft_config("super3", "default", ["model.context_parallel_size=2"]).settings.data.pad_to_multiple == 4
    assert sft_config("super3", "default", ["model.context_parallel_size=2", "data.pad_to_multiple=8"]).settings.data.pad_to_multiple == 8
    assert sft_config("super3").settings.data.pad_to_multiple == 1


@pytest.mark.parametrize("typed, steps, samples", [([], 0, 30_000), (["scheduler.lr_warmup_iters=10"], 10, 0), (["scheduler.lr_warmup_iters=10", "scheduler.lr_warmup_samples=64"], 0, 64), (["scheduler.lr_warmup_iters=0"], 0, 30_000)])
def test_of_two_ways_to_say_a_warm_up_the_later_one_counts(typed, steps, samples):
    effective = sft_config("super3", "default", typed)
    assert (effective.settings.scheduler.lr_warmup_iters, effective.settings.scheduler.lr_warmup_samples) == (steps, samples)
    assert effective.origins["scheduler.lr_warmup_samples"] == ("command line" if steps or len(typed) == 2 else "papermill_runs/super3/sft/default.yaml")


def test_a_data_section_of_nemo_rl_leads_to_a_file(tmp_path):
    with pytest.raises(UserError, match="data.blend_path=FILE.yaml"):
        sft_config("nano3", "tiny", ["data.train.data_path=chats.jsonl"])
    chats = tmp_path / "my chats.jsonl"
    chats.write_text('{"q": "2 + 2?", "a": "4"}\n')
    (tmp_path / "sft.yaml").write_text(f"data: {{train: {{data_path: {chats}, input_key: q, output_key: a}}}}")
    (dataset,) = sft_config("nano3", "tiny", [f"data.blend_path={tmp_path / 'sft.yaml'}"]).settings.data.blend.datasets
    assert dataset.name.endswith("my_chats")
    assert (dataset.path, dataset.format, dataset.options) == (str(chats), "ResponseDataset", {"input_key": "q", "output_key": "a"})


@pytest.mark.parametrize("typed, dim, position", [
    (["policy.megatron_cfg.peft.enabled=true"], 32, "pre"), (["policy.dtensor_cfg.lora_cfg.enabled=true"], 8, "post"), (["peft.enabled=true"], 8, "post"),
    (["policy.megatron_cfg.peft.dim=4", "policy.megatron_cfg.peft.enabled=true"], 4, "pre"), (["policy.megatron_cfg.peft.enabled=true", "peft.dropout_position=post"], 32, "post"),
])  # fmt: skip
def test_lora_of_either_backend_has_the_defaults_of_its_section(typed, dim, position):
    peft = sft_config("super3", "default", [*typed, "model.mtp_num_layers=0"]).settings.peft
    assert (peft.enabled, peft.dim, peft.dropout_position) == (True, dim, position)


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("learning_rate=1e-3", "optimizer.lr"), ("training_args.learning_rate=1e-3", "optimizer.lr"), ("learning_rat=1e-3", "optimizer.lr"), ("num_epochs=3", "train.epochs"), ("peft.type=lora", "peft.enabled"), ("peft_type=lora", "peft.enabled"),
        ("num_train_epochs=3", "train."), ("batch_size=8", "train.global_batch_size"), ("per_device_train_batch_size=1", "train.micro_batch_tokens"),
        ("gradient_accumulation_steps=4", "train.global_batch_size"), ("max_seq_length=4096", "data.pack_size"), ("cutoff_len=4096", "data.pack_size"),
        ("warmup_ratio=0.1", "scheduler.lr_warmup_iters"), ("warmup_steps=9", "scheduler.lr_warmup_iters"), ("output_dir=out", "run.output_root"), ("seed=1", "train.seed"),
        ("weight_decay=0", "optimizer.weight_decay"), ("lora_r=8", "peft.dim"), ("policy.train_global_batch_size=8", "train.global_batch_size"), ("zzzz=1", ""),
    ],
)  # fmt: skip
def test_an_unknown_name_leads_to_at_most_three(typed, first):
    """Names of other trainers come first, and no error is a list of eight hundred."""
    with pytest.raises(UserError) as e:
        sft_config("nano3", "default", [typed])
    assert f"did you mean '{first}" in e.value.fix and e.value.fix.count("'") <= 6 and len(str(e.value)) < 500


def test_every_name_from_elsewhere_leads_to_a_setting_of_some_command():
    from nemotron_nb.stages.evaluate import EvalConfig
    from nemotron_nb.stages.budget import BudgetConfig

    known = {name for cls in (SftConfig, EvalConfig, BudgetConfig) for name in known_names(cls)}
    lost = [name for name, row in ELSEWHERE.items() if not set(row.names) & known]
    assert lost == []


def test_a_name_far_from_all_of_a_long_list_is_met_with_three():
    assert len(nearest("zzz", [f"model.setting_{i}" for i in range(700)])) < 120


def test_other_commands_lead_on_too():
    with pytest.raises(UserError, match="'optimizer.lr', a setting of 'pretrain' and 'sft'"):
        data_prep_config("nano3", "tiny", ["learning_rate=1"])
    with pytest.raises(UserError, match="did you mean 'generation.max_new_tokens'"):
        eval_config("nano3", "tiny", ["max_tokens=1"])


@pytest.mark.parametrize("typed", ["learning_rate", "num_epochs", "batch_size", "max_seq_length", "warmup_ratio", "optimizer.lrr", "train.train_itres"])
def test_a_setting_that_is_plainly_meant_is_named_without_loading_other_commands(typed, monkeypatch):
    monkeypatch.setattr(config_module, "_commands_with", lambda name: pytest.fail(f"other commands are asked for {name}"))
    with pytest.raises(UserError, match="did you mean"):
        sft_config("nano3", "tiny", [f"{typed}=1"])


def test_several_configurations_are_layers_in_their_order(tmp_path):
    for name, text in {"a": "train: {seed: 1, train_iters: 11}", "b": "train: {seed: 2}", "c": "defaults: tiny\ntrain: {seed: 3}", "d": "defaults: [a.yaml, ./c.yaml]\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    a, b, c, d = (str(tmp_path / f"{name}.yaml") for name in "abcd")
    for config, seed, iters, hidden in ((["tiny", a, b], 2, 11, 96), (["tiny", b, a], 1, 11, 96), ([c], 3, 260, 96), ([d], 3, 260, 96), (["tiny", a, c], 3, 11, 96), ([a], 1, 11, 128)):
        s = sft_config("nano3", config).settings
        assert (s.train.seed, s.train.train_iters, s.model.hidden_size) == (seed, iters, hidden), config
    assert sft_config("nano3", [c]).settings.data.path == "sample"
    assert data_prep_config("nano3", ["tiny", "default"]).settings.data.path == "sample"


@pytest.mark.parametrize("text, said", [("defaults: b.yaml", "in a circle"), ("defaults: a.yaml", "in a circle"), ("defaults: 3", "is no configuration"), ("defaults: tinny", "did you mean 'tiny'"), ("defaults: none.yaml", "no such file")])
def test_what_a_file_cannot_be_built_upon(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("defaults: [./a.yaml]")
    with pytest.raises(UserError, match=said):
        file_layers("nano3", [("sft", "")], str(tmp_path / "a.yaml"))


def test_a_missing_file_is_refused_with_one_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {seed: 1}")
    with pytest.raises(UserError, match="there is no such file(.|\n)*mine.yaml"):
        sft_config("nano3", str(tmp_path / "mime.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        sft_config("nano3", str(tmp_path) + "/")


HOSTILE = ["[x].jsonl", "{a,b}.jsonl", "%41.jsonl", "#c.jsonl", " lead.jsonl", "trail.jsonl ", "*.jsonl", "&a", "!x", "@x", "`x`", "a: b", "a #b", "null", "true", "1e-3", "07", "- x", '"q".jsonl', "'", "\\n", "a=b", "2024-01-01", "~x", "é"]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_text_is_taken_as_it_is_typed_and_comes_back_from_the_file(tmp_path, path):
    effective = sft_config("nano3", "tiny", [f"data.path={path}", f"run.label={path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(effective), encoding="utf-8")
    again = sft_config("nano3", str(tmp_path / "config.yaml"))
    for e in (effective, again):
        assert (e.settings.data.path, e.settings.run.label) == (path, path)
    assert data_prep_config("nano3", "tiny", [f"path={path}"]).settings.data.path == path


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(lambda t: "${" not in t))
def test_any_text_survives_the_file(tmp_path_factory, text):
    effective = merge(EnvLike, typed_layers([f"name={text}"], EnvLike))
    assert effective.settings.name == text
    path = tmp_path_factory.mktemp("text") / "config.yaml"
    path.write_text(to_yaml(effective), encoding="utf-8")
    assert read_yaml(path) == {"name": text}


@dataclasses.dataclass(frozen=True)
class EnvLike:
    name: str = ""


def test_lists_and_nothing_are_still_what_they_look_like():
    s = sft_config("nano3", "tiny", ["peft.target_modules=[q_proj, v_proj]", "data.used_in_filter=null", "data.sample=null"]).settings
    assert (s.peft.target_modules, s.data.used_in_filter, s.data.sample) == (("q_proj", "v_proj"), None, None)


def test_a_variable_of_the_environment_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cr3t")
    effective = sft_config("nano3", "tiny", ["run.label=${oc.env:A_KEY}", "logger.wandb_exp_name=run-${run.label}", "run.env.mounts=['${oc.env:A_KEY}:/x']", "model.name=${oc.env:A_KEY}"])
    s = effective.settings
    assert (s.run.label, s.logger.wandb_exp_name, s.run.env.mounts, s.model.name) == ("s3cr3t", "run-s3cr3t", ["s3cr3t:/x"], "s3cr3t")
    written = to_yaml(effective)
    training = effective.as_written(dataclasses.asdict(s.training("d", "o")))
    for text in (written, repr(effective), effective._repr_html_(), effective.picture(False).text, str(effective.values), str(training)):
        assert "s3cr3t" not in text
    assert training["model"]["name"] == "${oc.env:A_KEY}"
    (tmp_path / "config.yaml").write_text(written)
    again = sft_config("nano3", str(tmp_path / "config.yaml"))
    assert again.settings.run == s.run and to_yaml(again) == written


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("text", [BOMB, "a: " + "[" * 5000, "a: &a [*a]", "a: &a {b: *a}", "{a: " * 3000, "# " + "x" * (5 << 20)])
def test_yaml_that_would_never_end_is_a_sentence(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="mine.yaml: .*YAML"):
        read_yaml(tmp_path / "mine.yaml")


def test_nesting_on_the_command_line_is_a_sentence():
    with pytest.raises(UserError):
        sft_config("nano3", "tiny", ["loss.stages=" + "[" * 3000])
    check_yaml(to_yaml(sft_config("super3")), "config.yaml")


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    s = sft_config("nano3", "tiny", ["data.path=~/c.jsonl", "run.output_root=~", "checkpoint.load=~/ck", "run.label=~/x"]).settings
    assert (s.data.path, s.run.output_root, s.checkpoint.load, s.run.label) == ("/home/me/c.jsonl", "/home/me", "/home/me/ck", "~/x")


def test_a_stage_that_is_never_reached_is_told():
    assert any("sample stage" in note for note in sft_config("super3", "default", ["train.train_iters=100"]).notes)
    assert any("warm-up of 469" in note for note in sft_config("super3", "default", ["train.train_iters=100"]).notes)
    assert sft_config("super3").notes == () and sft_config("nano3", "tiny").notes == ()
    assert sft_config("nano3", "tiny", ["train.epochs=2"]).notes == ()  # the length is not known before the data is


def test_sizes_of_the_tiny_model_do_not_stand_beside_another_one():
    effective = sft_config("nano3", "tiny", ["model.name=/some/model"])
    model = effective.settings.model
    assert (model.hidden_size, model.pattern) == (type(model)().hidden_size, type(model)().pattern) and "hidden_size" in effective.notes[0]
    assert sft_config("nano3", "tiny", ["model.name=/some/model", "model.hidden_size=64"]).settings.model.hidden_size == 64


def test_the_newest_prepared_data_is_taken_where_none_is_named(tmp_path):
    register = Store(tmp_path / "artifacts")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    base = sft_config("nano3").settings.data.tokenizer.model
    register.log("DataBlendsArtifact-sft", "data", tmp_path / "data", {"pack_size": 512}, [Source(base, "tokenizer", base)])
    here = [f"run.artifacts={tmp_path}/artifacts"]
    taken = sft_config("nano3", "default", here)
    assert taken.settings.run.data == "DataBlendsArtifact-sft:v1" and taken.settings.data.pack_size == 512
    assert "DataBlendsArtifact-sft:v1" in taken.notes[0] and "newest" in taken.origins["run.data"]
    assert sft_config("nano3", "default", [*here, "data.path=x.jsonl"]).settings.run.data == ""
    assert sft_config("nano3", "tiny", here).settings.run.data == "" and sft_config("super3", "default", here).settings.run.data == ""
    other = sft_config("nano3", "default", [*here, "data.tokenizer=tekken"])
    assert other.settings.run.data == "" and "--art.data DataBlendsArtifact-sft:v1" in other.notes[0]


def test_data_that_was_prepared_wins_over_the_chats_of_a_committed_configuration(tmp_path):
    """`data prep sft -c tiny`, then `sft -c tiny`: what somebody prepared is later than what tiny names, and earlier than what is typed or stands in a file of one's own."""
    register = Store(tmp_path / "artifacts")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    made = register.log("DataBlendsArtifact-sft", "data", tmp_path / "data", {"pack_size": 512}, [Source("tiny", "tokenizer")])
    here = [f"run.artifacts={tmp_path}/artifacts"]
    assert sft_config("nano3", "tiny", here).settings.run.data == "", "data of a run alone is not taken"
    register.tag(made.address, PREPARED)
    taken = sft_config("nano3", "tiny", here)
    assert (taken.settings.run.data, taken.settings.data.path) == ("DataBlendsArtifact-sft:v1", "")
    assert "DataBlendsArtifact-sft:v1" in taken.notes[0] and "data.path=sample" in taken.notes[0]
    (tmp_path / "mine.yaml").write_text("data: {path: mine.jsonl}\n")
    for words in (("tiny", [*here, "data.path=sample"]), (["tiny", str(tmp_path / "mine.yaml")], here)):
        assert sft_config("nano3", *words).settings.run.data == ""
    sampled = sft_config("nano3", "tiny", [*here, "data.sample=7"])
    assert sampled.settings.run.data == "" and "data.sample is given" in sampled.notes[0] and "--art.data DataBlendsArtifact-sft:v1" in sampled.notes[0]
    (tmp_path / "data" / "manifest.json").unlink()
    (tmp_path / "data").rmdir()
    gone = sft_config("nano3", "tiny", here)
    assert gone.settings.run.data == "" and gone.settings.data.path == "sample", "a folder that was removed is not missed"


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("eval", "data.path=x", "'pretrain', 'data prep sft', 'sft', 'data prep rl' and 'rl'"),
        ("eval", "model.name=x", "it belongs to 'pretrain' and 'sft'"),
        ("eval", "data.output_dir=x", "did you mean 'run.output_root' or 'data.dir'?"),  # this command has one that is meant
        ("data prep", "optimizer.lr=1", "'optimizer.lr' is no setting of this command"),
        ("data prep", "train.train_iters=1", "it belongs to 'pretrain' and 'sft'"),
        ("sft", "data.questions=x", "it belongs to 'eval'"),
        ("sft", "path=x", "did you mean 'data.path'?"),
        ("eval", "learning_rate=1", "learning_rate is 'optimizer.lr', a setting of 'pretrain' and 'sft'"),
    ],
)
def test_a_setting_of_another_command_is_told_with_that_command(command, given, said):
    """It is not misspelt, so no near name is offered."""
    read = {"sft": sft_config, "data prep": data_prep_config, "eval": eval_config}[command]
    with pytest.raises(UserError) as error:
        read("nano3", "default", [given])
    assert said in str(error.value) and ("is nearest" not in str(error.value))


PAGE = "{% for message in messages %}{%- if message['role'] == 'system'  %}{{'Context: ' + message['content'].strip()}}{%- elif message['role'] == 'user'  %}{{' Question: ' + message['content'].strip() + ' Answer: '}}{%- elif message['role'] == 'assistant'  %}{{message['content'].strip()}}{%- endif %}{% endfor %}"


@pytest.mark.parametrize("indent", ["", "  "])
def test_the_custom_template_of_the_page_as_it_stands_there(tmp_path, indent):
    """The page indents it wrongly: the key then stands beside an empty section."""
    (tmp_path / "page.yaml").write_text(f'tokenizer:\n{indent}custom_template: "{PAGE}"\n')
    for ask in (sft_config, data_prep_config):
        assert ask("nano3", str(tmp_path / "page.yaml")).settings.data.chat_template == PAGE


DTENSOR = "policy:\n  dtensor_cfg:\n    lora_cfg: {enabled: False, target_modules: [], exclude_modules: [], match_all_linear: true, dim: 8, alpha: 32, dropout: 0.0, dropout_position: 'post', lora_A_init: 'xavier', use_triton: true}\n"
BRIDGE = "policy:\n  megatron_cfg:\n    peft: {enabled: false, target_modules: [], exclude_modules: [], dim: 32, alpha: 32, dropout: 0.0, dropout_position: 'pre', lora_A_init_method: 'xavier', lora_B_init_method: 'zero', a2a_experimental: false, lora_dtype: None}\n"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block, dim", [(DTENSOR, 8), (BRIDGE, 32)])
def test_the_lora_blocks_of_the_page_as_they_stand_there(tmp_path, family, block, dim):
    (tmp_path / "page.yaml").write_text(block)
    peft = sft_config(family, str(tmp_path / "page.yaml")).settings.peft
    assert (peft.enabled, peft.dim, peft.lora_dtype) == (False, dim, None)
    (tmp_path / "page.yaml").write_text(block.replace("enabled: False", "enabled: True").replace("enabled: false", "enabled: true"))
    if block is BRIDGE:
        assert sft_config(family, str(tmp_path / "page.yaml")).settings.peft.enabled
    else:
        with pytest.raises(UserError, match="peft.use_triton=false"):
            sft_config(family, str(tmp_path / "page.yaml"))
        assert sft_config(family, str(tmp_path / "page.yaml"), ["peft.use_triton=false"]).settings.peft.match_all_linear
