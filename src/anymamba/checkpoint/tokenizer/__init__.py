"""Reading a tokenizer.json, within limits, because it comes from a stranger."""
