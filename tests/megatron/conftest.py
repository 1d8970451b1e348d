"""Data, a tiny model, and the results of the jobs that need Megatron-Bridge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TINY = {
    "hybrid_override_pattern": "M*MEM", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "routed_scaling_factor": 2.5, "initializer_range": 0.05,
}  # fmt: skip
PACK_SIZE, PACKS = 256, 10
STAGES = {"token": [{"stage": "token"}], "sample": [{"stage": "sample"}], "switch": [{"stage": "token", "steps": 3}, {"stage": "sample"}]}


def model_values(**values):
    """Overrides of the model."""
    return {f"model.{name}": value for name, value in values.items()}


TP, PP = model_values(tensor_model_parallel_size=2, sequence_parallel=True), model_values(pipeline_model_parallel_size=2, hybrid_layer_pattern="M*M|EM")
EP, CP = model_values(expert_model_parallel_size=2), model_values(context_parallel_size=2)
SUPER = {"recipe._target_": "nemotron_3_super"}
MOVING = {"model": {"moe_router_bias_update_rate": 1e-3}}  # the routers' bias follows the load, as in the recipes
PLAIN_OPTIMIZER = {"ddp.use_distributed_optimizer": False, "optimizer.use_distributed_optimizer": False}  # PyTorch's Adam inside the distributed one cannot be resumed in 0.19.2
LOOKED_AT = {"scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 2}, "evaluation": {"num_generations": 2, "max_new_tokens": 4}}
FURTHER = {"model": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.1}}
SMALL = {"pattern": "M*E", "hidden_size": 32, "attention_heads": 2, "mamba_heads": 2, "experts": 4, "expert_size": 16}


def _train(root, name, ranks=1, data="plain", stages="sample", steps=2, folder=None, **options):
    """A job that trains; by default on all packs in each step, so that their order does not matter."""
    places = {"data_dir": f"{root}/{data}", "output_dir": f"{root}/{folder or name}", "model": f"{root}/model"}
    return {"name": name, "do": "train", "ranks": ranks, **places, "stages": STAGES[stages], "steps": steps, "batch": PACKS} | options


def _parallel(root, name, ranks, **options):
    """A job that must give what the job "sample" gives."""
    return _train(root, name, ranks, shared=MOVING, **options)


def _mtp(root, name, ranks=1, megatron=None, **options):
    """A job of one step with two further predictions, by the recipe of Super."""
    return _train(root, name, ranks, steps=1, shared=FURTHER, megatron=SUPER | (megatron or {}), **options) | {"model": f"{root}/model_mtp"}


LENGTH = 64  # tokens of a sample of documents
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_warmup_iters": 2, "min_lr": 1e-5}
PHASES = [{"weights": {"sums": 1.0, "stories": 2.0}, "until_step": 2}, {"weights": {"code": 1.0}}]
LENGTHS = [{"tokens": 64, "share": 1.0}, {"tokens": 16, "share": 1.0}]


def _pretrain(root, name, ranks=1, steps=4, dataset=None, train=None, shared=None, begin="model", **options):
    """A job that pretrains on documents, four samples a step; on from weights, so that two engines begin alike."""
    given = {"checkpoint": {"pretrained_checkpoint": f"{root}/{begin}"}} if begin else {}
    sections = given | {"dataset": {"sequence_length": LENGTH, "valid_samples": 2} | (dataset or {}), "scheduler": WSD, "train": train or {}} | (shared or {})
    return _train(root, name, ranks, data="documents", stages="token", steps=steps, shared=sections, documents=True, **{"batch": 4} | options)


# Jobs of `pytest -m long`, with those that they are compared with.
HEAVY = ("pre_tp_sp", "pre_pp", "pre_ep", "pre_read_on", "pre_lengths_cp", "pre_grown_dp", "pre_mtp", "pre_tiny", "pre_random")
COMPARED = ("pre", "pre_reset", "pre_lengths", "pre_grown")


def pretrainings(root):
    """The jobs on documents."""
    looked = {"evaluation": {"num_generations": 2, "max_new_tokens": 4}}
    part = {"steps": 5, "train": {"eval_interval": 3}, "dataset": {"phases": PHASES}, "shared": looked, "megatron": PLAIN_OPTIMIZER}
    grown = {"train": {"step_batch_size_schedule": "0:2 256:4"}}
    window = MOVING | looked | {"checkpoint": {"pretrained_checkpoint": f"{root}/model", "save_interval": 2, "average_last": 4}}
    exported = lambda step: {"checkpoint": f"{root}/pre_mean/checkpoints/iter_{step:07d}", "model": f"{root}/model", "output_dir": f"{root}/mean_{step}"}
    return [
        _pretrain(root, "pre_still"),
        _pretrain(root, "pre", shared=MOVING),
        _pretrain(root, "pre_dp", 2, shared=MOVING),
        _pretrain(root, "pre_tp_sp", 2, shared=MOVING, megatron=TP),
        _pretrain(root, "pre_pp", 2, shared=MOVING, megatron=PP),
        _pretrain(root, "pre_ep", 2, shared=MOVING, megatron=EP),
        _pretrain(root, "pre_cp", 2, shared=MOVING, megatron=CP),
        _pretrain(root, "pre_reset", dataset={"reset_documents": True}),
        _pretrain(root, "pre_read_on", dataset={"reset_documents": True}, change="read_on"),
        _pretrain(root, "pre_lengths", dataset={"mixed_lengths": LENGTHS}),
        _pretrain(root, "pre_lengths_cp", 2, dataset={"mixed_lengths": LENGTHS}, megatron=CP),
        _pretrain(root, "pre_grown", **grown),
        _pretrain(root, "pre_grown_dp", 2, **grown),
        _pretrain(root, "pre_never_grown", change="never_grow", **grown),
        _pretrain(root, "pre_whole", **part),
        _pretrain(root, "pre_part", **part, folder="pre_resumed", stop_after=2),
        _pretrain(root, "pre_rest", **part, folder="pre_resumed"),
        _pretrain(root, "pre_super", steps=2, shared={"train": {"precision": "bf16"}}, megatron=SUPER),
        _pretrain(root, "pre_mtp", steps=2, shared=FURTHER, megatron=SUPER, begin="model_mtp") | {"model": f"{root}/model_mtp"},
        _pretrain(root, "pre_tiny", 2, steps=2, begin="", model="tiny", shared={"model": SMALL | {"name": "tiny"}}),
        _pretrain(root, "pre_random", steps=2, begin=""),
        _pretrain(root, "pre_mean", 2, steps=5, shared=window, megatron=TP | PLAIN_OPTIMIZER),
        *({"name": f"mean_{step}", "do": "export", "ranks": 1, **exported(step)} for step in (2, 4, 5)),
        _pretrain(root, "pre_mean_on", begin="pre_mean/model_averaged"),
    ]


def jobs(root):
    """All jobs, in order."""
    reader = {"do": "collate", "ranks": 1, "row_length": PACK_SIZE, "multiple": 1, "end_token": "</s>", "fill": True, "data_dir": f"{root}/plain"}
    recipe = {"recipe._target_": "megatron.bridge.recipes.nemotronh.nemotron_3_nano_peft_config", "recipe.peft_scheme": "lora", "peft.dim": 4, "peft.alpha": 8}
    peft = {"peft": {"enabled": True, "target_modules": ["*.o_proj", "*.in_proj"], "dim": 4, "alpha": 8.0, "merge": True}}
    whole = {"stages": "switch", "steps": 5, "batch": 4, "megatron": PLAIN_OPTIMIZER, "shared": LOOKED_AT}
    return [
        {"name": "collate", **reader, "output_dir": f"{root}/reader_1"},
        {"name": "collate_short", **reader, "output_dir": f"{root}/reader_1", "fill": False},
        {"name": "collate_padded", **reader, "data_dir": f"{root}/padded", "output_dir": f"{root}/reader_1", "multiple": 4},
        {"name": "collate_ended", **reader, "data_dir": f"{root}/padded", "output_dir": f"{root}/reader_2", "multiple": 4, "end_token": "<|im_end|>"},
        {"name": "round_trip", "do": "round_trip", "ranks": 1, "model": f"{root}/model", "output_dir": f"{root}/exported"},
        _train(root, "token_still", stages="token"),
        _train(root, "sample_still"),
        {"name": "export", "do": "export", "ranks": 1, "checkpoint": f"{root}/sample_still/checkpoints", "model": f"{root}/model", "output_dir": f"{root}/trained"},
        _train(root, "super_bf16", steps=1, shared={"train": {"precision": "bf16"}}, megatron=SUPER),
        _train(root, "tiny", 2, steps=1, model="tiny", shared={"model": SMALL | {"name": "tiny"}}),
        _train(root, "lora_by_recipe", steps=1, megatron=recipe),
        _train(root, "lora", 2, shared=peft, lr=1e-2, megatron=TP),
        {"name": "names", "do": "names", "ranks": 1, "model": f"{root}/model", "output_dir": f"{root}/names.json"},
        _parallel(root, "sample", 1),
        _parallel(root, "dp", 2),
        _parallel(root, "tp_sp", 2, megatron=TP),
        _parallel(root, "pp", 2, megatron=PP),
        _parallel(root, "ep", 2, megatron=EP),
        _parallel(root, "padded", 1, data="padded"),
        _parallel(root, "cp", 2, data="padded", megatron=CP),
        _parallel(root, "dp_tp_sp", 4, steps=1, megatron=TP),
        _train(root, "whole", **whole),
        _train(root, "part", **whole, folder="resumed", stop_after=2),
        _train(root, "rest", **whole, folder="resumed"),
        _train(root, "leak", steps=1, change="leak_state"),
        _train(root, "counted_twice", 2, data="padded", steps=1, change="count_on_every_rank", megatron=CP),
        _train(root, "aux", steps=1, shared={"model": {"moe_aux_loss_coeff": 0.1}}),
        _train(root, "aux_one", steps=1, change="balance_of_one", shared={"model": {"moe_aux_loss_coeff": 0.1}}),
        _mtp(root, "mtp"),
        _mtp(root, "mtp_dp", 2),
        _mtp(root, "mtp_tp_sp", 2, TP),
        _mtp(root, "mtp_cp", 2, CP, data="padded"),
        _mtp(root, "mtp_token", stages="token"),
        _mtp(root, "mtp_unscaled", data="padded", change="unscaled_depths"),
        _mtp(root, "mtp_unscaled_cp", 2, CP, data="padded", change="unscaled_depths"),
        _mtp(root, "mtp_poisoned", change="poison_labels"),
        _mtp(root, "mtp_stock", change="train_prompts"),
        _mtp(root, "mtp_stock_poisoned", change="train_prompts_poisoned"),
        _mtp(root, "mtp_ended", data="padded", change="end_with_im_end"),
        _mtp(root, "mtp_ended_claimed", data="padded", change="claim_padding"),
        _mtp(root, "mtp_ended_logical", data="padded", change="logical_borders"),
        *pretrainings(root),
    ]


def _write_data(root):
    """Chats of the library as packs, with and without padding."""
    from nemotron_nb.data.prep import PrepConfig, prepare

    shape = {"pack_size": PACK_SIZE, "sample": 60, "overflow": "drop", "train_ratio": 0.8, "valid_ratio": 0.2, "test_ratio": 0.0, "workers": 1, "max_bad_fraction": 1.0}
    for name, multiple in (("plain", 1), ("padded", 4)):
        manifest = prepare(PrepConfig(**shape, pad_to_multiple=multiple, output_dir=f"{root}/{name}"))
        assert manifest["splits"]["train"]["packs"] == PACKS, "the jobs train on all packs in each step"


def _write_documents(root):
    """The little world as documents."""
    from nemotron_nb.pretrain.documents import DocumentsConfig, prepare_documents

    prepare_documents(DocumentsConfig(output_dir=f"{root}/documents", world_megabytes=0.05, workers=1))


def _write_model(root):
    """A tiny hybrid model with random weights, in the layout of the releases; and the same with a block for further predictions."""
    import torch
    from transformers import NemotronHForCausalLM

    from nemotron_nb.train.checkpoint import export_hf
    from nemotron_nb.train.objective import make_mtp, mtp_tensors
    from nemotron_nb.train.model import family_config

    torch.manual_seed(0)
    model = NemotronHForCausalLM(family_config(TINY, vocab_size=4096))
    block = make_mtp(model, seed=1)
    for name, parameter in [*model.named_parameters(), *block.named_parameters()]:
        if "norm" in name or name.endswith(".D"):  # nothing stays at 1, or a norm that is left out would not show
            parameter.data += 0.1 * torch.randn_like(parameter)
    export_hf(model, f"{root}/plain/tokenizer", f"{root}/model")
    export_hf(model, f"{root}/plain/tokenizer", f"{root}/model_mtp", mtp_tensors(block.state_dict()))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder of data, model and results; skipped where Megatron-Bridge is not installed."""
    from nemotron_nb.megatron.versions import installed_version

    if not installed_version("megatron-bridge"):
        pytest.skip("megatron-bridge is not installed in this environment (extra: megatron)")
    folder = tmp_path_factory.mktemp("megatron")
    _write_data(folder)
    _write_documents(folder)
    _write_model(folder)
    return folder


def _wanted(root, marks):
    """The jobs of this call of pytest, in order."""
    chosen = os.environ.get("MEGATRON_JOBS", "").split()  # for a closer look at some of them
    if chosen:
        return [job for job in jobs(root) if job["name"] in chosen]
    if marks == "long":
        return [job for job in jobs(root) if job["name"] in HEAVY + COMPARED]
    return [job for job in jobs(root) if job["name"] not in HEAVY]


@pytest.fixture(scope="session")
def results(root, request):
    """Name of a job -> what it returned. All jobs run once, in a process that imports Megatron once."""
    wanted = _wanted(root, request.config.option.markexpr)
    (root / "jobs.json").write_text(json.dumps(wanted))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, HERE / "zygote.py", root / "jobs.json", root / "results.json"], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return Results(json.loads((root / "results.json").read_text()))


class Results(dict):
    """Results by name; asking for one that failed shows its error."""

    def __missing__(self, name):
        if os.environ.get("MEGATRON_JOBS"):
            pytest.skip(f"the job {name} was not chosen")
        if name in HEAVY:
            pytest.skip(f"the job {name} belongs to pytest -m long")
        raise KeyError(f"no job {name}")

    def __getitem__(self, name):
        found = super().__getitem__(name)
        assert "error" not in found, f"{name}: {found['error']}"
        return found

    def lines(self, name, kind="train"):
        """The metrics of a training."""
        return [line for line in self[name]["metrics"] if line["kind"] == kind]

    def curve(self, name):
        """[(loss, gradient norm)] of each step."""
        return [(line["loss"], line["grad_norm"]) for line in self.lines(name)]
