"""Speed and memory of a model, beside other programs."""
