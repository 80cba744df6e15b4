"""Training a model from scratch on texts."""
