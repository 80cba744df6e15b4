"""OpenAI's interface: models, completions and chat completions."""
