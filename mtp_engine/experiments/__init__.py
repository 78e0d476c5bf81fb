"""Experiments on acceptance: grids of real decoding, recordings that answer for any tree, reports, comparisons, doctor."""
