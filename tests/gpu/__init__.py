"""The public surface on a GPU, held against the CPU's results."""
