"""Training: from texts to a model, on `transformers.Trainer`.

Nothing is imported here, so that the command line can read settings without torch.
"""
