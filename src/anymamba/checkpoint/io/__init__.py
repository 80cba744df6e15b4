"""Files and what is in them before anyone knows a model: paths, JSON, atomic writes, messages."""
