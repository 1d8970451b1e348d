"""Makes Triton's interpreter right for bfloat16: call `install()` before the first kernel runs. No effect on compiled kernels.

As of triton 3.7 the interpreter, without a word, multiplies the bit patterns of bfloat16 operands in `tl.dot`, and cuts
float32 off to bfloat16 where hardware rounds to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest, ties to even; nan stays nan."""
    bits = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(a))


def to_float32(a: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32."""
    return (np.ascontiguousarray(a, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(a))


def install() -> None:
    """Put both repairs into the interpreter of this process, once."""
    if getattr(interpreter, "repaired_for_bfloat16", False):
        return
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def repaired_convert(values, source, target, rounding):
        """The two conversions done right, all others as before."""
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return to_float32(values).view(np.uint32)
        return convert(values, source, target, rounding)

    def repaired_dot(self, a, b, total, *more, **options):
        """bfloat16 operands go in as float32, in which their products are exact."""
        wide = [interpreter.TensorHandle(to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, total, *more, **options)

    interpreter._convert_float = repaired_convert
    interpreter.InterpreterBuilder.create_dot = repaired_dot
    interpreter.repaired_for_bfloat16 = True
