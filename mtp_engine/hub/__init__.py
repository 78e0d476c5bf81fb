"""Where models come from, and what a checkpoint holds."""
