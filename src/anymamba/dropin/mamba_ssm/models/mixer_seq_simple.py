"""Language models of Mamba, Mamba-2 and attention, as `mamba_ssm.models.mixer_seq_simple` has them.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
section 3.4; hybrid models from "Transformers are SSMs" (arXiv 2405.21060), section 9.2.3.
"""

from __future__ import annotations

import json
import math
import os
from collections import namedtuple
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from anymamba.checkpoint import write_atomically
from anymamba.checkpoint.io import listed, shown
from anymamba.dropin.forks import explained
from anymamba.dropin.mamba_ssm.models.config_mamba import MambaConfig
from anymamba.dropin.mamba_ssm.modules.block import Block, add_norm
from anymamba.dropin.mamba_ssm.modules.mamba2 import Mamba2
from anymamba.dropin.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.dropin.mamba_ssm.modules.mha import MHA
from anymamba.dropin.mamba_ssm.modules.mlp import GatedMLP
from anymamba.dropin.mamba_ssm.ops.triton.layer_norm import RMSNorm
from anymamba.dropin.mamba_ssm.ops.triton.layer_norm import layer_norm_fn as layer_norm_fn
from anymamba.dropin.mamba_ssm.ops.triton.layer_norm import rms_norm_fn as rms_norm_fn
from anymamba.dropin.mamba_ssm.utils.generation import GenerationMixin
from anymamba.dropin.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from anymamba.errors import CheckpointError, ConfigError
from anymamba.ops.fusable import project

__all__ = ["MambaLMHeadModel", "MixerModel", "create_block"]

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])
MIXERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}


@explained
def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Make one block of a model.

    Args:
        d_model ... fused_add_norm: as in `MambaConfig`.
        norm_epsilon: of the norms.
        layer_idx: which block it is; decides whether it has attention.
        device, dtype: of the weights.

    Returns:
        The block.

    Raises:
        ConfigError: ssm_cfg names an unknown layer.

    Example:
        >>> create_block(16, 0, {"layer": "Mamba1", "d_state": 4}, layer_idx=0).mixer.d_state
        4
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    settings = dict(ssm_cfg or {})
    layer = settings.pop("layer", "Mamba1")
    mixer: type[nn.Module]
    if layer_idx in (attn_layer_idx or []):
        mixer, settings = MHA, attn_cfg or {}
    elif layer in MIXERS:
        mixer = MIXERS[layer]
    else:
        raise ConfigError(f"ssm_cfg's layer is {shown(layer)}, expected 'Mamba1' or 'Mamba2'")
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model,
        partial(mixer, layer_idx=layer_idx, **settings, **factory),
        mlp,
        norm_cls=partial(_norm_class(rms_norm), eps=norm_epsilon, **factory),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _norm_class(rms_norm: bool) -> type[nn.Module]:
    return RMSNorm if rms_norm else nn.LayerNorm


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Start a module's weights; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, weight in module.named_parameters():
        # The residual is a sum of this many; drawn anew, so that a second call scales only once.
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            with torch.no_grad():
                weight.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embeddings, blocks and a last norm.

    Args:
        d_model ... residual_in_fp32: as in `MambaConfig` and `create_block`.
        initializer_cfg: other arguments of the initialization: initializer_range,
            rescale_prenorm_residual, n_residuals_per_layer.
        device, dtype: of the weights.

    Raises:
        ConfigError: ssm_cfg names an unknown layer.

    Example:
        >>> model = MixerModel(16, n_layer=2, d_intermediate=0, vocab_size=10)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
    """

    @explained
    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        mixers = (ssm_cfg, attn_layer_idx, attn_cfg)
        shared = (*mixers, norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm)
        self.layers = nn.ModuleList(
            create_block(d_model, d_intermediate, *shared, layer_idx, **factory)
            for layer_idx in range(n_layer)
        )
        self.norm_f = _norm_class(rms_norm)(d_model, eps=norm_epsilon, **factory)
        settings = {"n_residuals_per_layer": 2 if d_intermediate else 1} | (initializer_cfg or {})
        self.apply(partial(_init_weights, n_layer=n_layer, **settings))

    def forward(
        self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any
    ) -> Tensor:
        """Run the model over token ids.

        Args:
            input_ids: (b, l).
            inference_params, mixer_kwargs: passed on to the mixers.

        Returns:
            (b, l, d).
        """
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        return add_norm(self, self.norm_f, hidden_states, residual)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Each mixer's states for a generation, by layer; see the mixers."""
        layers: Any = enumerate(self.layers)
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in layers
        }


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: `MixerModel` and a head.

    Args:
        config: its settings.
        initializer_cfg: as in `MixerModel`.
        device, dtype: of the weights.

    Raises:
        ConfigError: ssm_cfg names an unknown layer.

    Example:
        >>> config = MambaConfig(d_model=16, n_layer=2, vocab_size=10, ssm_cfg={"d_state": 4})
        >>> model = MambaLMHeadModel(config)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 16])
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_length=5).shape
        torch.Size([1, 5])
    """

    @explained
    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        vocab_size = config.vocab_size + -config.vocab_size % config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        # A second time, over head and backbone, as in the original: one seed, the same weights.
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding table, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Each mixer's states for a generation, by layer; see the mixers."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Any:
        """Predict the next token at each position.

        Args:
            input_ids: (b, l).
            position_ids: not used; a state space knows the order.
            inference_params: the cache of a generation; changed in place.
            num_last_tokens: if more than 0, only the last positions get logits.
            mixer_kwargs: passed on to the mixers.

        Returns:
            A named tuple with `logits`, (b, l, v), v the padded size of the vocabulary.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=project(self.lm_head, hidden_states))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model in the original's layout.

        Args:
            pretrained_model_name: a local folder, or a hub id such as `state-spaces/mamba-130m`.
                Weights are read from safetensors or torch's pickles, and nothing in them is run.
            device, dtype: of the weights.
            kwargs: passed on to the constructor.

        Returns:
            The model, in training mode, as the original leaves it.

        Raises:
            CheckpointError: files are missing or broken, or do not fit together; or the model is in
                Transformers' layout.
            HubError: the model cannot be had from the hub.
        """
        config = _config_of(load_config_hf(pretrained_model_name), str(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name)
        if config.tie_embeddings and "backbone.embedding.weight" in weights:
            # safetensors holds a shared table once.
            weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {str(pretrained_model_name)!r} do not fit its config: {error}"
            ) from error
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the model in the original's layout: config.json and pytorch_model.bin.

        Args:
            save_directory: the folder, made if it is not there.

        Raises:
            CheckpointError: the folder cannot be written to.

        Example:
            >>> import tempfile
            >>> folder = tempfile.mkdtemp()
            >>> config = MambaConfig(d_model=16, n_layer=1, vocab_size=9)
            >>> MambaLMHeadModel(config).save_pretrained(folder)
            >>> MambaLMHeadModel.from_pretrained(folder).config.vocab_size
            9
        """
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {str(folder)!r}: {error}") from error
        config = json.dumps(vars(self.config), indent=4)
        write_atomically(
            folder / "pytorch_model.bin", lambda path: torch.save(self.state_dict(), path)
        )
        write_atomically(folder / "config.json", lambda path: path.write_text(config))


def _config_of(stored: dict[str, Any], where: str) -> MambaConfig:
    """The settings in a config.json of the original's layout."""
    unknown = sorted(stored.keys() - {field.name for field in fields(MambaConfig)})
    if "model_type" in stored:
        raise CheckpointError(
            f"{where!r} is in Transformers' layout (model_type {shown(stored['model_type'])}); "
            "load it with anymamba.MambaForCausalLM or transformers.AutoModelForCausalLM"
        )
    if unknown:
        raise CheckpointError(
            f"config.json of {where!r} has {listed(map(shown, unknown))}, which no model of the "
            "original's layout has"
        )
    return MambaConfig(**stored)
