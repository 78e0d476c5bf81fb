"""Key/value caches: pages for layers that see everything, rings for sliding windows."""

from mtp_engine.cache.hybrid import NO_LIMIT, HybridKV
from mtp_engine.cache.paged import PagedKV
from mtp_engine.cache.pages import Pages
from mtp_engine.cache.prefix import Entry, PrefixCache
from mtp_engine.cache.window import WindowKV, ring_spans, write_ring

__all__ = ["NO_LIMIT", "Entry", "HybridKV", "PagedKV", "Pages", "PrefixCache", "WindowKV", "ring_spans", "write_ring"]
