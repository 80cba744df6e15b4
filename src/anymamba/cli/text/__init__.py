"""Reading a user's texts: files, prompts, passages."""
