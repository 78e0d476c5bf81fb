"""The command line: click commands and rich output, with no logic of its own."""
