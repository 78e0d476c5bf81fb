"""Rules that choose which drafted tokens to keep."""

from mtp_engine.verifiers.match import MatchVerifier

__all__ = ["MatchVerifier"]
