"""The parts of `anymamba info` and `anymamba models`."""
