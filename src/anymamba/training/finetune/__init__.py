"""Training a model further, or an adapter of it."""
