"""What proposes trees: MTP layers, prompt lookup, or nothing."""

from mtp_engine.drafters.candidates import Ranking
from mtp_engine.drafters.lazy import LazyMTPDrafter, TorchLevels
from mtp_engine.drafters.mtp import MTPDrafter
from mtp_engine.drafters.ngram import NgramDrafter
from mtp_engine.drafters.portable import TorchDraftOps
from mtp_engine.drafters.root import RootDrafter

__all__ = ["LazyMTPDrafter", "MTPDrafter", "NgramDrafter", "Ranking", "RootDrafter", "TorchDraftOps", "TorchLevels"]
