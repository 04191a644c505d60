"""transformers' entry points: Auto classes and pipelines."""
