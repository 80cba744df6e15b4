"""Writing to a terminal: output, progress, tables, sizes."""
