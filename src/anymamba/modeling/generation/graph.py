"""Decode steps on a GPU as a captured graph: one launch for a token in place of hundreds.

A step of one token computes little and launches many kernels, so that a small model waits for
Python. PyTorch can record once what a step launches (a CUDA graph) and launch all of it together.
A recorded step reads and writes fixed memory: a graph has a state, an input and logits of its own.
The state of a text is copied in when its generation begins, and out when it ends.

A graph is kept for the next call of `generate`, and used only while it still describes the model:
before each step the modules, their hooks and settings, the addresses of all weights and PyTorch's
settings of arithmetic are compared with what they were. What is in a weight may change as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.utils import logging

from anymamba.modeling.cache import MambaCache
from anymamba.modeling.generation.cuda_capture import cuda_capture, cuda_mark
from anymamba.modeling.generation.direct import why_not_direct
from anymamba.ops.tracing import PLAIN_TYPES, autocast_is_on
from anymamba.ops.watch import ModuleWatch

if TYPE_CHECKING:
    from anymamba.modeling.mamba import MambaForCausalLM

logger = logging.get_logger(__name__)

Step = Callable[[Tensor], Tensor]
"""From (b, 1) tokens to (b, v) logits; a state advances."""
Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], object], Tensor]]
"""From a step without arguments to a function that repeats it, and the result it writes to."""
Mark = Callable[[torch.device], Callable[[], object]]
"""Notes what a device was given so far; the result lets what it is given later wait for that."""
_Key = tuple[Any, ...]

MOST_GRAPHS = 4
"""How many graphs of a model are kept: those of the batch sizes used last."""

CAPTURES: dict[str, Capture] = {"cuda": cuda_capture}
"""What records a step, by the type of device."""
MARKS: dict[str, Mark] = {"cuda": cuda_mark}
"""What lets one stream wait for another, by the type of device; others compute in one order."""

_CAPTURING = Lock()
"""PyTorch captures one graph at a time in a process."""


def why_not_graph(model: MambaForCausalLM) -> str | None:
    """The reason why a step of this model is not captured, or None.

    Args:
        model: the language model.

    Example:
        >>> from anymamba import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)
        >>> why_not_graph(MambaForCausalLM(config))
        'PyTorch captures no graphs on cpu'
    """
    failure = _FAILURES.get(model)
    if failure is not None and not failure.conditions.hold():
        failure = None
        _FAILURES.pop(model, None)
    reason = _why_not_usual(model) or (None if failure is None else failure.reason)
    if reason is not None:
        _GRAPHS.pop(model, None)  # which would keep weights alive that the model has no more
    return reason


def _why_not_usual(model: MambaForCausalLM) -> str | None:
    device = model.device
    if device.type not in CAPTURES:
        return f"PyTorch captures no graphs on {device.type}"
    if autocast_is_on(device):
        return "autocast is on"
    for part in model.fused_parts():
        reason = part.why_not_usual()
        if reason is not None:
            return f"{part.name}: {reason}"
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if type(tensor) not in PLAIN_TYPES:
                return f"{name} is a {type(tensor).__name__}"
            if tensor.device != device:
                return f"{name} is on {tensor.device}, and others are on {device}"
    return None


@contextmanager
def captured_steps(model: MambaForCausalLM, cache: MambaCache, step: Step) -> Iterator[Step]:
    """Decode steps of a captured graph, for as long as the model stays what it was.

    Args:
        model: one without a reason in `why_not_graph`.
        cache: the state after the prompt; it has what was read again when this is left.
        step: a step on `cache` itself, which serves where the graph cannot.

    Returns:
        A context manager that gives the function to call with each token.
    """
    key = (cache.batch_size, cache.dtype, cache.device, model.device)
    _drop_stale(model)
    # Out of the table while it is used: whoever generates meanwhile makes one of their own.
    graph = _kept(model).pop(key, None) or _captured(model, cache)
    if graph is None:
        yield step
        return

    def follow(tokens_b1: Tensor) -> Tensor:
        nonlocal graph
        # Changed since generation began.
        if graph is not None and not (graph.is_current() and why_not_direct(model) is None):
            graph.save_to(cache)
            graph = None
            _drop_stale(model)
        return step(tokens_b1) if graph is None else graph.step(tokens_b1)

    graph.load_from(cache)
    try:
        yield follow
    finally:
        if graph is not None:
            graph.save_to(cache)
            _keep(model, key, graph)


class _Conditions:
    """What the kernels of a step follow from, beside the numbers in weights, states and tokens."""

    def __init__(self, model: MambaForCausalLM) -> None:
        modules = [part.module for part in model.fused_parts()]
        settings = {name for module in modules for name in vars(module) if name[0] != "_"}
        self._watch = ModuleWatch(model, modules, settings, device_type=model.device.type)
        self._arithmetic = _arithmetic()

    def hold(self) -> bool:
        return self._watch.holds() and _arithmetic() == self._arithmetic


def _arithmetic() -> tuple[object, ...]:
    """PyTorch's settings by which it chooses a product's kernel."""
    matmul = torch.backends.cuda.matmul
    # Where there is the new name, PyTorch refuses to tell the old one after a use of the new.
    precision = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    return (
        getattr(matmul, precision),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


@dataclass(frozen=True)
class _Failure:
    """Why a capture failed, which counts for as long as the next one would be the same."""

    reason: str
    conditions: _Conditions


class DecodeGraph:
    """One decode step of a model, captured with a state of its own.

    Args:
        model: what is captured; it is not kept alive.
        cache: tells the sizes and types of the state.
        capture: records a step.

    Raises:
        RuntimeError: the step does what cannot be recorded, such as waiting for a result.
    """

    def __init__(self, model: MambaForCausalLM, cache: MambaCache, capture: Capture) -> None:
        self._conditions = _Conditions(model)
        self._wait: Callable[[], object] | None = None
        # What is made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._cache = cache.clone()
            device = cache.device
            self._tokens_b1 = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
            self._replay, self._logits_bv = capture(self._recorded_step(model), device)

    def _recorded_step(self, model: MambaForCausalLM) -> Callable[[], Tensor]:
        found, tokens_b1, cache = ref(model), self._tokens_b1, self._cache

        def step() -> Tensor:
            model = found()
            assert model is not None
            hidden_b1d = model.backbone(input_ids=tokens_b1, cache=cache).last_hidden_state
            return model._logits(hidden_b1d[:, -1])

        return step

    def is_current(self) -> bool:
        """Whether the model still is what was captured."""
        return self._conditions.hold()

    @torch.no_grad()
    def load_from(self, cache: MambaCache) -> None:
        """Go on from a state."""
        if self._wait is not None:  # for the copies of the text before, on whatever stream
            self._wait()
        _copy_state(cache, self._cache)

    @torch.no_grad()
    def save_to(self, cache: MambaCache) -> None:
        """Hand over the state."""
        _copy_state(self._cache, cache)
        device = cache.device
        self._wait = MARKS[device.type](device) if device.type in MARKS else None

    @torch.no_grad()
    def step(self, tokens_b1: Tensor) -> Tensor:
        """(b, 1) tokens to (b, v) logits, which the next step leaves alone."""
        self._tokens_b1.copy_(tokens_b1)
        self._replay()
        return self._logits_bv.clone()


def _copy_state(source: MambaCache, target: MambaCache) -> None:
    for name in ("conv_states", "ssm_states", "token_counts"):
        getattr(target, name).copy_(getattr(source, name))


def _captured(model: MambaForCausalLM, cache: MambaCache) -> DecodeGraph | None:
    """A new graph; None where the step cannot be recorded, and then a warning, or not now."""
    if not _CAPTURING.acquire(blocking=False):
        return None  # another thread captures: this text does without
    try:
        return DecodeGraph(model, cache, CAPTURES[model.device.type])
    except torch.OutOfMemoryError:
        reason = "too little memory is left for a graph"  # next time there may be more
    except RuntimeError as error:
        reason = f"capturing a step failed: {(str(error) or repr(error)).splitlines()[0]}"
        _FAILURES[model] = _Failure(reason, _Conditions(model))
    finally:
        _CAPTURING.release()
    logger.warning_once(f"generate launches the kernels of each step one by one: {reason}")
    return None


def _kept(model: MambaForCausalLM) -> dict[_Key, DecodeGraph]:
    return _GRAPHS.setdefault(model, {})


def _drop_stale(model: MambaForCausalLM) -> None:
    """Free the graphs that the model has outgrown, and the old weights that they hold."""
    kept = _kept(model)
    for key, graph in list(kept.items()):
        if not graph.is_current():
            kept.pop(key, None)


def _keep(model: MambaForCausalLM, key: _Key, graph: DecodeGraph) -> None:
    kept = _kept(model)
    kept[key] = graph
    while len(kept) > MOST_GRAPHS:
        del kept[next(iter(kept))]


_GRAPHS: WeakKeyDictionary[MambaForCausalLM, dict[_Key, DecodeGraph]] = WeakKeyDictionary()
_FAILURES: WeakKeyDictionary[MambaForCausalLM, _Failure] = WeakKeyDictionary()
