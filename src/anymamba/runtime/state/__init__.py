"""What a model keeps of a text: one state, the states of a batch, and whose they are."""
