"""The kernels written in Triton, without a GPU: interpreted, and compiled ahead of time."""
