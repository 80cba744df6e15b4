"""The modules of a Mamba language model that one call of the native core stands in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.activations import SiLUActivation

from anymamba.layers.native import Part, mixer_parts
from anymamba.modeling.config import FalconMambaConfig, MambaConfig
from anymamba.modeling.mamba.model import MambaModel, MambaRMSNorm
from anymamba.modeling.mamba.stateful import StatefulMixer
from anymamba.modeling.quantized import QuantizedEmbedding, QuantizedLinear


def parts_of_mixer(
    config: MambaConfig, name: str, mixer: Any, mixer_class: type[StatefulMixer]
) -> Iterator[Part]:
    """Every module of a mixer, which is one of `mixer_class` where it is as the core expects it."""
    n, r = config.state_size, int(config.time_step_rank)
    settings: dict[str, object] = {"ssm_state_size": n, "time_step_rank": r}
    if isinstance(config, FalconMambaConfig):
        settings["rms_eps"] = config.mixer_rms_eps
    yield Part(name, mixer, mixer_class, settings=settings)
    if type(mixer) is not mixer_class:
        return
    yield activation(name, mixer)
    sizes = (config.hidden_size, config.intermediate_size, n, r)
    yield from mixer_parts(mixer, sizes, lambda linear: usual_class(linear, nn.Linear), f"{name}.")


def activation(name: str, mixer: Any) -> Part:
    """A mixer's activation, for which Transformers and PyTorch have a class each."""
    usual = nn.SiLU if type(mixer.act) is nn.SiLU else SiLUActivation
    return Part(f"{name}.act", mixer.act, usual)


def parts_of(
    config: MambaConfig,
    backbone: MambaModel,
    lm_head: nn.Module,
    backbone_class: type[MambaModel] = MambaModel,
    of_mixer: Callable[..., Iterator[Part]] = parts_of_mixer,
) -> Iterator[Part]:
    """Every module of the model, with the class and the sizes that the core expects of it.

    Those of its mixers are given by `of_mixer`.
    """
    block_class = backbone_class.block_class
    d, v = config.hidden_size, config.vocab_size
    embeddings = backbone.embeddings
    eps = {"variance_epsilon": getattr(backbone.norm_f, "variance_epsilon", None)}
    yield Part("lm_head", lm_head, usual_class(lm_head, nn.Linear), (v, d), may_have_bias=False)
    yield Part("backbone", backbone, backbone_class)
    table = usual_class(embeddings, nn.Embedding)
    yield Part("embeddings", embeddings, table, (v, d), settings={"max_norm": None})
    yield Part("norm_f", backbone.norm_f, MambaRMSNorm)
    for index, block in enumerate(backbone.layers):
        name = f"layers.{index}"
        yield Part(name, block, block_class)
        if type(block) is not block_class:
            return
        yield Part(f"{name}.norm", block.norm, MambaRMSNorm, settings=eps)
        yield from of_mixer(config, f"{name}.mixer", block.mixer, block_class.mixer_class)
        if type(block.mixer) is not block_class.mixer_class:
            return


def usual_class(module: nn.Module, pytorch: type[nn.Module]) -> type[nn.Module]:
    """What belongs in a place: PyTorch's class, or our own quantized one where it stands there."""
    ours = QuantizedLinear if pytorch is nn.Linear else QuantizedEmbedding
    return ours if type(module) is ours else pytorch
