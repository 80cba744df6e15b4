"""The Mamba model without its head: embeddings, residual blocks, final norm.

Shapes: b batch, l length, d model width, e inner width, n state size, r rank of the step size,
k convolution width. Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752), section 3.4 and figure 3. `anymamba.minimal` is the same model in one file.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from anymamba import ops
from anymamba.checkpoint.state_file import state_shapes
from anymamba.errors import InputError, MissingDependencyError
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.config import MambaConfig, StateSpaceConfig
from anymamba.modeling.loading import FromAnyLayout
from anymamba.modeling.mamba.mixer import MambaMixer
from anymamba.modeling.mamba.outputs import MambaOutput
from anymamba.modeling.mamba.stateful import StatefulMixer
from anymamba.modeling.packing import Layout, pack_batch
from anymamba.modeling.renaming import takes_cache_params
from anymamba.modeling.state import LayerState, config_of, model_identity
from anymamba.ops.backends import BACKENDS
from anymamba.ops.fusable import fusable
from anymamba.ops.triton import is_interpreted


@fusable
class MambaRMSNorm(nn.Module):
    """RMSNorm with a learned gain, computed in float32.

    Args:
        hidden_size: d.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) to (..., d), in the type of the weight."""
        normed = ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        assert isinstance(normed, Tensor)
        return normed

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


@fusable
class MambaBlock(GradientCheckpointingLayer):
    """hidden + mixer(norm(hidden)), the residual block.

    Args:
        config, layer_idx, initialize_mixer_weights: as for `MambaMixer`.
    """

    mixer_class: type[StatefulMixer] = MambaMixer

    def __init__(
        self, config: MambaConfig, layer_idx: int, *, initialize_mixer_weights: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.mixer_class(config, layer_idx, initialize_mixer_weights)

    @takes_cache_params
    def forward(
        self,
        hidden_states: Tensor,
        cache: MambaCache | LayerState | None = None,
        attention_mask: Tensor | None = None,
        *,
        packed: Layout | None = None,
    ) -> Tensor:
        """(b, l, d) to (b, l, d); arguments as in `MambaMixer.forward`."""
        residual = hidden_states
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        mixed: Tensor = self.mixer(
            self.norm(hidden_states), cache=cache, attention_mask=attention_mask, packed=packed
        )
        return residual + mixed.to(residual.dtype)


class MambaPreTrainedModel(FromAnyLayout, PreTrainedModel):
    """What all Mamba models share: loading from any layout, and how weights start."""

    config_class: type[StateSpaceConfig] = MambaConfig
    config: MambaConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["MambaBlock", "MambaMixer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _is_stateful = True
    _input_embed_layer = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give a module its initial weights; docs/configuration.md has the table."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, StatefulMixer):
            module.init_mamba_weights()
        elif isinstance(module, nn.Linear) and module is getattr(self, "lm_head", None):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


@fusable
class MambaModel(MambaPreTrainedModel):
    """Embeddings, the stack of Mamba blocks and the final norm.

    Args:
        config: what to build.

    Raises:
        MissingDependencyError: the config asks for mambapy, and neither it nor a kernel is there.

    Example:
        >>> import torch
        >>> from anymamba import MambaConfig, MambaModel
        >>> model = MambaModel(MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2))
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    block_class: type[MambaBlock] = MambaBlock

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        # It is what runs where no kernel does, and so is not asked for where one is there.
        names = ("cpu", "mamba_ssm") if is_interpreted() else ("cpu", "mamba_ssm", "triton")
        kernels = any(BACKENDS[name].missing() is None for name in names)
        if (
            getattr(config, "use_mambapy", False)
            and not kernels
            and (reason := BACKENDS["mambapy"].missing())
        ):
            raise MissingDependencyError(f"the config has use_mambapy=True, but {reason}")
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [
                self.block_class(config, layer_idx, initialize_mixer_weights=False)
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
        self.gradient_checkpointing = False
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another embedding layer in place."""
        self.embeddings = new_embeddings  # type: ignore[assignment]

    @takes_cache_params
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: MambaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        *,
        cache_position: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MambaOutput | tuple[Any, ...]:
        """Run the model over the positions given, from the state given.

        Args:
            input_ids: (b, l) token ids; or give inputs_embeds.
            inputs_embeds: (b, l, d) instead of input_ids.
            cache: the state after what came before; the ids are then the new tokens only.
                It is overwritten with the state after the last position.
            use_cache: whether to return the state; a fresh one is made where none is given.
            output_hidden_states: whether to return the embeddings' and each layer's output.
            return_dict: whether to return an object rather than a tuple.
            attention_mask: (b, l or more) of 0 and 1, of which the last l columns count. A masked
                position counts as deleted, wherever it stands; its outputs are zero.
            cache_position: accepted for Transformers' sake, and checked; the state knows where
                it stands.
            seq_idx: (b, l); packed documents, which do not see each other, end where it changes.
            cu_seq_lens_q: (s + 1,) offsets of packed documents, for a batch of one row.
            position_ids: (b, l); packed documents begin where it falls back, as padding-free
                collators write it.
            **kwargs: ignored, for Trainers and pipelines pass more than a model asks for; but what
                asks for attention's keys, values or weights is refused.

        Returns:
            A `MambaOutput`.

        Raises:
            InputError: an argument has the wrong shape, or two exclude each other.
        """
        check_no_attention(kwargs, cache)
        hidden_states = self._embed(input_ids, inputs_embeds)
        batch, length, _ = hidden_states.shape
        cache, returned = self._open_cache(cache, use_cache, hidden_states)
        check_cache_position(cache_position)
        packed = pack_batch(
            batch,
            length,
            hidden_states.device,
            attention_mask,
            seq_idx,
            cu_seq_lens_q,
            position_ids,
        )
        if packed is not None:
            hidden_states = packed.pack(hidden_states)
        want_all = self.config.output_hidden_states
        if output_hidden_states is not None:
            want_all = output_hidden_states
        all_hidden = [hidden_states] if want_all else []
        for place, layer in enumerate(self.layers):
            state = None if cache is None else cache.layer(place)
            hidden_states = layer(hidden_states, cache=state, packed=packed)
            if want_all:
                all_hidden.append(hidden_states)
        hidden_states = self.norm_f(hidden_states)
        if packed is not None:
            hidden_states = packed.unpack(hidden_states)
            all_hidden = [packed.unpack(hidden) for hidden in all_hidden]
        if cache is not None:
            # Where all rows have read the same, nothing is copied to the state's device.
            cache.token_counts += (
                length if packed is None else packed.counts_b.to(cache.token_counts)
            )
        output = MambaOutput(
            last_hidden_state=hidden_states,
            cache=cache if returned else None,
            hidden_states=tuple(all_hidden) if want_all else None,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
                raise InputError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected "
                    f"(batch, length, {self.config.hidden_size})"
                )
            return inputs_embeds
        assert input_ids is not None
        if input_ids.ndim != 2:
            raise InputError(
                f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, length)"
            )
        embedded: Tensor = self.embeddings(input_ids)
        return embedded

    def _open_cache(
        self, cache: MambaCache | None, use_cache: bool | None, hidden_states: Tensor
    ) -> tuple[MambaCache | None, bool]:
        """The cache to run on, and whether the caller gets it back."""
        checkpointing = self.gradient_checkpointing and self.training
        if cache is not None:
            check_cache(cache, self, hidden_states.shape[0])
            if checkpointing:
                raise InputError(
                    "gradient checkpointing computes each layer twice and would advance "
                    "the cache twice: train without a cache, or without checkpointing"
                )
            return cache, use_cache is not False
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache or checkpointing:
            return None, False
        # float32 keeps the window of float64 inputs, which only tests use, too narrow: keep theirs.
        dtype = hidden_states.dtype
        cache = MambaCache(config_of(self), hidden_states.shape[0], dtype, hidden_states.device)
        return cache, True


_OF_ATTENTION = ("past_key_values", "output_attentions", "head_mask")


def check_no_attention(given: dict[str, Any], cache: MambaCache | None) -> None:
    """Refuse arguments that only attention can follow, and that would otherwise change nothing.

    Args:
        given: keyword arguments that a model does not declare.
        cache: the state, which may be given once more by the name of attention's.

    Raises:
        InputError: naming the argument.
    """
    for name in _OF_ATTENTION:
        value = given.get(name)
        if value is None or value is False or value is cache:
            continue
        raise InputError(
            f"{name}: a Mamba model has no attention, so it has no keys, values or attention "
            "weights; its state is the argument cache. Prefix tuning needs keys and values: use "
            "prompt tuning or LoRA"
        )


def check_cache(cache: object, model: MambaPreTrainedModel, batch: int) -> None:
    """Refuse what is no cache, or not one of this model and batch.

    Raises:
        InputError: naming what was found and what is needed.
    """
    if not isinstance(cache, MambaCache):
        raise InputError(
            f"cache is a {type(cache).__name__}, expected an anymamba.MambaCache: "
            "make one with MambaCache.for_model(model, batch_size)"
        )
    config, layers = model.config, len(cast(MambaModel, model.base_model).layers)
    stale = ""
    if layers != config.num_hidden_layers:
        stale = (
            f"; its config tells of {config.num_hidden_layers} layers: make the cache with "
            f"MambaCache.for_model(model), or set model.config.num_hidden_layers = {layers} first"
        )
    window, state = state_shapes(model_identity(config))
    expected = (layers, batch, *state)
    if tuple(cache.ssm_states.shape) != expected:
        raise InputError(
            f"cache holds states of shape {tuple(cache.ssm_states.shape)}, this model and "
            f"batch need {expected} (layers, batch, and the shape of a layer's state){stale}"
        )
    if cache.conv_states.shape[-1] != window[-1]:
        raise InputError(
            f"cache holds convolution windows of width {cache.conv_states.shape[-1]}, this "
            f"model's are {window[-1]} wide"
        )


def check_cache_position(cache_position: Tensor | None) -> None:
    """Refuse what is no row of positions; None passes.

    Raises:
        InputError: naming the shape and type found.
    """
    if cache_position is None:
        return
    if cache_position.ndim != 1 or cache_position.is_floating_point():
        raise InputError(
            f"cache_position has shape {tuple(cache_position.shape)} of {cache_position.dtype}, "
            "expected a row of integers"
        )
