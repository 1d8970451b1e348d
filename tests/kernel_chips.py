"""Compile every kernel for chips that are not there, and print as JSON what came out. Runs without TRITON_INTERPRET.

Resources come from the binary itself (`cuobjdump`, which triton brings along): registers a thread, bytes of stack and of
local memory (where registers are spilled to), shared memory of a block, and what is found in the machine code.
"""

import json
import re
import sys

import torch

from nemotron_nb.loss import kernel
from nemotron_nb.loss.compiled import compile_for, machine_code, usage_of


def resources(binary, warps: int) -> dict[str, object]:
    """What a compiled kernel takes."""
    usage, code = usage_of(binary.asm["cubin"]), machine_code(binary.asm["cubin"])
    return {
        "warps": warps,
        "registers": usage["registers"],
        "spilled": usage["spilled"] + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": binary.metadata.shared,
        "tensor_core": sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA)\b", code))),
        "wide_stores": code.count("STG.E.128"),
        "barrier_between_read_and_write": barrier_before_last_store(binary.asm["ptx"]),
    }


def barrier_before_last_store(ptx: str) -> bool:
    """Is there a barrier between the last read of a row and the first write of its gradient?"""
    steps = re.findall(r"^\s*(?:@%p\d+ )?(ld\.global[^;]*|st\.global[^;]*|bar(?:rier)?\.sync)", ptx, re.M)
    kinds = "".join({"l": "r", "s": "w", "b": "|"}[step[0]] for step in steps)
    return re.search(r"r\|+w+$", kinds) is not None


def kernels(capability: int):
    """(name, function, types, constants, launch options) of what runs on a chip."""
    for z, d in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
        both = {"STATISTICS": True, "GRADIENT": True, "HAS_SOFTCAP": False}
        rows = kernel._row_blocks(131072)
        yield f"rows {z} to {d}", kernel.rows_kernel, {"Z": f"*{z}", "D": f"*{d}"}, both | {"BLOCK": rows.pop("BLOCK")}, rows
    for dtype in ("bf16", "fp32"):
        for softcap in (False, True) if dtype == "bf16" else (False,):
            tile = kernel.tile_shape(torch.bfloat16 if dtype == "bf16" else torch.float32, capability, softcap)
            launch = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
            constants = tile | {"HAS_SOFTCAP": softcap, "UPCAST": False, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "w_step": 1}
            types = {"X": f"*{dtype}", "W": f"*{dtype}", "OUT": f"*{dtype}"}
            name = f"tiles {dtype}{' softcap' if softcap else ''}"
            yield f"lse {name}", kernel.lse_tiles_kernel, types, constants, launch
            yield f"gradient {name}", kernel.gradient_tiles_kernel, types, constants, launch


def main(chip: str) -> None:
    """One JSON object for a chip, as "sm_90": {kernel: resources}"""
    capability, found = int(chip.removeprefix("sm_")), {}
    for name, function, types, constants, launch in kernels(capability):
        binary = compile_for(function, constants, capability, launch, types)
        found[name] = resources(binary, launch["num_warps"])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
