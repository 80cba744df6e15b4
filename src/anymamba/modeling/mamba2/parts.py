"""The modules of a Mamba-2 mixer that the native core stands in for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from anymamba.layers.native import Part
from anymamba.modeling.mamba.parts import activation, usual_class
from anymamba.modeling.mamba.stateful import StatefulMixer
from anymamba.modeling.mamba2.mixer import MambaRMSNormGated


def parts_of_mixer(
    config: Any, name: str, mixer: Any, mixer_class: type[StatefulMixer]
) -> Iterator[Part]:
    """As `anymamba.modeling.mamba.parts.parts_of_mixer`."""
    d, e, channels = config.hidden_size, config.intermediate_size, config.conv_channels
    settings = {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "n_groups": config.n_groups,
        "ssm_state_size": config.state_size,
        "time_step_limit": config.time_step_limit,
    }
    yield Part(name, mixer, mixer_class, settings=settings)
    if type(mixer) is not mixer_class:
        return
    yield activation(name, mixer)
    yield Part(f"{name}.conv1d", mixer.conv1d, nn.Conv1d)
    if config.use_gated_norm:
        norm = {
            "variance_epsilon": config.layer_norm_epsilon,
            "group_size": e // config.n_groups,
            "norm_before_gate": config.gate_after_norm,
        }
        yield Part(f"{name}.norm", mixer.norm, MambaRMSNormGated, settings=norm)
    for linear, shape in (("in_proj", (e + channels + config.num_heads, d)), ("out_proj", (d, e))):
        module = getattr(mixer, linear)
        yield Part(f"{name}.{linear}", module, usual_class(module, nn.Linear), shape)
