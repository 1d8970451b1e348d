"""What the processes of tests/megatron do. Each function returns something that JSON can say."""

import logging
import os
import warnings

from cpu_import import import_bridge
from cpu_scan import install_mamba_reference


def prepare():
    """Import everything once, before processes are forked."""
    warnings.filterwarnings("ignore")
    install_mamba_reference()
    import_bridge()
    import cpu_device
    import cpu_layers
    import torch

    torch.set_num_threads(1)
    cpu_device.install()
    cpu_layers.install()
    import megatron.bridge.recipes.nemotronh  # noqa: F401
    import megatron.bridge.training.finetune  # noqa: F401
    import nemotron_nb.train.megatron_engine  # noqa: F401

    logging.disable(logging.WARNING)


def _run(data_dir, output_dir, model, stages, recipe, steps, batch, lr, overrides):
    from cpu_layers import CPU_PROFILE
    from nemotron_nb.loss.schedule import Phase
    from nemotron_nb.train.megatron_engine import MegatronConfig
    from nemotron_nb.train.settings import LossSection, ModelConfig, OptimizerSection, SchedulerSection, TrainConfig, TrainSection

    shared = TrainConfig(
        data_dir, output_dir, ModelConfig(name=model), TrainSection(train_iters=steps, global_batch_size=batch, log_interval=1), OptimizerSection(lr=lr, weight_decay=0.0),
        SchedulerSection(), LossSection([Phase(**p) for p in stages]),
    )
    return MegatronConfig(shared, recipe, {}, CPU_PROFILE | overrides)


def train(data_dir, output_dir, model, stages=({"stage": "token"},), recipe="nemotron_3_nano", steps=3, batch=4, lr=1e-3, overrides=None, break_it=None):
    """A training by our engine; its metrics."""
    import json
    from pathlib import Path

    from nemotron_nb.train.megatron_engine import train as start

    if break_it:
        globals()[break_it]()
    start(_run(data_dir, output_dir, model, stages, recipe, steps, batch, lr, overrides or {}))
    path = Path(output_dir) / "metrics.jsonl"
    return {"metrics": [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [], "pid": os.getpid()}
