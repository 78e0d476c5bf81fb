"""Key/value caches: pages for layers that see everything, rings for sliding windows."""

from mtp_engine.cache.hybrid import NO_LIMIT, HybridKV
from mtp_engine.cache.paged import PagedKV
from mtp_engine.cache.window import WindowKV

__all__ = ["NO_LIMIT", "HybridKV", "PagedKV", "WindowKV"]
