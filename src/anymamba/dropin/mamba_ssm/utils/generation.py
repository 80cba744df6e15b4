"""Generation, as `mamba_ssm.utils.generation` has it: one token after the other from a cache."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import TextStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from anymamba.dropin.common.sampling import (
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from anymamba.errors import InputError

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "capture_graph",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]

NO_GRAPHS = (
    "AnyMamba's drop-in records no CUDA graphs (cg, update_graph_cache): the model is called "
    "instead, with the same result; generate of anymamba.MambaForCausalLM captures them on a GPU"
)


@dataclass
class InferenceParams:
    """The cache of a generation, handed down to every layer.

    Args:
        max_seqlen: the most tokens a row will have; attention makes room for as many.
        max_batch_size: the number of rows.
        seqlen_offset: how many tokens the layers have seen: 0 for a prompt.
        batch_size_offset: the first row, of attention's cache, that the input belongs to.
        key_value_memory_dict: each layer's states by its layer_idx.
        lengths_per_sample: how many tokens attention has seen of each row, where that differs.

    Example:
        >>> InferenceParams(max_seqlen=10, max_batch_size=1).seqlen_offset
        0
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin another sequence of the same shape. The layers' states stay until its prompt."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: TextStreamer | None = None,
) -> GenerateDecoderOnlyOutput:
    """Continue prompts of one length, token by token.

    Args:
        input_ids: the prompts, (b, l).
        model: called with input_ids, position_ids, inference_params and num_last_tokens.
        max_length: of prompt and continuation together; at least one token is generated.
        top_k, top_p, min_p, temperature: as in `sample`; by default the likeliest token.
        repetition_penalty: as in `modify_logit_for_repetition_penalty`.
        eos_token_id: stop once all rows end in it at the same time.
        teacher_outputs: (b, l'); as far as they reach, tokens are taken from there.
        vocab_size: take tokens below it only, where the table has been padded.
        cg: accepted; the drop-in records no CUDA graphs, and a warning says so.
        enable_timing: print how long it took.
        output_scores: return the logits of each step, before the penalty, as well.
        streamer: its `put` is given the prompt, then each token, and `end` is called at the end.

    Returns:
        An object with `sequences`, (b, length), and `scores`, a tuple of (b, v).

    Raises:
        InputError: the prompt is empty, or not of two dimensions.

    Example:
        >>> from types import SimpleNamespace
        >>> def next_number(ids, inference_params, **kwargs):
        ...     logits = torch.nn.functional.one_hot((ids[:, -1:] + 1) % 5, 5).float()
        ...     return SimpleNamespace(logits=logits)
        >>> decode(torch.tensor([[2, 3]]), next_number, max_length=6).sequences.tolist()
        [[2, 3, 4, 0, 1, 2]]
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise InputError(f"input_ids must be (b, l) with l > 0, got {tuple(input_ids.shape)}")
    if cg:
        warnings.warn(NO_GRAPHS, stacklevel=4)  # the caller of generate
    started = time.perf_counter()
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    scores: list[Tensor] = []
    sequences, newest = input_ids, input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while not _ends(newest, params.seqlen_offset, max_length, eos_token_id):
        logits = _last_logits(model, newest, params)[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += newest.shape[1]
        logits = modify_logit_for_repetition_penalty(logits, sequences, repetition_penalty)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            token = teacher_outputs[:, params.seqlen_offset]
        else:
            token = sample(logits, top_k, top_p, min_p, temperature)
        newest = token.unsqueeze(1)
        sequences = torch.cat([sequences, newest], dim=1)
        if streamer is not None:
            streamer.put(newest.cpu())
    if streamer is not None:
        streamer.end()
    if enable_timing:
        elapsed = 1000 * (time.perf_counter() - started)
        print(f"Prompt processing + decoding time: {elapsed:.0f}ms")
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=tuple(scores))  # type: ignore[arg-type]


def _ends(newest: Tensor, seen: int, max_length: int, eos_token_id: int | None) -> bool:
    if seen == 0:
        return False
    ended = eos_token_id is not None and bool((newest == eos_token_id).all())
    return ended or seen >= max_length - 1


def _last_logits(model: Any, input_ids: Tensor, params: InferenceParams) -> Tensor:
    """The logits behind the last of the ids, (b, v)."""
    seen, position_ids = params.seqlen_offset, None
    if seen > 0:
        position_ids = torch.full_like(input_ids, seen, dtype=torch.long)
    output = model(input_ids, position_ids=position_ids, inference_params=params, num_last_tokens=1)
    logits: Tensor = output.logits.squeeze(dim=1)
    return logits


class GenerationMixin:
    """Gives a model `generate`.

    Example:
        >>> from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        >>> issubclass(MambaLMHeadModel, GenerationMixin)
        True
    """

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of a generation; each model has its own."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts of one length.

        Args:
            input_ids ... output_scores: as in `decode`.
            return_dict_in_generate: whether to return an object instead of the tokens alone.
            kwargs: further arguments of `decode`.

        Returns:
            The prompts with their continuations, (b, length), or an object that holds them as
            `sequences` and the steps' logits as `scores`.
        """
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


@dataclass
class DecodingCGCache:
    """What `update_graph_cache` returns: a cache and the function that runs one step on it.

    Args:
        max_batch_size, max_seqlen: the shape it is for.
        device, dtype: the model's.
        callables: one step by (batch size, length).
        mempool: always None.
        inference_params: the cache.
        run: one step: from (input_ids, position_ids, seqlen) to logits.

    Example:
        >>> DecodingCGCache().run is None
        True
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: Any = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, int], Callable[..., Tensor]] = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams | None = None
    run: Callable[..., Tensor] | None = None


def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Make the cache of a generation. Records no CUDA graph, as a warning says.

    Args:
        model: what generates.
        cache: what an earlier call returned, or None.
        batch_size, max_seqlen: the shape of the cache.
        seqlen_og: the length of the prompt.
        decoding_seqlens: the lengths of the inputs of a step.
        dtype: of the cache, by default the model's.
        n_warmups: not used.

    Returns:
        The cache, whose `run` takes one step.

    Example:
        >>> from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        >>> from anymamba.dropin.mamba_ssm.models.config_mamba import MambaConfig
        >>> model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8))
        >>> with warnings.catch_warnings(action="ignore"):
        ...     cache = update_graph_cache(model, None, 1, 3, 10)
        >>> cache.run(torch.tensor([[1]]), None, 3).shape
        torch.Size([1, 1, 8])
    """
    warnings.warn(NO_GRAPHS, stacklevel=2)
    cache = DecodingCGCache() if cache is None else cache
    weight = next(iter(model.parameters()))
    kind = (weight.device, dtype or weight.dtype)
    too_small = batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen
    if kind != (cache.device, cache.dtype) or too_small:
        cache.callables = {}
        cache.device, cache.dtype = kind
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.inference_params = InferenceParams(
            max_seqlen=max_seqlen,
            max_batch_size=batch_size,
            key_value_memory_dict=model.allocate_inference_cache(batch_size, max_seqlen, dtype),
            lengths_per_sample=torch.full((batch_size,), seqlen_og, device=weight.device),
        )
    params = cache.inference_params
    assert params is not None, "made above, when the cache was new"
    for length in decoding_seqlens:
        step = capture_graph(model, params, batch_size, max_seqlen, length)
        cache.callables.setdefault((batch_size, length), step)

    def run(input_ids: Tensor, position_ids: Tensor | None, seqlen: int) -> Tensor:
        rows, length = input_ids.shape[:2]
        return cache.callables[rows, length](input_ids, position_ids, seqlen)

    cache.run = run
    params.seqlen_offset = 0
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor | None, int], Tensor]:
    """A function that takes a step by calling the model; nothing is captured.

    Args:
        model: what generates.
        inference_params: the cache that the step changes.
        batch_size, max_seqlen, mempool, n_warmups: not used.
        decoding_seqlen: how many tokens a step takes.

    Returns:
        A function from (input_ids, position_ids, how many tokens were seen) to logits, (b, l, v).

    Example:
        >>> from types import SimpleNamespace
        >>> model = lambda ids, **kwargs: SimpleNamespace(logits=ids.float().unsqueeze(-1))
        >>> capture_graph(model, InferenceParams(9, 1), 1, 9)(torch.tensor([[4]]), None, 3)
        tensor([[[4.]]])
    """

    def run(input_ids: Tensor, position_ids: Tensor | None, seqlen: int) -> Tensor:
        inference_params.seqlen_offset = seqlen
        if inference_params.lengths_per_sample is not None:
            inference_params.lengths_per_sample[:] = seqlen
        logits: Tensor = model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits
        return logits

    return run
