"""A model's weights as the core reads them, in the type that was asked for."""
