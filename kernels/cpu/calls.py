"""The library of step.c from Python: its structures, a team of threads, and matrices that are packed for it."""

from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple, final

import torch
from torch import Tensor

from mtp_engine.errors import EngineError
from mtp_engine.kernels.cpu.build import FLAGS, NoCompiler, compiled

TILE = 32  # rows of a matrix that lie together
LANES = 16  # sizes of vectors are multiples of this
_SPINS = 10000  # rounds, some 0.1 ms, for which a thread waits before it sleeps


class CMatrix(Structure):
    _fields_ = [
        ("values", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("rows", c_int32), ("columns", c_int32),
    ]  # fmt: skip


class CPacking(Structure):
    _fields_ = [
        ("weight", c_void_p), ("values", c_void_p), ("scale", c_void_p), ("rows", c_int32), ("columns", c_int32),
    ]  # fmt: skip


class CPart(Structure):
    _fields_ = [("x", c_void_p), ("weight", c_void_p), ("stride", c_int64), ("size", c_int32)]


class CLinear(Structure):
    _fields_ = [
        ("matrix", CMatrix), ("parts", POINTER(CPart)), ("y", c_void_p), ("stride", c_int64), ("part_count", c_int32),
        ("count", c_int32), ("add", c_int32), ("eps", c_float),
    ]  # fmt: skip


class CLayer(Structure):
    """place: the layer's index in its cache group. rope: index of its rotary setting. feature: where its output goes in
    what the step returns, -1: nowhere. experts NULL: a dense layer."""

    _fields_ = [
        *((name, CMatrix) for name in ("qkv", "out", "gate_up", "down")), ("experts", c_void_p),
        *((name, c_void_p) for name in ("router", "router_bias", "attention_norm", "ffn_norm", "sink")),
        *((name, c_int32) for name in (
            "heads", "kv_heads", "qk_dim", "v_dim", "group", "place", "rope", "wide", "expert_count", "per_token",
            "normalise", "feature",
        )),
        ("value_scale", c_float), ("route_scale", c_float),
    ]  # fmt: skip


class CGroup(Structure):
    """A cache group: storage [layers, rows, kv_heads, dim] of keys and values, and the pages of its slots: token t of a slot
    is in page t / page_size % wrap. window 0: none."""

    _fields_ = [
        ("k", c_void_p), ("v", c_void_p), ("k_layer", c_int64), ("v_layer", c_int64), ("pages", c_void_p),
        ("page_size", c_int32), ("wrap", c_int32), ("window", c_int32),
    ]  # fmt: skip


class CRope(Structure):
    _fields_ = [("frequencies", c_void_p), ("half", c_int32)]


class CStep(Structure):
    """x: [B * N, hidden]; y: [B * N, (features + 1) * hidden]; the int64 tables are those of attention.rows.StepRows."""

    _fields_ = [
        ("layers", c_void_p), ("groups", c_void_p), ("ropes", c_void_p), ("x", c_void_p), ("y", c_void_p),
        *((name, c_void_p) for name in ("slots", "lengths", "rotary", "positions", "parents", "first")),
        *((name, c_int32) for name in ("layer_count", "group_count", "rope_count", "batch", "nodes", "hidden", "features")),
        ("eps", c_float),
    ]  # fmt: skip


class CAdvance(Structure):
    """The tables of Team.advance; `most` tokens are emitted."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "slots", "lengths", "size", "depths", "tokens", "counts", "state_lengths", "state_tokens", "table",
        )),
        *((name, c_int32) for name in ("batch", "nodes", "most", "slot_count")),
    ]  # fmt: skip


class CVerify(Structure):
    """Tables of a tree, [B, N] and [B], and of a VerifyResult."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "logits", "lengths", "seed", "temperature", "tokens", "parents", "depths", "size", "path", "emitted", "counts",
        )),
        *((name, c_int32) for name in ("batch", "nodes", "vocab", "depth")),
    ]  # fmt: skip


class CGrow(Structure):
    """logits: [B, frontier, n]; the tree's tables are [B, cap], its frontier begins at node `first`."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "logits", "ids", "lengths", "seed", "temperature", "biases", "tokens", "parents", "depths", "scores",
        )),
        *((name, c_int32) for name in ("batch", "frontier", "n", "cap", "first", "ahead", "width", "keep")),
    ]  # fmt: skip


class CLevel(Structure):
    """A level of drafting: the fields are those of draft.c's Level, which says what they hold."""

    _fields_ = [
        ("step", CStep), ("join", CMatrix), ("head", CMatrix),
        *((name, c_void_p) for name in (
            "embedding_norm", "hidden_norm", "head_norm", "embedding", "ids", "states", "outputs", "above", "passed",
            "logits", "counts",
        )),
        ("grow", CGrow),
        *((name, c_int32) for name in (
            "ring", "state_ring", "output_ring", "rows", "tree_nodes", "above_nodes", "lag", "shift",
            "hidden_first",
        )),
    ]  # fmt: skip


@final
class Team:
    """Threads that run the library's calls together, one call at a time: whoever else calls waits. Raises NoCompiler where there
    is no library."""

    def __init__(self, threads: int, folder: Path, flags: tuple[str, ...] = FLAGS) -> None:
        self._library = compiled(folder, flags)
        self._library.team_new.restype = c_void_p
        self._library.team_new.argtypes = [c_int, c_int]
        for name in ("team_free", "pack_matrix", "run_linear", "run_step", "run_verify", "run_grow", "run_level"):
            getattr(self._library, name).argtypes = [c_void_p, c_void_p][: 1 if name == "team_free" else 2]
        self._library.run_advance.argtypes = [c_void_p]
        for name in ("team_free", "pack_matrix", "run_advance"):
            getattr(self._library, name).restype = None
        self._one = Lock()
        self.threads, self._handle = threads, self._library.team_new(threads, _SPINS)
        if not self._handle:
            raise NoCompiler(f"{threads} threads could not be started")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.team_free(self._handle)

    def pack(self, packing: CPacking) -> None:
        with self._one:
            self._library.pack_matrix(self._handle, byref(packing))

    def linear(self, call: CLinear) -> None:
        self._run(self._library.run_linear, call)

    def step(self, call: CStep) -> None:
        self._run(self._library.run_step, call)

    def verify(self, call: CVerify) -> None:
        self._run(self._library.run_verify, call)

    def advance(
        self, slots: Tensor, lengths: Tensor, tokens: Tensor, counts: Tensor, size: Tensor, depths: Tensor,
        state_lengths: Tensor, state_tokens: Tensor,
    ) -> Tensor:  # fmt: skip
        """kernels.state.advance's twin."""
        (batch, most), nodes = tokens.shape, depths.shape[1]
        table = torch.empty(batch, 3 + most, dtype=torch.int64)
        given = [x.contiguous() for x in (slots, lengths, size, depths, tokens, counts)]
        addresses = (x.data_ptr() for x in (*given, state_lengths, state_tokens, table))
        self._library.run_advance(byref(CAdvance(*addresses, batch, nodes, most, len(state_lengths))))
        return table

    def grow(self, call: CGrow) -> None:
        self._run(self._library.run_grow, call)

    def level(self, call: CLevel) -> None:
        self._run(self._library.run_level, call)

    def _run(self, function: Callable[..., int], call: Structure) -> None:
        with self._one:
            failed = function(self._handle, byref(call))
        if failed:
            raise MemoryError("no memory for what a step computes on its way")


@final
class Part(NamedTuple):
    """Rows [M, size] fp32, and the weights of the norm [size] that they go through; None: none."""

    x: Tensor
    norm: Tensor | None = None


@final
class PackedLinear:
    """A linear layer whose weights have 8 bits and a scale per output row, and whose inputs have up to 16 bits and a scale
    per row (a LinearMap). reference.int8_linear is its twin, with the same bits."""

    def __init__(self, team: Team, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in], in a multiple of 16; bias: [out]. Raises EngineError where a weight is not finite."""
        self.team, (self.out_features, self.in_features) = team, weight.shape
        assert self.in_features % LANES == 0, "columns come in sixteens"
        weight, rows = weight.float().contiguous(), -(-self.out_features // TILE) * TILE
        self.values = torch.empty(rows * self.in_features, dtype=torch.int8)
        self.scale = torch.empty(rows)
        self.bias = None if bias is None else bias.float().contiguous()
        packing = CPacking(
            weight.data_ptr(), self.values.data_ptr(), self.scale.data_ptr(), self.out_features, self.in_features
        )
        team.pack(packing)
        if not self.scale.isfinite().all():
            raise EngineError("a weight is not a finite number: its file is damaged; fetch the model again")

    @cached_property
    def matrix(self) -> CMatrix:
        """Valid as long as this layer is."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return CMatrix(self.values.data_ptr(), self.scale.data_ptr(), bias, self.out_features, self.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return self.joined([Part(x.reshape(-1, x.shape[-1]))], 0.0).view(*x.shape[:-1], -1)

    def joined(self, parts: Sequence[Part], eps: float, added: Tensor | None = None) -> Tensor:
        """The product with the parts side by side, each normed: [M, out]; or `added`, [M, out], plus it."""
        rows = [part.x if part.x.stride(-1) == 1 else part.x.contiguous() for part in parts]
        y = torch.empty(len(rows[0]), self.out_features) if added is None else added.contiguous().clone()
        each = (CPart * len(parts))(*(
            CPart(x.data_ptr(), None if part.norm is None else part.norm.data_ptr(), x.stride(0), x.shape[1])
            for x, part in zip(rows, parts, strict=True)
        ))  # fmt: skip
        self.team.linear(
            CLinear(self.matrix, each, y.data_ptr(), y.stride(0), len(parts), len(y), int(added is not None), eps)
        )
        return y


@final
@dataclass(frozen=True)
class PackedStack:
    """The same matrix of every expert (an ExpertStack)."""

    members: Sequence[PackedLinear]

    def matrix(self, index: int, dtype: torch.dtype) -> Tensor:
        raise AssertionError("packed weights are read by the library alone")
