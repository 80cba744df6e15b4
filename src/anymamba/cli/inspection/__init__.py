"""What `anymamba inspect` writes: a result, a figure, a page."""
