"""Import Megatron-Bridge on a machine without Transformer Engine.

Bridge 0.6.2 imports `transformer_engine.pytorch` in peft/lora_layers.py without asking, and uses what it finds there as base classes
and in isinstance only. Stub modules are visible while Bridge is imported and withdrawn afterwards. Megatron-Core is imported before,
so that it knows Transformer Engine is missing and takes its own layers.
"""

import contextlib
import importlib.machinery
import os
import sys
import types
import typing

import typing_extensions

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # fused helpers go through torch.compile, which needs a device
if not hasattr(typing, "override"):  # Python 3.11; Megatron 0.19 and Bridge import it from typing
    typing.override = typing_extensions.override


def module(name, **attributes):
    """A new module under that name."""
    made = types.ModuleType(name)
    made.__path__, made.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
    vars(made).update(attributes)
    sys.modules[name] = made
    return made


def _refuse(self, *arguments, **options):
    raise RuntimeError("Transformer Engine is not installed; this class stands in for it while Megatron-Bridge is imported")


def _stub_class(name):
    import torch

    return type(name, (torch.nn.Module,), {"__init__": _refuse})


@contextlib.contextmanager
def transformer_engine_stub():
    """Stub modules of Transformer Engine while the block runs."""
    import megatron.core.extensions.transformer_engine  # noqa: F401  decides that there is none
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import megatron.core.models.mamba.mamba_layer_specs  # noqa: F401

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops")
    operations = module(names[2], Sequential=_stub_class("Sequential"))
    layers = module(names[1], ops=operations, Linear=_stub_class("Linear"), LayerNormLinear=_stub_class("LayerNormLinear"))
    module(names[0], pytorch=layers)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_bridge():
    """Import Megatron-Bridge with what its LoRA needs."""
    with transformer_engine_stub():
        import megatron.bridge  # noqa: F401
        import megatron.bridge.peft.canonical_lora  # noqa: F401
        import megatron.bridge.peft.lora  # noqa: F401
        import megatron.bridge.peft.utils

        megatron.bridge.peft.utils.HAVE_TE = False
