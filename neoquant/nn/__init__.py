"""Layers of a loaded model: linear layers and embeddings on packed weights, a block in one call, LoRA adapters."""
