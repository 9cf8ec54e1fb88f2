"""Triton's interpreter made to round to bfloat16 as a GPU does: to nearest, ties to even.

By itself it cuts the lower bits off (and where it is told to round it forgets to carry), which no
device does. Importing this repairs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _cast_rounding(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, src, dst_type)
    rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


InterpreterBuilder.cast_impl = _cast_rounding
