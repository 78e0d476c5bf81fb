"""`python -m mtp_engine.training.nano`."""

from mtp_engine.training.nano.command import main

main()
