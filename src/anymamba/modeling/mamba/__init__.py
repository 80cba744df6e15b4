"""Mamba with Transformers' interface: configuration, layers, model, language model."""
