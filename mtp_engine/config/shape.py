"""The shape of a drafted tree, and how it is written."""

import re
from dataclasses import dataclass
from typing import final

from mtp_engine.errors import EngineError

AUTO_NODES = 16  # at most, of a tree that is planned step by step
MAX_TREE_NODES = 64  # a tree mask is 64 bits per node in the CUDA kernels


@final
@dataclass(frozen=True)
class TreeShape:
    """How many candidates a drafter proposes at each depth, or how many nodes it may spend.

    widths: every node at depth d gets widths[d] children (chain:K is K widths of one).
    best: instead, the `best` drafted nodes with the highest joint draft probability, chosen anew in every step.
    auto: every step's tree is as deep and has as many of these nodes as pays at that moment, perhaps none.
    """

    widths: tuple[int, ...] = ()
    best: int = 0
    auto: bool = False

    @classmethod
    def parse(cls, text: str) -> "TreeShape":
        """Read `auto`, `chain:K`, `4x2x2` or `tree:N`. Raises EngineError for anything else or above 64 nodes."""
        if text == "auto":
            return cls(best=AUTO_NODES, auto=True)
        if match := re.fullmatch(r"chain:(\d+)", text):
            shape = cls(widths=(1,) * int(match[1]))
        elif match := re.fullmatch(r"tree:(\d+)", text):
            shape = cls(best=int(match[1]))
        elif re.fullmatch(r"\d+(x\d+)*", text):
            shape = cls(widths=tuple(int(width) for width in text.split("x")))
        else:
            raise EngineError(f"tree shape {text!r} is not one of auto, chain:K, WxWxW (for example 4x2x2) or tree:N")
        if shape.best == 0 and (not shape.widths or 0 in shape.widths):
            raise EngineError(f"tree shape {text!r} drafts nothing: use at least one node, or --drafter root")
        if shape.max_nodes > MAX_TREE_NODES:
            raise EngineError(
                f"tree shape {text!r} has {shape.max_nodes} nodes with its root; at most {MAX_TREE_NODES}"
            )
        return shape

    @property
    def max_nodes(self) -> int:
        """Nodes of the largest tree, root included."""
        if self.best:
            return self.best + 1
        total, level = 1, 1
        for width in self.widths:
            level *= width
            total += level
        return total

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        if self.best:
            return f"tree:{self.best}"
        return f"chain:{len(self.widths)}" if set(self.widths) == {1} else "x".join(map(str, self.widths))
