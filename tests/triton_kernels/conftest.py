"""The simulated device, on which programs are interpreted."""

from simulated_cuda.conftest import can_be_simulated, gpu

__all__ = ["can_be_simulated", "gpu"]
