"""HTTP in OpenAI's form over an engine: `build_app` for servers of your own, `mtp-engine serve` for the rest."""

from mtp_engine.serve.app import build_app
from mtp_engine.serve.limits import Limits

__all__ = ["Limits", "build_app"]
