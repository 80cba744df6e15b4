"""Layers: Mamba, Mamba-2, their blocks, attention and feed-forward layers."""
