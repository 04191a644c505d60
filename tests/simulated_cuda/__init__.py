"""A CUDA device that is not there: see `device.simulate`."""
