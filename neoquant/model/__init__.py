"""GPT-Neo in PyTorch: the network, its heads, its tokenizer, generation. Knows nothing of files or quantization."""
