"""HTTP in OpenAI's form over an engine: `build_app` for servers of your own, `mtp-engine serve` for the rest.

Names are loaded on first use: what lies beside the server needs none of its packages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_engine.serve.app import build_app
    from mtp_engine.serve.limits import Limits

_HOME = {"Limits": "limits", "build_app": "app"}
__all__ = ["Limits", "build_app"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
