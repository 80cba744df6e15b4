"""The example scripts."""
