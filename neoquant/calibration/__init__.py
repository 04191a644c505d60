"""Calibration samples on their way through the model, and what quantizers learn from them."""
