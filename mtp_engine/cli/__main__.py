"""`python -m mtp_engine.cli`."""

from mtp_engine.cli.main import main

main()
