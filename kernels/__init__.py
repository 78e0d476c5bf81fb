"""Everything that is worth a kernel of its own, each with a torch twin."""
