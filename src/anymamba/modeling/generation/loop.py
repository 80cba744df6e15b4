"""The loop of greedy and sampled generation over the native step, or a GPU's captured one.

`generate` prepares and validates as Transformers does it, and then runs this loop where the native
core computes the model, or a captured graph does, and nothing unusual is asked for; else
Transformers' own, which gives the same tokens. `why_not_native_loop` tells which of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from anymamba.modeling import fused
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.generation.direct import why_not_direct
from anymamba.modeling.generation.graph import CAPTURES, Step, why_not_graph
from anymamba.modeling.generation.logits_processors import process, softmax
from anymamba.modeling.generation.multinomial import multinomial

if TYPE_CHECKING:
    from anymamba.modeling.mamba import MambaForCausalLM

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Keywords of `generate` that reach no loop: they are objects to call, or were dealt with before.
_OUTSIDE = frozenset(
    {
        "inputs",
        "input_ids",
        "logits_processor",
        "negative_prompt_attention_mask",
        "negative_prompt_ids",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
    }
)
# What reaches the loop and concerns the prompt alone, or what a native step does anyway.
_KNOWN = frozenset(
    {
        "attention_mask",
        "cache",
        "inputs_embeds",
        "logits_to_keep",
        "position_ids",
        "tokenizer",
        "use_cache",
    }
)


def why_not_native_loop(
    model: MambaForCausalLM, generation_config: GenerationConfig | None = None, **options: Any
) -> str | None:
    """The reason why `generate` would run Transformers' loop, or None where it runs ours.

    Args:
        model: the language model.
        generation_config: as for `generate`.
        **options: the keywords that `generate` would be called with.

    Example:
        >>> from anymamba import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9))
        >>> why_not_native_loop(model, num_beams=4)
        'beam_search is asked for'
    """
    if options.pop("custom_generate", None) is not None:
        return "custom_generate is given"
    assistant_model = options.pop("assistant_model", None)
    synced_gpus = bool(options.pop("synced_gpus", False))
    options = {name: value for name, value in options.items() if name not in _OUTSIDE}
    untyped: Any = model  # Transformers annotates `self` there with a protocol of its own
    config, model_kwargs = untyped._prepare_generation_config(generation_config, **options)
    mode = config.get_generation_mode(assistant_model)
    if mode not in _MODES:
        return f"{mode.value} is asked for"
    with torch.no_grad():
        return why_not_loop(model, config, synced_gpus, model_kwargs)


def why_not_loop(
    model: MambaForCausalLM,
    config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str | None:
    """The same, once `generate` has found that it samples or takes the best token.

    Args:
        model: the language model.
        config, synced_gpus, model_kwargs: as `generate` hands them to its loop.
    """
    if synced_gpus:
        return "synced_gpus keeps several processes in step"
    if getattr(config, "is_assistant", False):
        return "the model assists another"
    if config.use_cache is False:
        return "use_cache=False reads the whole text at each step"
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name, False) or getattr(model.config, name, False):
            return f"{name} is asked for"
    for name, value in model_kwargs.items():
        if name not in _KNOWN and value is not None:
            return f"{name} goes to each step"
    if not isinstance(model_kwargs.get("logits_to_keep", 1), int):
        return "logits_to_keep is a tensor"
    captures, cache = is_captured(model), model_kwargs.get("cache")
    if cache is not None:
        worker = "a captured graph" if captures else "the native core"
        if type(cache) is not MambaCache or not _works_on(model, cache):
            return f"the cache is no MambaCache that {worker} can work on"
    reason = why_not_direct(model) or (why_not_graph if captures else fused.why_not_table)(model)
    if reason is not None:
        return reason
    untyped: Any = model  # Transformers annotates `self` there with a protocol of its own
    if untyped._valid_auto_compile_criteria(model_kwargs, config):
        return "compile_config asks for compiled steps"
    return None


def is_captured(model: MambaForCausalLM) -> bool:
    """Whether the model's steps are a matter of graphs, and not of the native core."""
    return model.device.type in CAPTURES


def _works_on(model: MambaForCausalLM, cache: MambaCache) -> bool:
    return cache.device == model.device if is_captured(model) else fused.fits(cache)


@dataclass(frozen=True)
class NativeLoop:
    """Transformers' `_sample`, where a step is the native core's or a captured graph's.

    Args:
        model: the language model.
        steps: gives, while its context lasts, the step that goes on from a state.
        processors: change the logits before a token is chosen.
        criteria: decide which rows are finished.
        config: complete, as `generate` hands it to its loop.
        streamer: gets each new token.
    """

    model: MambaForCausalLM
    steps: Callable[[MambaCache], AbstractContextManager[Step]]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None

    def run(
        self, input_ids: Tensor, model_kwargs: dict[str, Any]
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Read the prompt and write on until every row is finished.

        Args:
            input_ids: (b, l), the prompt; without columns where it is given as embeddings.
            model_kwargs: the mask, the state and the like, as `generate` prepared them.

        Returns:
            What `generate` returns.
        """
        config = self.config
        is_detailed = bool(config.return_dict_in_generate)
        scores: tuple[Tensor, ...] | None = () if is_detailed and config.output_scores else None
        logits: tuple[Tensor, ...] | None = () if is_detailed and config.output_logits else None
        next_logits, cache = self._read_prompt(input_ids, model_kwargs)
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        with self.steps(cache) as step:
            while True:
                next_scores = process(self.processors, input_ids, next_logits)
                if scores is not None:
                    scores += (next_scores,)
                if logits is not None:
                    logits += (next_logits,)
                tokens = self._finished_padded(self._choose(next_scores), unfinished)
                input_ids = _appended(input_ids, tokens)
                unfinished = unfinished & ~self.criteria(input_ids, scores)
                if self.streamer is not None:
                    self.streamer.put(tokens.cpu())
                if not unfinished.any():
                    break
                next_logits = step(tokens[:, None])
        if self.streamer is not None:
            self.streamer.end()
        if not is_detailed:
            return input_ids
        parts: dict[str, Any] = {"sequences": input_ids, "scores": scores, "logits": logits}
        return GenerateDecoderOnlyOutput(**parts, cache=cache)

    def _read_prompt(
        self, input_ids: Tensor, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, MambaCache]:
        """The first (b, v) logits, and the state after the prompt."""
        outputs = self.model._prefill(input_ids, self.config, model_kwargs, is_first_iteration=True)
        # A copy, so that the logits of a long prompt can go.
        return _copied(outputs.logits[:, -1].float()), outputs.cache

    def _choose(self, scores_bv: Tensor) -> Tensor:
        """(b,) tokens."""
        if self.config.do_sample:
            return multinomial(softmax(scores_bv))
        if scores_bv.device.type != "cpu" or scores_bv.dtype == torch.bfloat16:
            return torch.argmax(scores_bv, dim=-1)
        return torch.from_numpy(scores_bv.numpy().argmax(-1))

    def _finished_padded(self, tokens: Tensor, unfinished: Tensor) -> Tensor:
        """The pad token in rows that are finished, where anything but the length ends one."""
        if not any(hasattr(criterion, "eos_token_id") for criterion in self.criteria):
            return tokens
        pad: Any = self.config._pad_token_tensor
        padded: Tensor = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
        return padded


# By NumPy on the CPU, because PyTorch wakes its threads for long texts and large vocabularies.


def _copied(logits_bv: Tensor) -> Tensor:
    if logits_bv.device.type != "cpu":
        return logits_bv.clone()
    return torch.from_numpy(logits_bv.numpy().copy())


def _appended(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """(b, l) and (b,) to (b, l + 1)."""
    if input_ids.device.type != "cpu":
        return torch.cat([input_ids, tokens[:, None]], 1)
    return torch.from_numpy(np.concatenate([input_ids.numpy(), tokens.numpy()[:, None]], axis=1))
