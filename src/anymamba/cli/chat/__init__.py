"""The conversation behind `anymamba chat`."""
