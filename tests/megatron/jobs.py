"""What the processes of tests/megatron do. Each function returns something that JSON can say."""

import logging
import os
import warnings

from nemotron_nb.megatron.cpu import cpu_values, install_standins, on_cpu


def prepare():
    """Import everything once, before processes are forked."""
    warnings.filterwarnings("ignore")
    install_standins()
    import torch

    torch.set_num_threads(1)
    import megatron.bridge.recipes.nemotronh  # noqa: F401
    import megatron.bridge.training.finetune  # noqa: F401
    import nemotron_nb.megatron.engine  # noqa: F401
    import nemotron_nb.megatron.pretrain  # noqa: F401

    logging.disable(logging.WARNING)


def _run(data_dir, output_dir, model, stages, steps, batch, lr, shared, megatron):
    from nemotron_nb.core import from_mapping
    from nemotron_nb.megatron.engine import MegatronConfig
    from nemotron_nb.train.settings import TrainConfig

    settings = {
        "data_dir": data_dir, "output_dir": output_dir, "model": {"name": model}, "train": {"train_iters": steps, "global_batch_size": batch, "log_interval": 1},
        "optimizer": {"lr": lr, "weight_decay": 0.0}, "loss": {"stages": list(stages)}, "evaluation": {"num_generations": 0},
    }  # fmt: skip
    for name, section in (shared or {}).items():
        settings[name] = settings.get(name, {}) | section
    return MegatronConfig.from_values(from_mapping(TrainConfig, settings, "job"), {"cpu_standins": True} | (megatron or {}))


def train(data_dir, output_dir, model, stages=({"stage": "token"},), steps=3, batch=4, lr=1e-3, shared=None, megatron=None, change=None, stop_after=None, documents=False):
    """A training by our engine, on packs or documents; its metrics."""
    import json
    from pathlib import Path

    from nemotron_nb.megatron import engine as megatron_engine, pretrain as megatron_pretrain, recorder as megatron_record

    start = megatron_pretrain.train if documents else megatron_engine.train

    if change:
        globals()[change]()
    if stop_after is not None:
        write = megatron_record.append_line
        megatron_record.append_line = lambda folder, line: (write(folder, line), line.get("step") == stop_after and Path(folder, "STOP").touch())
    start(_run(data_dir, output_dir, model, stages, steps, batch, lr, shared, megatron))
    path = Path(output_dir) / "metrics.jsonl"
    return {"metrics": [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [], "pid": os.getpid()}


def collate(data_dir, output_dir, row_length, multiple, end_token, fill):
    """What the real packed dataset makes of the train split: one batch of the first two packs, one of each other pack."""
    from pathlib import Path

    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
    from nemotron_nb.megatron.data import reading_tokenizer
    from nemotron_nb.megatron.engine import dataset_of

    reader = reading_tokenizer(Path(data_dir) / "tokenizer", Path(output_dir), end_token)
    on_cpu(True).__enter__()
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(reader)))
    config = dataset_of(data_dir, row_length, multiple, 0, "0.6.2")
    config.dataset_kwargs = {"pad_to_max_length": fill}
    config.finalize()
    train = GPTSFTDatasetBuilder(config, tokenizer).build()[0]
    batches = [[train[0], train[1]], *([train[i]] for i in range(2, len(train)))]
    plain = [{name: v.tolist() if hasattr(v, "tolist") else v for name, v in train.collate_fn(b).items()} for b in batches]
    halves = train.collate_fn([train[0] | {"loss_mask": [0.5] * len(train[0]["loss_mask"])}])["loss_mask"].sum().item()
    return {"batches": plain, "eos_id": tokenizer.eos_id, "sum_of_float_mask": halves}


def round_trip(model, output_dir):
    """A folder in Hugging Face form through AutoBridge: the logits of both models, and the folder it writes."""
    import torch
    from megatron.bridge import AutoBridge
    from nemotron_nb.megatron.engine import precision_values, set_value
    from nemotron_nb.train.scan import use_chunked_scan
    from transformers import NemotronHForCausalLM

    on_cpu(True).__enter__()
    bridge = AutoBridge.from_hf_pretrained(model, torch_dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=True)
    for name, value in (cpu_values() | precision_values("fp32")).items():
        if name.startswith("model."):
            set_value(provider, name.removeprefix("model."), value)
    provider.finalize()
    torch.distributed.init_process_group("gloo")
    provider.initialize_model_parallel(seed=1)
    (megatron,) = chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True, bf16=False, fp16=False)
    ids = torch.randint(20, 4096, (1, 48), generator=torch.Generator().manual_seed(0))
    reference = NemotronHForCausalLM.from_pretrained(model, dtype=torch.float32, use_mamba_kernels=False, experts_implementation="eager").eval()
    bridge.save_hf_pretrained(chunks, output_dir, show_progress=False)
    with torch.no_grad():
        found, single = megatron.eval()(ids, torch.arange(48)[None], None), reference(ids, use_cache=False).logits
        exact = use_chunked_scan(reference).double()(ids, use_cache=False).logits  # the scan of transformers computes in float32 whatever it is given
        megatron.double().config.params_dtype = torch.float64  # layers bring their input to it
        double = megatron(ids, torch.arange(48)[None], None)
    return {"megatron": (found - exact).abs().max().item(), "megatron in float64": (double - exact).abs().max().item(), "transformers": (single - exact).abs().max().item(), "scale": exact.abs().max().item()}


def export(checkpoint, model, output_dir):
    """A trained checkpoint back in Hugging Face form."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from nemotron_nb.megatron.engine import export_hf

    on_cpu(True).__enter__()
    get_cuda_rng_tracker().add("model-parallel-rng", 1)  # layers are filled from it before their weights are loaded; a GPU run seeds it
    return {"folder": str(export_hf(checkpoint, model, output_dir))}


def names(model, output_dir):
    """The names of settings of the installed Megatron-Bridge."""
    from nemotron_nb.megatron.names import write_names

    with on_cpu(True):
        return {"text": write_names(model, output_dir).read_text()}


# ---- mistakes made on purpose: each undoes one thing that our step or engine does


def leak_state():
    """Mamba layers are not told where sequences begin."""
    from nemotron_nb.megatron import step as megatron_step

    right = megatron_step.physical_borders
    megatron_step.physical_borders = lambda packed, total: {n: v for n, v in right(packed, total).items() if n != "total_tokens"}


def poison_labels():
    """Labels that nobody trains are changed: nothing may depend on them."""
    from nemotron_nb.megatron.step import TwoStageStep

    right = TwoStageStep.share

    def share(self, batch, *rest):
        return right(self, dict(batch, labels=batch["labels"].where(batch["loss_mask"] > 0, 99)), *rest)

    TwoStageStep.share = share


def train_prompts():
    """The model is not given the weights, as the stock step does not."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    right = HybridModel.forward
    HybridModel.forward = lambda self, *a, loss_mask=None, **k: right(self, *a, **k)


def train_prompts_poisoned():
    """Both."""
    train_prompts()
    poison_labels()


def unscaled_depths():
    """Megatron scales each depth by the tokens that a micro-batch, or a context-parallel slice of it, loses by rolling: this takes the scale out."""
    from megatron.core.transformer import multi_token_prediction as module

    right, masks = module.roll_tensor, []

    def roll_tensor(tensor, *rest, **options):
        rolled, number = right(tensor, *rest, **options)
        if not tensor.is_floating_point():
            return rolled, number
        masks.append(tensor.sum())
        return rolled, masks[-1 if len(masks) % 2 else -2]  # two depths: the sum before the first

    module.roll_tensor = roll_tensor


def end_with_im_end():
    """The reader is given the tokenizer as it is: padding is made of its end token, and what is predicted from it is struck out."""
    from nemotron_nb.megatron import engine as megatron_engine

    right = megatron_engine.reading_tokenizer
    megatron_engine.reading_tokenizer = lambda source, target: right(source, target, "<|im_end|>")
    megatron_engine.check_packs = lambda config, data_dir: {}


def claim_padding():
    """And it is told of the padding of sequences although nobody slices them: so there are two kinds of borders."""
    from nemotron_nb.megatron import engine as megatron_engine

    end_with_im_end()
    right = megatron_engine.check_layout
    megatron_engine.check_layout = lambda config, *rest: (right(config, *rest), setattr(config.dataset.offline_packing_specs, "pad_seq_to_mult", 4))


def logical_borders():
    """And the model is given both, as the stock step does."""
    from nemotron_nb.megatron import step as megatron_step

    claim_padding()
    megatron_step.physical_borders = lambda packed, total: dict(packed, total_tokens=total)


def balance_of_one():
    """A conversation counts 1 in the sample stage."""
    from nemotron_nb.megatron import engine as megatron_engine

    megatron_engine.balance_of = lambda manifest: 1


def read_on():
    """Documents of a row are not told apart."""
    from nemotron_nb.train.sequences import SequenceReader

    right = SequenceReader.rows
    SequenceReader.rows = lambda self, *rest: [row for row in _without_resets(self, right, *rest)]


def _without_resets(reader, rows, *rest):
    from dataclasses import replace

    kept, reader.dataset = reader.dataset, replace(reader.dataset, reset_documents=False)
    found = rows(reader, *rest)
    reader.dataset = kept
    return found


def never_grow():
    """Megatron is not told how the batch grows."""
    from nemotron_nb.megatron.pretrain import GrowingRecorder
    from nemotron_nb.megatron.recorder import Recorder

    GrowingRecorder.on_train_start = Recorder.on_train_start


def count_on_every_rank():
    """Every context-parallel rank counts the row."""
    from nemotron_nb.megatron.step import TwoStageStep

    right = TwoStageStep.share
    TwoStageStep.share = lambda self, batch, step, here: right(self, batch, step, True)
