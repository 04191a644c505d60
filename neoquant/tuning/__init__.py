"""Training of what a quantized model holds in floating point, by the predictions of the model that it was made from."""
