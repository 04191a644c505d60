"""The simulated device, on which programs are interpreted."""

from simulated_cuda.conftest import gpu

__all__ = ["gpu"]
