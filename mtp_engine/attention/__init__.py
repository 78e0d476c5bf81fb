"""The attention of one step: who sees what, with torch or with CUDA kernels."""
