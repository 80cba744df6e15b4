"""The implementations that are compared, all on the same weights behind one interface."""
