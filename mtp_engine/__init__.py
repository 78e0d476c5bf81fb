"""mtp-engine: lossless speculative decoding with Multi-Token Prediction layers.

    from mtp_engine import Engine, SamplingParams

Names are loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_engine.async_engine import AsyncEngine
    from mtp_engine.config import EngineConfig, SamplingParams, TreeShape
    from mtp_engine.engine import Engine
    from mtp_engine.errors import EngineBusy, EngineError
    from mtp_engine.runtime.answer import Chunk, Generation
    from mtp_engine.runtime.loop import DecodeLoop
    from mtp_engine.runtime.stats import GenerationStats
    from mtp_engine.serve.transformers import transformers_generate
    from mtp_engine.tree import DraftTree, VerifyResult

__version__ = "0.2.0"

_HOME = {
    "AsyncEngine": "async_engine",
    "Chunk": "runtime.answer",
    "DecodeLoop": "runtime.loop",
    "DraftTree": "tree",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineBusy": "errors",
    "EngineError": "errors",
    "Generation": "runtime.answer",
    "GenerationStats": "runtime.stats",
    "SamplingParams": "config",
    "TreeShape": "config",
    "VerifyResult": "tree",
    "transformers_generate": "serve.transformers",
}
__all__ = [
    "AsyncEngine",
    "Chunk",
    "DecodeLoop",
    "DraftTree",
    "Engine",
    "EngineBusy",
    "EngineConfig",
    "EngineError",
    "Generation",
    "GenerationStats",
    "SamplingParams",
    "TreeShape",
    "VerifyResult",
    "transformers_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
