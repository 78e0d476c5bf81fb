"""Writing an ONNX graph node by node."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

Array = NDArray[Any]
_SMALL = 1024  # bytes; constants up to here stay in the graph itself
_ALIGN = 4096  # bytes; a page, so that a weight can be mapped


@final
class Graph:
    """Nodes and constants, named as they come. A node's output is known by its name, a string."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Array] = {}
        self.products: list[str] = []  # what matrices are multiplied with, in order
        self._small: dict[object, str] = {}  # constants that are used again

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: int = TensorProto.FLOAT) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, None))

    def constant(self, value: Array) -> str:
        key = (value.shape, value.dtype, value.tobytes()) if value.nbytes <= _SMALL else None
        if key in self._small:
            return self._small[key]
        name = f"c{len(self.weights)}"
        self.weights[name] = value if value.ndim == 0 else np.ascontiguousarray(value)
        if key is not None:
            self._small[key] = name
        return name

    def floats(self, *values: float) -> str:
        return self.constant(np.array(values[0] if len(values) == 1 else values, np.float32))

    def byte(self, value: int) -> str:
        return self.constant(np.array(value, np.uint8))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def many(self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        names = [f"n{len(self._nodes)}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names

    def __call__(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.many(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ms(self, op: str, *inputs: str, **attributes: Any) -> str:
        """An operation of onnxruntime's own."""
        return self(op, *inputs, domain="com.microsoft", **attributes)

    def save(self, path: Path) -> None:
        """`path`, and its weights in a file of the same name that ends in .bin."""
        offset, kept = 0, []
        data = path.with_suffix(".bin")
        with data.open("wb") as file:
            for name, value in self.weights.items():
                if value.nbytes <= _SMALL:
                    kept.append(onnx.numpy_helper.from_array(value, name))
                    continue
                offset += file.write(b"\0" * (-offset % _ALIGN))
                tensor = TensorProto(
                    name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape,
                    data_location=TensorProto.EXTERNAL,
                )  # fmt: skip
                for key, entry in (("location", data.name), ("offset", offset), ("length", value.nbytes)):
                    tensor.external_data.add(key=key, value=str(entry))
                kept.append(tensor)
                offset += file.write(value.data)
        path.write_bytes(self._model(kept))

    def serialised(self) -> bytes:
        """A small graph with everything in it."""
        return self._model([onnx.numpy_helper.from_array(value, name) for name, value in self.weights.items()])

    def _model(self, constants: Sequence[TensorProto]) -> bytes:
        graph = helper.make_graph(self._nodes, "step", self._inputs, self._outputs, constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        data: bytes = model.SerializeToString()
        return data
