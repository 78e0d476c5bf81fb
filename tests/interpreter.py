"""Repairs of Triton's interpreter, in which the kernels are tested where there is no GPU."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """It multiplies bf16 matrices as integers, and its loops fail under numpy 2.4.

    Its products become plain sums here: a BLAS may add a row in an order that depends on the number of rows, which no
    kernel of ours does.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        product = np.einsum("...ik,...kj->...ij", wide(a), wide(b))  # without optimize= no BLAS has a part in it
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = dot
