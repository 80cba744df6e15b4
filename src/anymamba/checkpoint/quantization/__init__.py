"""Weights in 8 or 4 bits: the format, and rounding to it."""
