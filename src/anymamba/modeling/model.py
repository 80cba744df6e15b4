"""The Mamba model without its head: embeddings, residual blocks, final norm.

Shapes: b batch, l length, d model width, e inner width, n state size, r rank of the step size,
k convolution width. Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752), section 3.4 and figure 3. `anymamba.minimal` is the same model in one file.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN, SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from anymamba import ops
from anymamba.errors import InputError, MissingDependencyError
from anymamba.modeling.cache import MambaCache, config_of
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.layer_state import LayerState
from anymamba.modeling.loading import FromAnyLayout
from anymamba.modeling.outputs import MambaOutput
from anymamba.modeling.packing import Layout, pack_batch
from anymamba.modeling.renaming import takes_cache_params
from anymamba.ops.backends import BACKENDS
from anymamba.ops.plain import fusable, project, why_not_plain

__all__ = [
    "MambaBlock",
    "MambaMixer",
    "MambaModel",
    "MambaPreTrainedModel",
    "MambaRMSNorm",
    "check_cache",
    "check_cache_position",
]

fusable(SiLUActivation, function="silu")


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
class MambaMixer(nn.Module):
    """The selective state space between two projections: what mixes information along time.

    Args:
        config: sizes and options.
        layer_idx: which layer of a `MambaCache` a call of the mixer itself reads and overwrites. In
            a model the place in its list of layers decides.
        initialize_mixer_weights: whether to draw initial weights; a model draws them itself.
    """

    def __init__(
        self, config: MambaConfig, layer_idx: int, initialize_mixer_weights: bool = True
    ) -> None:
        super().__init__()
        d, e, n = config.hidden_size, config.intermediate_size, config.state_size
        k, r = config.conv_kernel, int(config.time_step_rank)
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_size, self.intermediate_size = d, e
        self.ssm_state_size = n
        self.conv_kernel_size = k
        self.time_step_rank = r
        self.activation = config.hidden_act
        self.act = ACT2FN[config.hidden_act]
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.use_conv_bias)
        self.in_proj = nn.Linear(d, 2 * e, bias=config.use_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e, bias=True)
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = nn.Linear(e, d, bias=config.use_bias)
        if initialize_mixer_weights and self.A_log.device.type != "meta":
            self.init_mamba_weights()

    @torch.no_grad()
    def init_mamba_weights(self) -> None:
        """Draw the initial weights; docs/configuration.md has the table."""
        self._init_projections()
        self._init_state_space()

    def _init_projections(self) -> None:
        for layer in (self.in_proj, self.x_proj, self.out_proj, self.conv1d):
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                init.zeros_(layer.bias)
        if self.config.rescale_prenorm_residual:
            # GPT-2's rule: the variance of the residual sum must not grow with depth.
            bound = 1 / math.sqrt(self.out_proj.in_features * self.config.num_hidden_layers)
            init.uniform_(self.out_proj.weight, -bound, bound)

    def _init_state_space(self) -> None:
        """S4D-real A, D of ones, and step sizes log-uniform in [time_step_min, time_step_max]."""
        config = self.config
        rates_n = torch.arange(1, config.state_size + 1, dtype=torch.float32)
        init.copy_(self.A_log, torch.log(rates_n).expand(self.A_log.shape))
        init.ones_(self.D)
        bound = self.time_step_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, bound)
        else:
            init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        uniform_e = torch.rand(config.intermediate_size, dtype=torch.float32)
        step_e = torch.exp(uniform_e * (high - low) + low).clamp(min=config.time_step_floor)
        # The inverse of softplus: softplus(bias) = step.
        init.copy_(self.dt_proj.bias, step_e + torch.log(-torch.expm1(-step_e)))

    @takes_cache_params
    def forward(
        self,
        hidden_states: Tensor,
        cache: MambaCache | LayerState | None = None,
        attention_mask: Tensor | None = None,
        *,
        packed: Layout | None = None,
    ) -> Tensor:
        """Mix along time.

        Args:
            hidden_states: (b, l, d), or (1, t, d) where packed.
            cache: the state before the first position; overwritten with the state after
                the last. Of a whole model's cache, layer `layer_idx`.
            attention_mask: (b, l or more) of 0 and 1, as in `MambaModel.forward`.
            packed: how the row holds the batch's sequences, in place of a mask.

        Returns:
            (b, l, d) in the type of out_proj's result.

        Raises:
            InputError: the mask does not fit, or the cache has no such layer.
        """
        state = cache.layer(self.layer_idx) if isinstance(cache, MambaCache) else cache
        if attention_mask is not None:
            batch, length, _ = hidden_states.shape
            marked = pack_batch(batch, length, hidden_states.device, attention_mask)
            if marked is not None:
                return marked.unpack(self._mix(marked.pack(hidden_states), state, marked))
        return self._mix(hidden_states, state, packed)

    def _mix(
        self, hidden_states: Tensor, state: LayerState | None, packed: Layout | None
    ) -> Tensor:
        x_ble, z_ble = project(self.in_proj, hidden_states).chunk(2, dim=-1)
        x_ble = self._convolve(x_ble, state, packed)
        delta_blr, B_bln, C_bln = project(self.x_proj, x_ble).split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        delta_ble, delta_bias_e = self._step_size(delta_blr)
        y_ble = self._scan(x_ble, delta_ble, B_bln, C_bln, z_ble, delta_bias_e, state, packed)
        return project(self.out_proj, y_ble)

    def _step_size(self, delta_blr: Tensor) -> tuple[Tensor, Tensor | None]:
        """Delta, and its bias apart where the weights can be read, so that it stays float32."""
        if why_not_plain(self.dt_proj, nn.Linear) is None:
            return ops.linear(delta_blr, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(delta_blr), None

    def _convolve(self, x_ble: Tensor, state: LayerState | None, packed: Layout | None) -> Tensor:
        window = old_window = None
        if state is not None:
            old_window = _readable(state.window_bek.to(x_ble.device))
            window = old_window if packed is None else packed.states_before(old_window)
        x_conv_ble, last = self._convolution(
            x_ble, window, None if packed is None else packed.cu_seqlens
        )
        if state is not None and old_window is not None:
            new_window = last
            if packed is not None:
                new_window = packed.windows_after(old_window, x_ble, last)
            state.window_bek.copy_(new_window.detach())
        return x_conv_ble

    def _convolution(
        self, x_ble: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The convolution with its activation, and the final windows."""
        convolve = (
            self._fused_convolution
            if why_not_plain(self.conv1d, nn.Conv1d) is None
            else self._called_convolution
        )
        return convolve(x_ble, window, cu_seqlens)

    def _fused_convolution(
        self, x_ble: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        fused = "silu" if self._multiplies_by_sigmoid() else None
        x_conv_ble, last = ops.causal_conv1d(
            x_ble,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            fused,
            initial_window=window,
            return_final_window=True,
            cu_seqlens=cu_seqlens,
        )
        return (x_conv_ble if fused else self.act(x_conv_ble)), last

    def _multiplies_by_sigmoid(self) -> bool:
        """Whether the activation is SiLU, and a module that nobody has touched."""
        kind = type(self.act)
        return kind in (SiLUActivation, nn.SiLU) and why_not_plain(self.act, kind) is None

    def _called_convolution(
        self, x_ble: Tensor, window: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same through the module's forward, for whatever stands in the convolution's place."""
        k = self.config.conv_kernel
        if cu_seqlens is None:
            pieces = [x_ble]
        else:
            pieces = list(x_ble.split(cu_seqlens.diff().tolist(), dim=1))
        outputs, windows = [], []
        for index, piece_ble in enumerate(pieces):
            before = x_ble.new_zeros(piece_ble.shape[0], x_ble.shape[2], k)
            if window is not None:
                before = (window if cu_seqlens is None else window[index, None]).to(x_ble.dtype)
            inputs_bel = torch.cat([before, piece_ble.transpose(1, 2)], 2)
            result_bel = self.conv1d(inputs_bel)[:, :, k : k + piece_ble.shape[1]]
            outputs.append(self.act(result_bel).transpose(1, 2))
            windows.append(inputs_bel[:, :, inputs_bel.shape[2] - k :])
        last = torch.cat(windows) if windows else x_ble.new_zeros(0, x_ble.shape[2], k)
        return (torch.cat(outputs, 1) if outputs else x_ble), last

    def _scan(
        self,
        x_ble: Tensor,
        delta_ble: Tensor,
        B_bln: Tensor,
        C_bln: Tensor,
        z_ble: Tensor,
        delta_bias_e: Tensor | None,
        state: LayerState | None,
        packed: Layout | None,
    ) -> Tensor:
        initial = old_state = None
        if state is not None:
            old_state = _readable(state.state_ben.to(x_ble.device))
            initial = old_state if packed is None else packed.states_before(old_state)
        y_ble, last = ops.selective_scan(
            x_ble,
            delta_ble if packed is None else packed.steps(delta_ble),
            -torch.exp(self.A_log.float()),
            B_bln,
            C_bln,
            self.D,
            z_ble,
            delta_bias_e,
            delta_softplus=True,
            initial_state=initial,
            return_last_state=True,
            cu_seqlens=None if packed is None else packed.cu_seqlens,
            fallback="mambapy" if self.config.use_mambapy else "reference",
        )
        if state is not None and old_state is not None:
            new_state = last if packed is None else packed.states_after(old_state, last)
            state.state_ben.copy_(new_state.detach())
        return y_ble


def _readable(state: Tensor) -> Tensor:
    """A state as an input: its own copy where autograd keeps it, for the cache is overwritten."""
    return state.clone() if torch.is_grad_enabled() else state


@fusable
class MambaBlock(GradientCheckpointingLayer):
    """hidden + mixer(norm(hidden)), the residual block.

    Args:
        config, layer_idx, initialize_mixer_weights: as for `MambaMixer`.
    """

    def __init__(
        self, config: MambaConfig, layer_idx: int, *, initialize_mixer_weights: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer_idx, initialize_mixer_weights)

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

    config_class = MambaConfig
    config: MambaConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["MambaBlock", "MambaMixer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give a module its initial weights; docs/configuration.md has the table."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MambaMixer):
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

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        # It is what runs where no kernel does, and so is not asked for where one is there.
        kernels = any(BACKENDS[name].missing() is None for name in ("cpu", "cuda"))
        if config.use_mambapy and not kernels and (reason := BACKENDS["mambapy"].missing()):
            raise MissingDependencyError(f"the config has use_mambapy=True, but {reason}")
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [
                MambaBlock(config, layer_idx, initialize_mixer_weights=False)
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
        self.gradient_checkpointing = False
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding layer."""
        return self.embeddings

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
            cache.token_counts += _tokens_a_row(batch, length, packed).to(cache.token_counts)
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
    config, backbone = model.config, cast(MambaModel, model.base_model)
    layers = len(backbone.layers)
    expected = (layers, batch, config.intermediate_size, config.state_size)
    if tuple(cache.ssm_states.shape) != expected:
        raise InputError(
            f"cache holds states of shape {tuple(cache.ssm_states.shape)}, this model and "
            f"batch need {expected} (layers, batch, inner width, state size)"
            + _stale_layers(config.num_hidden_layers, layers)
        )
    if cache.conv_states.shape[-1] != config.conv_kernel:
        raise InputError(
            f"cache holds convolution windows of width {cache.conv_states.shape[-1]}, this "
            f"model's are {config.conv_kernel} wide"
        )


def _stale_layers(told: int, layers: int) -> str:
    if told == layers:
        return ""
    return (
        f"; its config tells of {told} layers: make the cache with MambaCache.for_model(model), or "
        f"set model.config.num_hidden_layers = {layers} first"
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


def _tokens_a_row(batch: int, length: int, packed: Layout | None) -> Tensor:
    if packed is None:
        return torch.full((batch,), length, device="cpu")
    return packed.counts_b
