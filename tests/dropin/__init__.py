"""Tests of the drop-in for `mamba_ssm` and `causal_conv1d`."""
