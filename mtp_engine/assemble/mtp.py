"""Drafters made of a model's MTP layers."""

from mtp_engine.assemble.backend import Backend
from mtp_engine.config import EngineConfig, TreeShape
from mtp_engine.drafters import LazyMTPDrafter, MTPDrafter
from mtp_engine.models.mtp import MTPModule
from mtp_engine.runtime.planner import Planner
from mtp_engine.runtime.shapes import Offer, ShapeCosts, ShapePlanner

_SHAPES = (  # beside a chain of all levels: on a GPU, what steps of so many requests at least, and at most, may draft
    (TreeShape.parse("chain:1"), 24, 1 << 30),
    (TreeShape.parse("tree:7"), 1, 32),
    (TreeShape.parse("tree:15"), 1, 8),
)
_LATE = 32  # rows that MTP layers may have to come after steps without drafts


def mtp_drafter(
    module: MTPModule, config: EngineConfig, backend: Backend, planner: Planner | None = None
) -> MTPDrafter | LazyMTPDrafter:
    """The drafter of a main model's MTP layers, fused, for config.tree."""
    assert config.tree is not None
    slots = config.max_batch + 1  # the last is scratch
    if backend.levels and config.ranking == "noise":
        return LazyMTPDrafter(module, config.tree, backend.levels, slots=slots, planner=planner)
    return MTPDrafter(
        module, config.tree, slots=slots, attention=backend.attention, ops=backend.ops(config.ranking),
        ring_page=backend.ring_page, ring_rows=backend.ring_rows,
    )  # fmt: skip


def shaped_drafter(module: MTPModule, config: EngineConfig, backend: Backend) -> MTPDrafter:
    """One whose steps take one of a few shapes, or none, as a planner says. It knows nothing of their costs yet."""
    depth = module.config.depth
    chain = TreeShape(widths=(1,) * depth)
    others = [(shape, least, most) for shape, least, most in _SHAPES if shape != chain]
    offers = [Offer(chain, depth + 1), *(Offer(shape, shape.max_nodes, *batches) for shape, *batches in others)]
    planner = ShapePlanner(
        sorted(offers, key=lambda offer: offer.nodes),
        depth=depth,
        room=_LATE,
        costs=ShapeCosts(),
        bucket=backend.bucket,
    )
    return MTPDrafter(
        module, chain, slots=config.max_batch + 1, attention=backend.attention, ops=backend.ops("noise"),
        ring_page=backend.ring_page, ring_rows=backend.ring_rows, others=[shape for shape, *_ in others], late=_LATE,
        planner=planner,
    )  # fmt: skip
