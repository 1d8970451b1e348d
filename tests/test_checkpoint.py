"""Checkpoints: resume to the last bit by one process and by two, kills at every file operation, a full disk, what is refused, and the way to Hugging Face form and back."""

import enum
import functools
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_worker import PEFT, SIZES, model_of, optimizer_of, run_two, step, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, NemotronHForCausalLM

from nemotron_nb.core import UserError, file_digest
from nemotron_nb.train import checkpoint
from nemotron_nb.train.checkpoint import Checkpoints, export_hf, import_hf, model_state, optimizer_state
from nemotron_nb.train.lora import load_adapter, save_adapter
from nemotron_nb.train.release import audit
from nemotron_nb.train.model import build_model, tiny_config
from nemotron_nb.train.settings import ModelConfig

HERE = Path(__file__).parent


def run(*command: str) -> None:
    """A Python program in a process of its own; it must end well."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder in which two processes have saved, loaded, exported; beside a checkpoint of one process, which they have read."""
    folder = tmp_path_factory.mktemp("two")
    model = model_of(0)
    optimizer = optimizer_of(model)
    step(model, optimizer, 0, 0)
    Checkpoints(folder / "one").save(1, model, optimizer, {"rank": 0})
    torch.save(whole(model, optimizer), folder / "one" / "whole.pt")
    run_two(folder)
    return folder


@pytest.fixture
def small(tmp_path) -> tuple[Checkpoints, nn.Module, torch.optim.Optimizer]:
    """A small model after one step, saved."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = optimizer_of(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path / "run", made_for={"tokenizer": "a", "template": "b"})
    checkpoints.save(1, model, optimizer, {"place": 3}, score=2.0)
    return checkpoints, model, optimizer


@pytest.mark.long
def test_two_processes_resume_and_exchange(two):
    """Everything in checkpoint_worker.py held; and what two processes wrote in either way, one process reads."""
    assert json.loads((two / "done.json").read_text()) == {"world": 2}
    for how, peft in (("ddp", None), ("fsdp2", None), ("lora", PEFT)):
        model = model_of(5, peft)
        optimizer = optimizer_of(model)
        checkpoints = Checkpoints(two / how)
        extra = checkpoints.load(checkpoints.newest(), model, optimizer)
        expected, found = torch.load(two / how / "whole.pt"), whole(model, optimizer)
        assert extra["rank"] == 0 and found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in found)
    small, full = ((two / name / "step_00000002").iterdir() for name in ("lora", "fsdp2"))
    assert 5 * sum(p.stat().st_size for p in small if p.suffix == ".distcp") < sum(p.stat().st_size for p in full if p.suffix == ".distcp"), "frozen weights are not saved"


@pytest.mark.long
def test_what_two_processes_exported_is_read_by_transformers(two):
    exported = AutoModelForCausalLM.from_pretrained(two / "travel" / "hf", use_mamba_kernels=False, dtype=torch.float32)
    expected = build_model(SIZES, 300, 3).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in exported.state_dict().items())
    AutoModelForCausalLM.from_pretrained(two / "travel" / "merged", use_mamba_kernels=False)


@pytest.mark.long
def test_killed_at_every_file_operation(tmp_path):
    """After each kill the newest checkpoint loads and is one of the two that can be; a disk that is really full is said to be."""
    run(str(HERE / "checkpoint_kills.py"), str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["new"] > 15 and found["same"] > 15 and "File too large" in found["full"]


def test_an_optimizer_that_has_not_moved_stays_so(tmp_path):
    """Saving makes up no state, neither for the one saved nor for the one loaded; parameters without a gradient have none either."""
    model, other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer, other_optimizer = optimizer_of(model), optimizer_of(other)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.load(checkpoints.save(0, model, optimizer), other, other_optimizer)
    assert not optimizer.state and not other_optimizer.state
    model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints.load(checkpoints.save(1, model, optimizer), other, other_optimizer)
    assert set(optimizer_state(other, other_optimizer)) == {f"{k}.0.{p}" for k in ("step", "exp_avg", "exp_avg_sq") for p in ("weight", "bias")}


def test_a_changed_setting_of_the_optimizer_is_said(small, capsys):
    checkpoints, model, _ = small
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5, fused=True)
    checkpoints.load(checkpoints.newest(), model, optimizer)
    assert "weight_decay was 0.1 and is 0.5" in capsys.readouterr().out
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-3, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_kept_are_the_newest_and_the_best(tmp_path, seed):
    """Against the plain definition, over random losses, some not measured."""
    draw, model = random.Random(seed), nn.Linear(1, 1)
    checkpoints, scores = Checkpoints(tmp_path, keep_top_k=2), {}
    for number in range(1, 7):
        scores[number] = draw.choice([None, float("nan"), draw.random(), draw.random()])
        checkpoints.save(number, model, None, score=scores[number])
    measured = {n: s for n, s in scores.items() if s is not None and s == s}
    assert [c.step for c in checkpoints.all()] == sorted({6, *sorted(measured, key=measured.get)[:2]})


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda k: k != "$tensor"), inner), max_leaves=12))
def test_any_json_comes_back(value):
    tensors = {}
    packed = json.loads(json.dumps(checkpoint._packed({"value": value, "tensor": torch.arange(3)}, tensors)))
    assert checkpoint._unpacked(packed, tensors)["value"] == value and list(tensors) == ["0"]


@pytest.mark.parametrize("extra", [{"a": object()}, {"a": {1: 2}}, {"a": [{"$tensor": "0"}]}, {"a": {"b": {1, 2}}}])
def test_what_cannot_be_written_is_named(small, extra):
    checkpoints, model, optimizer = small
    with pytest.raises(UserError, match=r"extra\.extra\.a"):
        checkpoints.save(2, model, optimizer, extra)
    assert checkpoints.newest().step == 1 and not list(checkpoints.folder.glob(".*"))


# -- what is refused, what is passed over ---------------------------------------


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), r"another shape: 1\.bias \(2,\), here \(3,\), 1\.weight"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2)), r"not in the checkpoint: 2\.bias, 2\.weight"),
        (nn.Sequential(nn.Linear(4, 8)), r"not in the model: 1\.bias, 1\.weight"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).bfloat16(), r"another number format: .*torch\.float32, here torch\.bfloat16"),
    ],
)
def test_another_model_is_refused_and_untouched(small, other, said):
    checkpoints, _, _ = small
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(UserError, match=said):
        checkpoints.load(checkpoints.newest(), other, optimizer_of(other))
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_moments_that_are_not_there_are_said(tmp_path, small, capsys):
    _, model, optimizer = small
    saved = Checkpoints(tmp_path / "bare").save(1, model, None)
    Checkpoints(tmp_path / "bare").load(saved, model, optimizer)
    assert "its moments begin anew" in capsys.readouterr().out and not optimizer.state


def test_weights_alone(tmp_path):
    """Another training begins with them: rounded to its number format, with random numbers left alone."""
    model, other = model_of(0), model_of(1).bfloat16()
    saved = Checkpoints(tmp_path).save(1, model, None)
    before = torch.get_rng_state()
    torch.rand(3)
    Checkpoints(tmp_path).load_weights(saved, other)
    assert not torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, model.state_dict()[n].to(t.dtype)) for n, t in other.state_dict().items())
    with pytest.raises(UserError, match="not in the model"):
        Checkpoints(tmp_path).load_weights(saved, nn.Linear(2, 2))


def test_the_same_shapes_with_another_configuration(tmp_path):
    model = model_of(0)
    saved = Checkpoints(tmp_path).save(1, model, None)
    model.config.routed_scaling_factor = 1.0
    with pytest.raises(UserError, match=r"routed_scaling_factor 2\.5, here 1\.0"):
        Checkpoints(tmp_path).load(saved, model, None)


def test_another_tokenizer_or_template(small):
    checkpoints, model, optimizer = small
    for made_for in ({"tokenizer": "x", "template": "b"}, {"tokenizer": "a", "template": "x"}):
        with pytest.raises(UserError, match="another tokenizer or chat template"):
            Checkpoints(checkpoints.folder, made_for=made_for).load(checkpoints.newest(), model, optimizer)
    assert Checkpoints(checkpoints.folder).load(checkpoints.newest(), model, optimizer) == {"place": 3}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rank_00000.safetensors"])
def test_a_changed_bit_is_found_in_every_file(small, name):
    checkpoints, model, optimizer = small
    newest = checkpoints.newest()
    data = bytearray((newest.path / name).read_bytes())
    data[len(data) // 3] ^= 4
    (newest.path / name).write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load(newest, model, optimizer)


def test_newest_passes_over_what_is_not_whole_and_says_so(small, capsys):
    checkpoints, model, optimizer = small
    first = checkpoints.newest().path
    for number, spoil in ((2, lambda p: (p / "complete.json").unlink()), (3, lambda p: (p / ".metadata").unlink()), (4, lambda p: (p / "complete.json").write_text("{")), (5, lambda p: (p / "__0_0.distcp").write_bytes(b""))):
        shutil.copytree(first, folder := first.with_name(f"step_{number:08d}"))
        spoil(folder)
    for pointer in ("step_00000005", "step_00000099", "../run/step_00000001", ""):
        (checkpoints.folder / "latest").write_text(pointer)
        assert checkpoints.newest().path == first
    said = capsys.readouterr().out
    for line in ("step_00000002 is skipped: no complete.json", "step_00000003 is skipped: no .metadata", "step_00000004 is skipped: complete.json cannot be read", "names step_00000005, which is not whole: __0_0.distcp has 0 bytes", "names step_00000099, which is not whole"):
        assert line in said
    assert Checkpoints(checkpoints.folder / "nowhere").newest() is None
    checkpoints.save(6, model, optimizer)
    capsys.readouterr()
    assert checkpoints.newest().step == 6 and capsys.readouterr().out == ""


def test_no_room_is_seen_before_a_byte_is_written(small, monkeypatch):
    checkpoints, model, optimizer = small
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"needs \d+ bytes, 100 are free"):
        checkpoints.save(2, model, optimizer)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["latest", "step_00000001"]


def test_frozen_weights_must_be_those_of_before(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    saved = Checkpoints(tmp_path).save(1, model, None)
    assert set(model_state(model)) == {"1.weight", "1.bias"}
    Checkpoints(tmp_path).load(saved, model, None)
    model[0].weight.data += 1
    with pytest.raises(UserError, match="frozen weights"):
        Checkpoints(tmp_path).load(saved, model, None)


# -- Hugging Face form ----------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder that stands for a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("latent", [None, 16])
def test_the_folder_is_what_transformers_writes_under_the_names_of_the_releases(tmp_path, tokenizer, latent):
    """Oracle: save_pretrained, compared tensor by tensor; and from_pretrained, which must fill every weight. With latent experts too, as Super has them."""
    config = tiny_config(300, SIZES)
    config.moe_latent_size = latent
    model, empty = NemotronHForCausalLM(config), NemotronHForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    assert export_hf(model, tokenizer, tmp_path / "ours", shard_bytes=200_000).ok
    assert audit(tmp_path / "theirs", tmp_path / "ours").ok and len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    names = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "backbone.embeddings.weight" in names and "backbone.layers.1.mixer.experts.3.down_proj.weight" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", use_mamba_kernels=False, dtype=torch.float32)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path / "ours").use_mamba_kernels
    for source in ("ours", "theirs"):
        for p in empty.parameters():
            p.data.fill_(7)
        assert import_hf(empty, tmp_path / source) == {}
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in empty.state_dict().items())


def test_number_format_and_layers_that_predict_further(tmp_path, tokenizer):
    model = build_model(SIZES, 300, 0)
    further = {"mtp.layers.0.norm.weight": torch.rand(64), "mtp.layers.1.mixer.gate.e_score_correction_bias": torch.rand(4)}
    assert export_hf(model, tokenizer, tmp_path / "out", further, dtype=torch.bfloat16).ok
    stored = load_file(tmp_path / "out" / "model.safetensors")
    wide = {n for n, t in stored.items() if t.dtype == torch.float32}
    assert wide == {n for n in stored if n.endswith("e_score_correction_bias")} and len(wide) == 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["mtp_hybrid_override_pattern"], config["dtype"]) == (1, "*E", "bfloat16")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_mamba_kernels=False)
    returned = import_hf(build_model(SIZES, 300, 1), tmp_path / "out")
    assert returned.keys() == further.keys() and torch.equal(returned["mtp.layers.0.norm.weight"], further["mtp.layers.0.norm.weight"].bfloat16())


def test_what_was_written_is_read_again(tmp_path, tokenizer, monkeypatch):
    """A disk that changes a number is found, and no folder is left."""
    save = checkpoint.save_tensors
    monkeypatch.setattr(checkpoint, "save_tensors", lambda tensors, *a, **k: save({n: t + (n == "lm_head.weight") for n, t in tensors.items()}, *a, **k))
    with pytest.raises(UserError, match=r"lm_head\.weight': 1\.0"):
        export_hf(build_model(SIZES, 300, 0), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_family_with_tied_embeddings(tmp_path, tokenizer):
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    assert export_hf(model, tokenizer, tmp_path / "out").ok
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    import_hf(other, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_folders_that_do_not_fit(tmp_path, tokenizer):
    model = build_model(SIZES, 300, 0)
    export_hf(model, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export_hf(model, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        export_hf(model, tmp_path / "nothing", tmp_path / "more")
    with pytest.raises(UserError, match=r"missing: backbone\.layers\.4"):
        import_hf(build_model(SIZES.__class__(**{**vars(SIZES), "pattern": "ME*MM"}), 300, 0), tmp_path / "out")
    with pytest.raises(UserError, match=r"has shape \(300, 64\), the model wants \(299, 64\)"):
        import_hf(build_model(SIZES, 299, 0), tmp_path / "out")
    with pytest.raises(UserError, match="no .safetensors files"):
        import_hf(model, tokenizer)


# -- hostile checkpoints: nothing in a file runs ---------------------------------


class Gadget:
    """Pickles as a call: what it names runs where it is read the usual way."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def forged(checkpoints, **files):
    """Put bytes in the place of files of the newest checkpoint, with sizes and digests that fit, as an attacker would."""
    newest = checkpoints.newest()
    record = json.loads((newest.path / "complete.json").read_text())
    for name, data in files.items():
        (newest.path / name).write_bytes(data)
        record["files"][name] = {"bytes": len(data), "digest": file_digest(newest.path / name)}
    (newest.path / "complete.json").write_text(json.dumps(record))
    return checkpoints.newest()


def own_index(checkpoints):
    """The index as PyTorch writes it."""
    return pickle.loads((checkpoints.newest().path / ".metadata").read_bytes())


def gadgets(mark):
    """Bytes of an index that touch a file, in several languages of pickle."""
    touch = f"touch {mark}"
    protocols = {f"protocol {p}": pickle.dumps({"a": [Gadget(os.system, touch)]}, protocol=p) for p in range(6)}
    line = touch.encode()
    return protocols | {
        "eval": pickle.dumps(Gadget(eval, f"__import__('os').system('{touch}')")),
        "partial": pickle.dumps(Gadget(functools.partial, os.system, touch)),
        "inst": b"(S'" + line + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + line + b"'\no.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c" + bytes([len(line)]) + line + b"\x85R.",
        "torch.load": pickle.dumps(Gadget(torch.load, str(mark), None, None)),
        "import": b"cantigravity\nfly\n.",
        "persistent": b"Pos.system\n.",
        "extension": b"\x82\x01.",
        "state": b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'__init__'\ncos\nsystem\nstb.",
        "deep": b"(" * 10_000 + b"." * 3,
        "nothing": b"",
        "cut": pickle.dumps({"a": 1})[:-2],
        "a number": pickle.dumps(7),
    }


NAMES = sorted(gadgets(Path("/nowhere")))


@pytest.mark.parametrize("form", NAMES)
def test_an_index_runs_nothing(small, tmp_path, form):
    """Each form touches a file where PyTorch's own reader reads it, or ends it; here it is refused in words."""
    checkpoints, model, optimizer = small
    mark, before = tmp_path / "mark", vars(Metadata).copy()
    newest = forged(checkpoints, **{".metadata": gadgets(mark)[form]})
    for load in (lambda: checkpoints.load(newest, model, optimizer), lambda: checkpoints.load_weights(newest, model)):
        with pytest.raises(UserError, match="the index cannot be read"):
            load()
    assert not mark.exists() and vars(Metadata) == before


def test_the_gadgets_are_real(tmp_path):
    """Read the usual way, they run: the test above is about something."""
    for form in ("protocol 0", "protocol 4", "eval", "inst", "obj", "dotted"):
        pickle.loads(gadgets(mark := tmp_path / form.replace(" ", ""))[form])
        assert mark.exists(), form


def changed(index, name):
    """A well-formed index that asks for what no training writes."""
    if name == "bytes":
        index.state_dict_metadata["model.0.weight"] = BytesStorageMetadata()
    place = next(iter(index.storage_data.values()))
    if name == "elsewhere":
        place.relative_path = "../../secret"
    if name == "packed":
        place.transform_descriptors = ["zstd"]
    if name == "negative":
        place.offset = -4
    if name == "huge":
        index.state_dict_metadata["optimizer.exp_avg.0.weight"].size = torch.Size([2**40])
    return index


@pytest.mark.parametrize(("name", "said"), [("bytes", "BytesStorageMetadata"), ("elsewhere", "points to '../../secret'"), ("packed", "packed by a program"), ("negative", "'-4' where a whole number"), ("huge", r"has the shape \(1099511627776,\)")])
def test_an_index_that_asks_for_more_than_tensors(small, name, said):
    checkpoints, model, optimizer = small
    newest = forged(checkpoints, **{".metadata": pickle.dumps(changed(own_index(checkpoints), name))})
    with pytest.raises(UserError, match=said):
        checkpoints.load(newest, model, optimizer)


def test_an_index_is_read_as_pytorch_reads_it(small):
    checkpoints, _, _ = small
    ours, theirs = checkpoint.IndexReader(checkpoints.newest().path).read_metadata(), own_index(checkpoints)
    assert (ours.state_dict_metadata, ours.storage_data, ours.version) == (theirs.state_dict_metadata, theirs.storage_data, theirs.version)


class _ByName(pickle.Pickler):
    """Writes a member of an enumeration as Python 3.11.0 to 3.11.3 do: as what `getattr` gives for its class and its name."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_an_index_of_an_older_python_is_read(small):
    checkpoints, model, optimizer = small
    written = io.BytesIO()
    _ByName(written).dump(own_index(checkpoints))
    assert b"getattr" in written.getvalue() and b"getattr" not in pickle.dumps(own_index(checkpoints)) or sys.version_info < (3, 11, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    newest = forged(checkpoints, **{".metadata": written.getvalue()})
    checkpoints.load(newest, model, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_getattr_of_an_index_gets_nothing(small, tmp_path):
    """The word is known, since older Pythons write it; what it names is not fetched, let alone called."""
    checkpoints, model, optimizer = small
    attack = b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__init_subclass__'\ntR(tR."
    newest = forged(checkpoints, **{".metadata": attack})
    with pytest.raises(UserError, match="the index cannot be read"):
        checkpoints.load(newest, model, optimizer)


def test_tensors_that_are_a_pickle_run_nothing(small, tmp_path):
    """The pieces themselves, with an index whose places fit."""
    checkpoints, model, optimizer = small
    buffer = io.BytesIO()
    torch.save(Gadget(os.system, f"touch {tmp_path / 'mark'}"), buffer)
    index = own_index(checkpoints)
    for place in index.storage_data.values():
        place.offset, place.length = 0, len(buffer.getvalue())
    newest = forged(checkpoints, **{".metadata": pickle.dumps(index), "__0_0.distcp": buffer.getvalue()})
    with pytest.raises(UserError, match="tensors cannot be read"):
        checkpoints.load(newest, model, optimizer)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_other_pickled_weights_run_nothing(tmp_path, tokenizer, file):
    """Weights in the form of former times: of a model, and of an adapter."""
    model, folder = build_model(SIZES, 300, 0), tmp_path / "out"
    export_hf(model, tokenizer, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Gadget(os.system, f"touch {tmp_path / 'mark'}")}, folder / file)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM"}')
    with pytest.raises(UserError, match="cannot be read"):
        build_model(ModelConfig(name=str(folder)), 300) if file.startswith("pytorch") else load_adapter(model, folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b"\xff" * 8 + b[8:], lambda b: b"", lambda b: b[:8] + b"x" + b[9:], lambda b: b[: len(b) // 2]])
def test_damaged_safetensors_are_said_in_words(small, tmp_path, tokenizer, spoil):
    checkpoints, model, optimizer = small
    folder, file = tmp_path / "out", "rank_00000.safetensors"
    big = build_model(SIZES, 300, 0)
    export_hf(big, tokenizer, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    for read in (lambda: build_model(ModelConfig(name=str(folder)), 300), lambda: import_hf(big, folder)):
        with pytest.raises(UserError, match="cannot be read|is damaged"):
            read()
    newest = forged(checkpoints, **{file: spoil((checkpoints.newest().path / file).read_bytes())})
    with pytest.raises(UserError, match=r"(?s)rank_00000.*is damaged"):
        checkpoints.load(newest, model, optimizer)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_rights_that_the_umask_says(small, tmp_path, tokenizer, mask):
    """Of a checkpoint, a model and an adapter alike: a colleague may read them."""
    _, net, optimizer = small
    before = os.umask(mask)
    try:
        Checkpoints(tmp_path / "other").save(1, net, optimizer)
        export_hf(build_model(SIZES, 300, 0), tokenizer, tmp_path / "out")
        save_adapter(model_of(0, PEFT), tmp_path / "adapter")
    finally:
        os.umask(before)
    files = [p for name in ("other", "out", "adapter") for p in (tmp_path / name).rglob("*") if p.is_file() and p.name != "tokenizer.json"]
    assert len(files) > 8 and {p.name: oct(p.stat().st_mode & 0o777) for p in files} == {p.name: oct(0o666 & ~mask) for p in files}
