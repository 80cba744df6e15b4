"""The Mamba language model: the model with a head over the vocabulary, and generation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateNonBeamOutput
from transformers.utils import logging

from anymamba.errors import InputError
from anymamba.layers.native import Part
from anymamba.modeling import fused
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.generation import (
    NativeLoop,
    captured_steps,
    is_captured,
    records_methods,
    why_not_direct,
    why_not_graph,
    why_not_loop,
)
from anymamba.modeling.mamba.model import (
    MambaModel,
    MambaPreTrainedModel,
    check_cache,
    check_cache_position,
    check_no_attention,
)
from anymamba.modeling.mamba.outputs import MambaCausalLMOutput
from anymamba.modeling.mamba.parts import parts_of
from anymamba.modeling.packing import at_kept, check_kept, check_mask, targets_of
from anymamba.modeling.renaming import takes_cache_params
from anymamba.ops.fusable import project
from anymamba.ops.tracing import values_are_known

logger = logging.get_logger(__name__)


class _Inputs(NamedTuple):
    """What `forward` reads, and from which state."""

    input_ids: Tensor | None
    attention_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cache: MambaCache | None = None
    cache_position: Tensor | None = None
    use_cache: bool | None = None


@records_methods
class MambaForCausalLM(MambaPreTrainedModel, GenerationMixin):
    """Mamba with a language model's head, whose weight is the embeddings' where they are tied.

    Args:
        config: what to build.

    Raises:
        MissingDependencyError: the config asks for mambapy, and neither it nor a kernel is there.

    Example:
        >>> import torch
        >>> from anymamba import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(
        ...     MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2)
        ... )
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 256])
    """

    backbone_class: type[MambaModel] = MambaModel
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another embedding layer in place."""
        self.backbone.set_input_embeddings(new_embeddings)

    def fused_parts(self) -> Iterator[Part]:
        """The modules that one call of the native core stands in for."""
        return parts_of(self.config, self.backbone, self.lm_head, self.backbone_class)

    @takes_cache_params
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: MambaCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache_position: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MambaCausalLMOutput | tuple[Any, ...]:
        """Predict the next token at each position.

        Args:
            labels: (b, l) token ids, usually the input_ids; they are shifted inside, between the
                positions that the mask keeps and never across packed documents. -100 is ignored.
            logits_to_keep: how many of the last positions get logits, 0 for all of them; or which:
                indices (m,) for every row or (b, m) for each, or booleans (b, l), whose logits
                (positions, v) have no rows. Labels then count at those positions alone.
            **kwargs: `shift_labels`, (b, l), what each position should predict: labels that were
                shifted already. They come before `labels`; what the mask deletes predicts nothing.
                Also what the loss understands (`num_items_in_batch`). The rest is ignored, except
                what asks for attention's keys, values or weights, which is refused.
            input_ids, attention_mask, inputs_embeds, cache, cache_position: as in
                `MambaModel.forward`.
            output_hidden_states, return_dict, use_cache: as in `MambaModel.forward`.
            seq_idx, cu_seq_lens_q, position_ids: as in `MambaModel.forward`.

        Returns:
            A `MambaCausalLMOutput`, logits in float32.

        Raises:
            InputError: an argument has the wrong shape, or two exclude each other.
        """
        # No argument of its own: Trainer would expect it in every batch, beside the labels.
        shift_labels = kwargs.pop("shift_labels", None)
        marks = (attention_mask, seq_idx, cu_seq_lens_q, position_ids)
        inputs = _Inputs(input_ids, attention_mask, inputs_embeds, cache, cache_position, use_cache)
        check_no_attention(kwargs, cache)
        check_kept(logits_to_keep)
        without_loss = labels is None and shift_labels is None
        only_logits = without_loss and all(mark is None for mark in marks[1:])
        if output_hidden_states or self.config.output_hidden_states or torch.is_grad_enabled():
            only_logits = False
        output = self._fused(logits_to_keep, inputs) if only_logits else None
        if output is None and only_logits and isinstance(logits_to_keep, int) and logits_to_keep:
            output = self._walk(logits_to_keep, inputs)
        if output is None:
            outputs = self.backbone(
                **inputs._asdict(),
                output_hidden_states=output_hidden_states,
                return_dict=True,
                seq_idx=seq_idx,
                cu_seq_lens_q=cu_seq_lens_q,
                position_ids=position_ids,
            )
            hidden_states = outputs.last_hidden_state
            logits = self._logits(at_kept(hidden_states, logits_to_keep))
            loss = None
            if not without_loss:
                targets = targets_of(labels, shift_labels, hidden_states.shape[:2], marks)
                loss = self._loss(logits, at_kept(targets[..., None], logits_to_keep), kwargs)
            output = MambaCausalLMOutput(loss, logits, outputs.cache, outputs.hidden_states)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _logits(self, hidden_states: Tensor) -> Tensor:
        weight = getattr(self.lm_head, "weight", None)
        if isinstance(weight, Tensor):  # a quantized head has none and takes any type
            hidden_states = hidden_states.to(weight.dtype)
        return project(self.lm_head, hidden_states).float()

    def _fused(self, logits_to_keep: int | Tensor, inputs: _Inputs) -> MambaCausalLMOutput | None:
        """The whole model in single calls of the native core, where that can be right."""
        input_ids, attention_mask, inputs_embeds, *_ = inputs
        if input_ids is None or inputs_embeds is not None or not isinstance(logits_to_keep, int):
            return None
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            return None
        table = fused.table_of(self, input_ids)
        if table is None:
            return None
        batch, length = input_ids.shape
        if attention_mask is not None:
            check_mask(batch, length, attention_mask)
            if not bool(attention_mask[:, -length:].all()):
                return None
        cache, kept = self._cache_for(inputs, batch, input_ids.device)
        check_cache_position(inputs.cache_position)
        if not fused.fits(cache):
            return None
        logits = table.run(input_ids, cache, min(logits_to_keep or length, length))
        cache.token_counts += length
        return MambaCausalLMOutput(logits=logits, cache=cache if kept else None)

    def _cache_for(
        self, inputs: _Inputs, batch: int, device: torch.device
    ) -> tuple[MambaCache, bool]:
        """The state to read on with, and whether the caller gets it back."""
        cache, use_cache = inputs.cache, inputs.use_cache
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is None:
            return MambaCache.for_model(self, batch, device=device), use_cache
        check_cache(cache, self, batch)
        return cache, use_cache

    def _walk(self, logits_to_keep: int, inputs: _Inputs) -> MambaCausalLMOutput | None:
        """A long prompt in chunks, so that memory does not grow with what gets no logits."""
        input_ids, attention_mask, inputs_embeds, *_ = inputs
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.ndim < 2 or (input_ids is None) == (inputs_embeds is None):
            return None
        if not values_are_known(given):  # a graph is made for one length, or for all of them
            return None
        batch, length = given.shape[:2]
        on_cpu = given.device.type == "cpu"
        tokens = fused.CHUNK_TOKENS if on_cpu else fused.CHUNK_TOKENS_ON_GPUS
        columns = max(tokens // max(batch, 1), 1)
        if length <= columns:
            return None
        cache, kept = self._cache_for(inputs, batch, given.device)
        mask = None
        if attention_mask is not None:
            check_mask(batch, length, attention_mask)
            mask = attention_mask[:, attention_mask.shape[1] - length :]
        hidden = []
        for start in range(0, length, columns):
            now = slice(start, start + columns)
            outputs = self.backbone(
                input_ids=None if input_ids is None else input_ids[:, now],
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, now],
                attention_mask=None if mask is None else mask[:, now],
                cache=cache,
                cache_position=inputs.cache_position,
            )
            beyond = start + columns - (length - logits_to_keep)
            if beyond > 0:
                hidden.append(outputs.last_hidden_state[:, -beyond:])
        logits = self._logits(torch.cat(hidden, 1)[:, -logits_to_keep:])
        return MambaCausalLMOutput(logits=logits, cache=cache if kept else None)

    def _loss(self, logits: Tensor, targets: Tensor, kwargs: dict[str, Any]) -> Tensor:
        loss: Tensor = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets.contiguous(),
            vocab_size=logits.shape[-1],
            **kwargs,
        )
        return loss

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` a `MambaCache`, where Transformers would make a DynamicCache."""
        if generation_config.cache_implementation is not None:
            logger.warning_once(
                "A Mamba state has one form: cache_implementation="
                f"{generation_config.cache_implementation!r} changes nothing."
            )
        if generation_config.use_cache is None:
            # Transformers' loops would read the whole text at each step, on top of the state.
            generation_config.use_cache = True
        given = model_kwargs.get("cache")
        if isinstance(given, MambaCache):
            # On mps, Transformers runs one step too many on a state that nobody will see again.
            given._is_user_defined = True  # type: ignore[attr-defined]
        elif given is None and generation_config.use_cache is not False:
            copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            # Where all weights are offloaded, the model's first call makes a state where it runs.
            if self.device.type != "meta":
                model_kwargs["cache"] = MambaCache.for_model(self, batch_size * copies)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompt of `generate` in one call, which cuts long ones itself.

        Transformers would cut at `prefill_chunk_size`, where a row may have masked positions alone.
        """
        if generation_config.prefill_chunk_size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _sample(  # type: ignore[override]
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateNonBeamOutput | Tensor:
        """The loop of greedy and sampled `generate`: ours, or Transformers' where needed."""
        reason = why_not_loop(self, generation_config, synced_gpus, model_kwargs)
        if input_ids.device != self.device:
            reason = f"input_ids is on {input_ids.device}"
        if reason is None:
            loop = NativeLoop(
                self, self._steps, logits_processor, stopping_criteria, generation_config, streamer
            )
            return loop.run(input_ids, model_kwargs)
        logger.info(f"generate runs Transformers' loop: {reason}")
        parent: Any = super()
        written: GenerateNonBeamOutput | Tensor = parent._sample(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )
        return written

    def _valid_auto_compile_criteria(
        self, model_kwargs: dict[str, Any], generation_config: GenerationConfig
    ) -> bool:
        """Whether `generate` compiles a step, which Transformers would on every GPU.

        Where a captured graph serves, only if `compile_config` asks for it.
        """
        if is_captured(self) and generation_config.compile_config is None:
            reason = why_not_direct(self) or why_not_graph(self)
            if reason is None:
                return False
        parent: Any = super()
        return bool(parent._valid_auto_compile_criteria(model_kwargs, generation_config))

    def _steps(self, cache: MambaCache) -> AbstractContextManager[Any]:
        """The step that goes on from a state, for as long as a generation lasts."""

        def step(tokens_b1: Tensor) -> Tensor:
            return self._step(tokens_b1, cache)

        return captured_steps(self, cache, step) if is_captured(self) else nullcontext(step)

    def _step(self, tokens_b1: Tensor, cache: MambaCache) -> Tensor:
        """(b, v) logits of a token a row; the state advances."""
        output: Any = None
        if why_not_direct(self) is None:
            output = self._fused(1, _Inputs(tokens_b1, cache=cache, use_cache=True))
        if output is None:  # something has changed since generation began
            output = self(tokens_b1, cache=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the state with the rows, for beams and several returned sequences.

        A state that the caller passed in is copied first, so that it keeps its batch.
        """
        if input_ids is not None and not input_ids.shape[1] and "inputs_embeds" not in model_kwargs:
            raise InputError("input_ids is empty: generate needs at least one token to go on from")
        cache = model_kwargs.get("cache")
        if cache is not None and expand_size > 1:
            cache = cache.clone()
            cache.batch_repeat_interleave(expand_size)
            model_kwargs["cache"] = cache
        # Transformers annotates `self` there with a protocol of its own.
        parent: Any = super()
        expanded: tuple[Tensor, dict[str, Any]] = parent._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return expanded

    @takes_cache_params
    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: MambaCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one step of `generate`.

        At the first step masked positions move to the front of their row, where deleting them
        leaves each row's last token in the last column, which `generate` continues from.
        """
        if is_first_iteration and attention_mask is not None:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            attention_mask = attention_mask[:, attention_mask.shape[1] - length :]
        # Long prompts rarely have a mask that says anything: spare them the copies.
        if is_first_iteration and attention_mask is not None and not bool(attention_mask.all()):
            order = _masked_first(attention_mask)
            attention_mask = attention_mask.gather(1, order)
            if inputs_embeds is not None:
                inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
            else:
                input_ids = input_ids.gather(1, order)
        parent: Any = super()
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            attention_mask=attention_mask,
            cache=cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # They count tokens here and do not mark packed documents.
        inputs.pop("position_ids", None)
        if cache is not None and not is_first_iteration:
            inputs.pop("attention_mask", None)
            # PEFT's prompt tuning looks here whether its tokens were read; else it adds them again.
            inputs["past_key_values"] = cache
        return inputs


def _masked_first(attention_mask: Tensor) -> Tensor:
    """(b, l) indices that put each row's masked positions first and keep the others' order."""
    if bool((attention_mask == 0).all(1).any()):
        rows = torch.nonzero((attention_mask == 0).all(1)).flatten().tolist()
        raise InputError(f"attention_mask masks every position of row {rows[0]}: nothing to go on")
    return torch.argsort((attention_mask != 0).to(torch.uint8), dim=1, stable=True)
