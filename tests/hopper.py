"""Compiles kernels for a GPU of Hopper, which needs none: Triton's interpreter accepts programs that its compiler does not.

In a process of its own, as kernels that were imported for the interpreter cannot be compiled: python tests/hopper.py
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from mtp_engine.kernels import exchange_kernels, moe_kernels
from mtp_engine.kernels.chain_teams import chain_teams_kernel

_EXCHANGE = {
    "x": "*fp32", "weights": "*fp32", "residual": "*bf16", "out": "*bf16", "boxes": "*i64", "turns": "*i32", "stop": "*i32",
    "halted": "*i32", "count": "i32", "width": "i32", "TERMS": 0, "EVEN": True, "RANK": 0, "SIZE": 4, "SUM": True, "PADDED": 4,
    "PROGRAMS": 128, "ROOM": 1 << 16, "LOOKS": 64, "PATIENCE": 1000, "PDL": True,
}  # fmt: skip
_EXPERTS = {
    "y": "*bf16", "w": "*fp8e4nv", "scale": "*fp32", "table": "*i64", "slots": "*i64", "pairs": "*i32", "h": "*bf16", "M": "i32",
    "S": 4, "H": 4096, "INNER": 256, "K": 8, "FORMAT": "fp8", "COLUMNS": 16, "WIDTH": 128, "TOKENS": 8, "UNROLL": 1, "SPLIT": 4,
    "PDL": True,
}  # fmt: skip
_BOXES = f"tensordesc<bf16[64, 128], {NVMMASharedLayout(128, 16, 2)!r}>"
_CHAINS = {
    "q": "*bf16", "k_cache": _BOXES, "v_cache": _BOXES, "pages": "*i32", "lengths": "*i64", "out": "*bf16",
    **dict.fromkeys(("q_batch", "q_node", "q_head", "page_stride", "nodes", "units"), "i32"), "scale": "fp32",
    "GROUP": 4, "KV_HEADS": 8, "DK": 128, "DV": 128, "PAGE": 64, "SPLITS": (256, 16, 512, 24, 2048),
    "STAGES": 3, "PDL": 3,
}  # fmt: skip


def compiled(kernel: Any, warps: int, arguments: dict[str, Any], **changes: Any) -> None:
    """Raises CompilationError. arguments, changes: by name, the type of a pointer, a descriptor or a number, or a constant's
    value."""
    given = {name: {**arguments, **changes}[name] for name in kernel.arg_names}
    kinds = ("*", "tensordesc", "i32", "fp32")
    types = {name: value if str(value).startswith(kinds) else "constexpr" for name, value in given.items()}
    constants = {(i,): given[name] for i, (name, kind) in enumerate(types.items()) if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, value in enumerate(given.values()) if str(value).startswith("*")}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True})


if __name__ == "__main__":
    few, many = exchange_kernels.few_kernel, exchange_kernels.many_kernel
    compiled(few, 1, _EXCHANGE, x="*i32", out="*i32", weights=None, residual=None, SUM=False, BLOCK=128)
    compiled(few, 1, _EXCHANGE, weights=None, EVEN=False, BLOCK=128)
    for even in (True, False):
        compiled(few, 1, _EXCHANGE, TERMS=8, EVEN=even, BLOCK=128)
        compiled(many, 4, _EXCHANGE, TERMS=8, EVEN=even, BLOCK=1024)
    compiled(moe_kernels.gate_up_kernel, 4, _EXPERTS)
    compiled(chain_teams_kernel, 4, _CHAINS)
