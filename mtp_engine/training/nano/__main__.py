"""`python -m mtp_engine.training.nano`."""

from mtp_engine.training.nano.command import run_command

run_command()
