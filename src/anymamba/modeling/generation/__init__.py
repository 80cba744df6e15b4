"""`generate` in a loop of our own, with Transformers' results."""
