"""Kernels for GPUs, written in Triton: products with packed weights, and rows of them.

`programs` is what is compiled, `arrangement` how a weight is described to it, `launch` how it is started, `kernel` the
Kernel. Triton is imported when the first program is launched.
"""

from neoquant.kernels.triton.kernel import Triton
from neoquant.kernels.triton.rounded import TritonInt8

__all__ = ["Triton", "TritonInt8"]
