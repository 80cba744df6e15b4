"""Padding and packing of texts in a batch, as segments that do not see each other."""
