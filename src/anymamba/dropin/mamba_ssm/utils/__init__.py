"""Generation, and reading models from the hub."""
