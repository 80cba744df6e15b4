"""Sequence parallelism: one long sequence, of which every process holds a chunk.

Projections, norms and the head see single positions and need nothing from elsewhere. The
convolution needs the last inputs of the chunk before, and the scan its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from anymamba.errors import InputError
from anymamba.layers import convolve
from anymamba.modeling.cache import MambaCache
from anymamba.modeling.falcon_mamba.model import FalconMambaMixer
from anymamba.modeling.mamba import MambaMixer
from anymamba.modeling.mamba.stateful import StatefulMixer
from anymamba.modeling.mamba2 import Mamba2Mixer
from anymamba.modeling.packing import Layout, next_tokens
from anymamba.modeling.state import LayerState
from anymamba.renamed import old_names
from anymamba.training.distributed.scan import parallel_scan, parallel_ssd
from anymamba.training.distributed.states import check_started, sum_of_losses, window_before

__getattr__ = old_names(__name__)


@contextmanager
def sequence_parallel(model: nn.Module, group: Any = None) -> Iterator[None]:
    """While it lasts, what the model reads is this process's chunk of a longer sequence.

    Call the model with `chunk_of(input_ids)` on every process of the group, and `backward`
    before leaving. The outputs are those of the whole sequence at these positions. A batch has
    whole rows: no masks, no packed documents, and no cache.

    Args:
        model: a Mamba model, alone, wrapped in DDP, or sharded by `shard`.
        group: the processes, in the order of their chunks; all of them if None.

    Raises:
        InputError: there is no process group, or no Mamba layer in the model; and from within,
            where the model gets what it cannot take here.
    """
    check_started("sequence_parallel")
    mixers: dict[Any, Any] = {m: type(m) for m in model.modules() if type(m) in _PARALLEL}
    if not mixers:
        raise InputError(
            "sequence_parallel: the model has no layer of Mamba, Falcon-Mamba or Mamba-2, or is "
            "parallel already"
        )
    for mixer, usual in mixers.items():
        # As FSDP2 does it: whatever asks for the class sees that this is no plain mixer.
        mixer.__class__ = _PARALLEL[usual]
        mixer.group = group
    try:
        yield
    finally:
        for mixer, usual in mixers.items():
            mixer.__class__ = usual
            del mixer.group


def chunk_of(whole: Tensor, group: Any = None, dim: int = 1) -> Tensor:
    """This process's part of a sequence: chunks are equal, or the first ones one longer.

    Args:
        whole: (b, l, ...), the same on all processes.
        group: the processes, in the order of their chunks; all of them if None.
        dim: which axis is the sequence.

    Raises:
        InputError: there is no process group.
    """
    check_started("chunk_of")
    parts = torch.tensor_split(whole, dist.get_world_size(group), dim)
    return parts[dist.get_rank(group)].contiguous()


def sequence_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, group: Any = None
) -> Tensor:
    """The language model's loss over whole rows, of which every process computes its chunk.

    Args:
        model: a `MambaForCausalLM`, under `sequence_parallel`.
        input_ids: (b, l) token ids, the same on all processes.
        labels: (b, l), as in `MambaForCausalLM.forward`, which is to say not shifted; input_ids if
            None. -100 is ignored.
        group: the processes, in the order of their chunks; all of them if None.

    Returns:
        The mean over all positions that count, the same number on all processes. `backward` gives
        each process its own chunk's part of the gradients; `sum_gradients` adds them up.

    Raises:
        InputError: labels has another shape, or a chunk would be shorter than the convolution.
    """
    check_started("sequence_loss")
    labels = input_ids if labels is None else labels
    if labels.shape != input_ids.shape or labels.ndim != 2:
        raise InputError(
            f"sequence_loss: labels has shape {tuple(labels.shape)} and input_ids "
            f"{tuple(input_ids.shape)}, expected (b, l) of both"
        )
    _check_long_enough(input_ids.shape[1] // dist.get_world_size(group), _conv_kernel(model))
    targets = next_tokens(labels, None)
    count = int((targets != -100).sum())
    logits = model(input_ids=chunk_of(input_ids, group), use_cache=False).logits
    part = F.cross_entropy(
        logits.flatten(0, 1), chunk_of(targets, group).flatten(), reduction="sum"
    )
    return sum_of_losses(part / max(count, 1), group)


def sum_gradients(model: nn.Module, group: Any = None) -> None:
    """Add up all processes' gradients, in place. Not with DDP or FSDP, which do so themselves.

    Args:
        model: the same on all processes, after `backward`.
        group: the processes; all of them if None.

    Raises:
        InputError: there is no process group.
    """
    check_started("sum_gradients")
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        some = [gradient for gradient in gradients if gradient.dtype == dtype]
        # One message, because many small ones take longer.
        flat = torch.cat([gradient.flatten() for gradient in some])
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(some, flat.split([g.numel() for g in some]), strict=True):
            gradient.copy_(total.view_as(gradient))


class _SequenceParallel(StatefulMixer):
    """A mixer whose window and state come from the process that holds the chunk before."""

    group: Any

    def forward(
        self,
        hidden_states: Tensor,
        cache: MambaCache | LayerState | None = None,
        attention_mask: Tensor | None = None,
        *,
        packed: Layout | None = None,
    ) -> Tensor:
        """As `MambaMixer.forward`, for one chunk."""
        if cache is not None or attention_mask is not None or packed is not None:
            marked = attention_mask is not None or packed is not None
            given = "a mask or packed rows" if marked else "a cache (pass use_cache=False)"
            raise InputError(f"sequence_parallel takes whole rows only, the model got {given}")
        _check_long_enough(hidden_states.shape[1], self.config.conv_kernel)
        mixed: Tensor = super().forward(hidden_states)
        return mixed

    def _convolve(self, x_ble: Tensor, *context: Any) -> Tensor:
        k = self.config.conv_kernel
        # A window is k wide, of which the convolution looks at the last k - 1.
        tail_bwe = x_ble[:, x_ble.shape[1] - (k - 1) :]
        window_bke = F.pad(window_before(tail_bwe, self.group), (0, 0, 1, 0))
        return convolve(self.conv1d, self.act, x_ble, window_bke.transpose(1, 2))[0]

    def _scan(self, inputs: tuple[Any, ...], *context: Any) -> Tensor:
        mixer: Any = self
        if isinstance(self, Mamba2Mixer):
            limits = (self.time_step_limit[0], self.time_step_limit[1])
            return parallel_ssd((*inputs, self.dt_bias), limits, self.group)
        return parallel_scan(*inputs, group=self.group, fallback=mixer._fallback)


_PARALLEL: dict[type[StatefulMixer], type[StatefulMixer]] = {
    usual: type("_SequenceParallelMixer", (_SequenceParallel, usual), {})
    for usual in (MambaMixer, FalconMambaMixer, Mamba2Mixer)
}


def _check_long_enough(length: int, conv_kernel: int) -> None:
    if length < conv_kernel:
        raise InputError(
            f"sequence_parallel: a chunk of {length} positions is shorter than the convolution's "
            f"{conv_kernel}; use fewer processes, or longer sequences"
        )


def _conv_kernel(model: nn.Module) -> int:
    kernels = [m.config.conv_kernel for m in model.modules() if isinstance(m, StatefulMixer)]
    return max(kernels, default=1)
