"""What the torch layers compute, once for the model, the drop-in and distributed training."""

from anymamba.layers.convolution import convolve, convolve_step, last_inputs
from anymamba.layers.gated_norm import gated_norm
from anymamba.layers.initialization import at_least_float32, draw_step_bias, s4d_real
from anymamba.layers.mamba import MambaLayer, States
from anymamba.layers.mamba2 import HeadSizes, mix_heads

__all__ = [
    "HeadSizes",
    "MambaLayer",
    "States",
    "at_least_float32",
    "convolve",
    "convolve_step",
    "draw_step_bias",
    "gated_norm",
    "last_inputs",
    "mix_heads",
    "s4d_real",
]
