"""The commands, one module each with a dataclass `Options` and a function `run(options)`."""
