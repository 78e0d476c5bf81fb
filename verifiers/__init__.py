"""Rules that choose which drafted tokens to keep. VERIFIERS.md compares them."""

from mtp_engine.verifiers.block import BlockVerifier
from mtp_engine.verifiers.match import (
    DeviceMatchVerifier,
    DeviceShardedMatchVerifier,
    MatchVerifier,
    NativeMatchVerifier,
    ShardedMatchVerifier,
)
from mtp_engine.verifiers.rejection import RejectionVerifier
from mtp_engine.verifiers.rrs import DeviceRRSVerifier, RRSVerifier
from mtp_engine.verifiers.traversal import TraversalVerifier
from mtp_engine.verifiers.typical import TypicalVerifier

__all__ = [
    "BlockVerifier",
    "DeviceMatchVerifier",
    "DeviceRRSVerifier",
    "DeviceShardedMatchVerifier",
    "MatchVerifier",
    "NativeMatchVerifier",
    "RRSVerifier",
    "RejectionVerifier",
    "ShardedMatchVerifier",
    "TraversalVerifier",
    "TypicalVerifier",
]
