"""Rules that choose which drafted tokens to keep."""

from mtp_engine.verifiers.match import DeviceMatchVerifier, MatchVerifier

__all__ = ["DeviceMatchVerifier", "MatchVerifier"]
