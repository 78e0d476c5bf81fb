"""Running graphs with onnxruntime: its settings, a check of its products, and calls that copy no keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from mtp_engine.models.onnx.blocks import fixed_product
from mtp_engine.models.onnx.fold import Rounded
from mtp_engine.models.onnx.graph import Graph

_MOST_BINDINGS = 64
_SPIN_US = 30
_KINDS = {torch.float32: np.float32, torch.int64: np.int64}


def open_session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """Between runs threads sleep, and within one they spin for a moment only: longer, they would take the cores of whoever
    else runs, and not at all, each operation would have to wake them (figures in bench/LOG.md)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@final
@dataclass(frozen=True)
class Stack:
    """Inputs of one shape that lie in one tensor: names[i] is value[i], which is contiguous."""

    names: Sequence[str]
    value: Tensor

    @property
    def key(self) -> tuple[int, ...]:
        """Where they lie."""
        return (self.value.data_ptr(), self.value.stride(0), *self.value.shape)


@final
class Session:
    """A graph, called with torch tensors on the CPU, which it reads where they lie. Not for several threads at once."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = open_session(path, threads)
        self._bindings: dict[tuple[object, ...], onnxruntime.IOBinding] = {}

    def __call__(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Sequence[int]], stacks: Sequence[Stack] = ()
    ) -> list[Tensor]:
        """outputs: names and shapes, all fp32."""
        inputs = {name: value.contiguous() for name, value in inputs.items()}
        results = [torch.empty(tuple(shape)) for shape in outputs.values()]
        binding = self._binding(stacks)
        for name, value in inputs.items():
            binding.bind_input(name, "cpu", 0, _KINDS[value.dtype], value.shape, value.data_ptr())
        for name, result in zip(outputs, results, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, result.shape, result.data_ptr())
        self._session.run_with_iobinding(binding)
        return results

    def _binding(self, stacks: Sequence[Stack]) -> onnxruntime.IOBinding:
        """One with the stacks bound, which is kept for as long as they lie where they do: for many steps."""
        key = tuple(stack.key for stack in stacks)
        if key not in self._bindings:
            if len(self._bindings) == _MOST_BINDINGS:
                self._bindings.clear()
            binding = self._bindings[key] = self._session.io_binding()
            for stack in stacks:
                begin, stride = stack.value.data_ptr(), stack.value.stride(0) * stack.value.element_size()
                for i, name in enumerate(stack.names):
                    binding.bind_input(name, "cpu", 0, np.float32, stack.value.shape[1:], begin + i * stride)
        return self._bindings[key]


def weight_bits() -> int:
    """8 where this processor's products of unsigned and signed bytes are exact; 7 where their sums of two saturate at 16
    bits (no VNNI). Raises AssertionError where 7 bits are wrong, too. About 10 ms."""
    for bits in (8, 7):
        if all(exact(bits, rows) for rows in (1, 2, 3, 5, 16, 64)):
            return bits
    raise AssertionError("this processor's integer products are wrong; use --dtype fp32")


def steady() -> bool:
    """Whether functions of single elements give an element the same bits wherever it stands in a tensor of whatever size:
    vector code may treat the rest of a tensor in another way. About 10 ms."""
    graph = Graph()
    x = graph.input("x", TensorProto.FLOAT, ["N"])
    graph.output("y", graph("Exp", x))
    graph.output("z", graph.ms("QuickGelu", x, alpha=1.0))
    run = open_session(graph.serialised(), 1).run
    values = -np.abs(np.random.default_rng(0).standard_normal(200).astype(np.float32)) * 9
    whole = run(None, {"x": values})
    for start in range(20):
        for count in (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 100):
            part = run(None, {"x": values[start : start + count].copy()})
            if not all(np.array_equal(a, b[start : start + count]) for a, b in zip(part, whole, strict=True)):
                return False
    return True


def exact(bits: int, rows: int, columns: int = 256, outputs: int = 48) -> bool:
    """Whether a product of the largest numbers, among others, is what integer arithmetic says."""
    generator = np.random.default_rng(rows)
    most = (1 << (bits - 1)) - 1
    weight = generator.integers(-most, most + 1, (columns, outputs)).astype(np.int8)
    weight[:, 0], weight[:, 1] = most, -most
    x = generator.integers(-127, 128, (rows, columns))
    x[0], x[-1] = 127, -127
    graph = Graph()
    name = graph.input("x", TensorProto.FLOAT, [1, "N", columns])
    graph.output("y", fixed_product(graph, name, Rounded(weight, np.ones(outputs)), 8, 1.0))
    y = open_session(graph.serialised(), 1).run(None, {"x": x[None].astype(np.float32)})[0][0]
    return np.array_equal(y, (x @ weight.astype(np.int64)).astype(np.float32))
