"""Run the real training path of Megatron-Bridge and Megatron-Core on a CPU with gloo. Only for processes of its own: torch is patched.

Only device plumbing is replaced: device="cuda" becomes "cpu", .cuda() returns the tensor, questions to the driver get fixed answers.
Two functions of Megatron-Bridge are replaced, the warm-up of GPU kernels and the assertion that there is a GPU; see the end.
"""
import contextlib
import functools
import types

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _cpu(d):
    return CPU if d is not None and not isinstance(d, torch.Tensor) and (isinstance(d, int) or torch.device(d).type == "cuda") else d


class CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:   # clip_grads asserts 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu(kwargs["device"])
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            args = (args[0], _cpu(args[1]), *args[2:])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Null:
    """Stand-in for Stream / Event."""
    def __init__(self, *a, **k): pass
    def __getattr__(self, n): return lambda *a, **k: 0.0 if n == "elapsed_time" else self
    def __enter__(self): return self
    def __exit__(self, *a): return False


_mode = None


def install():
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    c = torch.cuda
    c.current_device = lambda: CPU
    c.Stream = c.Event = _Null
    c.current_stream = c.default_stream = lambda *a, **k: _Null()
    c.stream = lambda *a, **k: contextlib.nullcontext()
    c.device_count = lambda: 1                                    # makes Bridge seed Megatron's (real) RNG tracker
    c.get_rng_state = c.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    c.set_rng_state = lambda s, *a, **k: torch.set_rng_state(s)
    c.manual_seed = lambda s: torch.default_generator.manual_seed(int(s)) and None
    c.memory_stats = lambda *a, **k: __import__("collections").defaultdict(int)
    c.get_device_properties = lambda *a, **k: types.SimpleNamespace(total_memory=1 << 34, major=0, minor=0, name="cpu", multi_processor_count=1)
    c.get_device_capability = lambda *a, **k: (0, 0)
    c.is_current_stream_capturing = lambda: False
    for n in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_stream", "ipc_collect"):
        setattr(c, n, lambda *a, **k: None)
    c.nvtx.range_push = c.nvtx.range_pop = lambda *a, **k: None
    torch.nn.Module.cuda = lambda self, *a, **k: self
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group=group, async_op=async_op)
    import megatron.core.tensor_parallel.random as rnd
    rnd._set_cuda_rng_state = lambda s, *a, **k: torch.set_rng_state(s)
    a2a = torch.distributed.all_to_all_single                     # MoE EP: split sizes stay tensors on CPU, gloo wants lists
    lst = lambda x: x.tolist() if isinstance(x, torch.Tensor) else x
    torch.distributed.all_to_all_single = lambda o, i, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False: \
        a2a(o, i, lst(output_split_sizes), lst(input_split_sizes), group=group, async_op=async_op)
    _mode = CudaToCpu()
    _mode.__enter__()
    import megatron.bridge.training.initialize as init, megatron.bridge.training.setup as setup
    setup.set_jit_fusion_options = lambda *a, **k: None          # GPU JIT warm-up
    setup.initialize_megatron = functools.partial(init.initialize_megatron, allow_no_cuda=True)   # real function, real flag
    try:                                                          # pip wheel: helpers_cpp is prebuilt and no Makefile is shipped
        import megatron.core.datasets.helpers_cpp  # noqa: F401
        init.compile_helpers = lambda: None
    except ImportError:
        pass
