"""Triton's interpreter, made to do what a GPU does where it does something else."""

import numpy as np
import torch

try:
    import triton.language as tl
    from triton import knobs
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
except ModuleNotFoundError:
    RUNS = False
else:
    RUNS = knobs.runtime.interpret


def round_to_nearest() -> None:
    """float32 becomes bfloat16 by rounding to nearest even, as on every GPU; the interpreter cuts the digits off."""
    if not RUNS:
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16).view(torch.uint16).numpy()
            return TensorHandle(bits, dst_type.scalar)
        return cast(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
