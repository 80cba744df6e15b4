"""Commands that read and write text with a model."""
