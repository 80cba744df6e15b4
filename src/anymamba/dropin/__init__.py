"""`mamba_ssm` and `causal_conv1d` for programs that import them, on any machine."""
