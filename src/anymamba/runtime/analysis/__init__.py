"""What a model does with a text: selection, step sizes, memory, loss by position."""
