"""Putting an engine together: settings for a model and a device, and the parts that suit them. Only here are these named."""

from mtp_engine.assemble.costs import measured_costs
from mtp_engine.assemble.loop import decode_loop, make_loop
from mtp_engine.assemble.mtp import mtp_drafter
from mtp_engine.assemble.parts import load_main, make_drafter

__all__ = ["decode_loop", "load_main", "make_drafter", "make_loop", "measured_costs", "mtp_drafter"]
