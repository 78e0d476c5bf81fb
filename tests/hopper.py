"""Compiles kernels for a GPU of Hopper, which needs none: Triton's interpreter accepts programs that its compiler does not.

In a process of its own, as kernels that were imported for the interpreter cannot be compiled: python tests/hopper.py
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtp_engine.kernels import exchange_kernels

_EXCHANGE = {
    "x": "*fp32", "weights": "*fp32", "residual": "*bf16", "out": "*bf16", "boxes": "*i64", "turns": "*i32", "stop": "*i32",
    "halted": "*i32", "count": "i32", "width": "i32", "TERMS": 0, "EVEN": True, "RANK": 0, "SIZE": 4, "SUM": True, "PADDED": 4,
    "PROGRAMS": 128, "ROOM": 1 << 16, "LOOKS": 64, "PATIENCE": 1000, "PDL": True,
}  # fmt: skip


def compiled(kernel: Any, warps: int, arguments: dict[str, Any], **changes: Any) -> None:
    """Raises CompilationError. arguments, changes: by name, the type of a pointer or a number, or a constant's value."""
    given = {name: {**arguments, **changes}[name] for name in kernel.arg_names}
    types = {name: value if isinstance(value, str) else "constexpr" for name, value in given.items()}
    constants = {(i,): value for i, value in enumerate(given.values()) if not isinstance(value, str)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, value in enumerate(given.values()) if str(value).startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True})


if __name__ == "__main__":
    few, many = exchange_kernels.few_kernel, exchange_kernels.many_kernel
    compiled(few, 1, _EXCHANGE, x="*i32", out="*i32", weights=None, residual=None, SUM=False, BLOCK=128)
    compiled(few, 1, _EXCHANGE, weights=None, EVEN=False, BLOCK=128)
    for even in (True, False):
        compiled(few, 1, _EXCHANGE, TERMS=8, EVEN=even, BLOCK=128)
        compiled(many, 4, _EXCHANGE, TERMS=8, EVEN=even, BLOCK=1024)
