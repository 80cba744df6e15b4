"""`mamba_ssm`, answered by AnyMamba."""
