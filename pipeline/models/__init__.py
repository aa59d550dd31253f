"""Model files: the hub, weights, GGUF."""
