"""What all forms of conversations have in common: the prompt, tools, and answers as they come."""
