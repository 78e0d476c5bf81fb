"""The kernels of exchanges, compiled for an H100 that is not here: what Triton's interpreter does not find."""

from itertools import product
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mtp_engine.kernels.exchange_kernels import few_kernel, many_kernel

_BOXES = {"boxes": "*i64", "turns": "*i32", "stop": "*i32", "halted": "*i32", "count": "i32", "width": "i32"}


def build(kernel: Any, types: dict[str, str | None], **constants: Any) -> None:
    """types: of arguments that are no constants; None: nothing is given."""
    kinds = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    values = {name: constants.get(name) for name, kind in kinds.items() if kind == "constexpr"}
    source = ASTSource(kernel, kinds, {(kernel.arg_names.index(name),): value for name, value in values.items()})
    assert compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": constants["WARPS"]}).asm["cubin"]


def main() -> None:
    waits = {"LOOKS": 1 << 15, "PATIENCE": 1 << 29, "PDL": True, "RANK": 1, "SIZE": 4}
    few, many = (
        {**waits, "BLOCK": 128, "WARPS": 1},
        {**waits, "PADDED": 4, "PROGRAMS": 8, "BLOCK": 256, "ROOM": 512, "WARPS": 4},
    )
    build(few_kernel, {"x": "*i32", "out": "*i32", **_BOXES}, TERMS=0, EVEN=False, SUM=False, **few)
    for (terms, even), residual in product([(0, True), (8, True), (8, False)], ["*bf16", None]):
        types = {"x": "*fp32", "out": "*bf16", "weights": "*fp32" if terms else None, "residual": residual, **_BOXES}
        build(few_kernel, types, TERMS=terms, EVEN=even, SUM=True, **few)
        build(many_kernel, types, TERMS=terms, EVEN=even, **many)


if __name__ == "__main__":
    main()
