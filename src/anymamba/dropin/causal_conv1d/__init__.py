"""`causal_conv1d`, answered by AnyMamba."""
