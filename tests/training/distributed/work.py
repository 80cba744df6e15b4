"""What the processes of these tests do. It needs no process group where there is one process."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anymamba import MambaForCausalLM
from anymamba.errors import AnyMambaError
from anymamba.modeling.auto import new_causal_lm
from anymamba.modeling.config import CONFIGS
from anymamba.modeling.fused import why_not_fused
from anymamba.modeling.mamba.stateful import fill
from anymamba.training.distributed import (
    chunk_of,
    load_sharded,
    save_sharded,
    sequence_loss,
    sequence_parallel,
    shard,
    sum_gradients,
)

STEPS = 4
Record = dict[str, Any]


def small_model(architecture: str = "mamba", **changes: Any) -> MambaForCausalLM:
    """The same weights in every process. Its biases and A, where all start alike, differ."""
    torch.manual_seed(0)
    # No size is a multiple of another, so that a mixed-up axis shows.
    settings = {"vocab_size": 19, "hidden_size": 12, "state_size": 5, "num_hidden_layers": 2}
    model = new_causal_lm(CONFIGS[architecture](**settings, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model.train()


def batch(step: int, rows: int = 4, length: int = 17) -> Tensor:
    """The global batch of a step."""
    source = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 19, (rows, length), generator=source)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, stop: int = STEPS
) -> list[float]:
    """The loss of each step, over the global batch."""
    losses = []
    for step in range(first, stop):
        rows = batch(step).chunk(processes())[rank()]  # this process's
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if processes() > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / processes())
    return losses


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight, put together from its parts."""
    return {
        name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
        for name, weight in model.named_parameters()
    }


def alone() -> tuple[list[float], dict[str, Tensor]]:
    model = small_model()
    return train(model, adamw(model)), whole_weights(model)


def with_ddp() -> tuple[list[float], dict[str, Tensor]]:
    model = small_model()
    wrapped = DistributedDataParallel(model)
    return train(wrapped, adamw(wrapped)), whole_weights(model)


def with_fsdp(checkpointing: bool = False) -> tuple[list[float], dict[str, Tensor], Record]:
    model = small_model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model)
    held = sum(weight.to_local().numel() for weight in model.parameters())
    losses = train(model, adamw(model))
    with torch.no_grad():
        read = model.eval()(batch(0), use_cache=True).logits
    facts = {"held": held, "why": why_not_fused(model), "read": read}
    return losses, whole_weights(model), facts


def born_sharded(architecture: str, sizes: Record) -> Record:
    """The weights of a model that no process ever holds whole; each draws other numbers.

    With this process's part of them, and the values that it drew for those of the mixers.
    """
    torch.manual_seed(rank())
    with torch.device("meta"):
        model = new_causal_lm(CONFIGS[architecture](vocab_size=19, hidden_size=12, **sizes))
    shard(model)
    model.to_empty(device="cpu")
    names = {id(weight): name for name, weight in model.named_parameters()}
    drawn: dict[str, Tensor] = {}

    def noted(weight: Tensor, values: Tensor) -> None:
        drawn[names[id(weight)]] = values.clone()
        fill(weight, values)

    mixer = sys.modules[type(model.backbone.layers[0].mixer).__module__]
    with patch.object(mixer, "fill", noted):
        model.init_weights()
    parts = {name: weight.to_local().detach() for name, weight in model.named_parameters()}
    return {"whole": whole_weights(model), "parts": parts, "drawn": drawn}


def with_fsdp_in_bfloat16() -> tuple[list[float], Record]:
    """Which types the layer's own weights have while it runs."""
    model = shard(small_model(), param_dtype=torch.bfloat16)
    seen: Record = {}
    mixer = model.backbone.layers[0].mixer

    def look(*_: Any) -> None:
        for name, weight in mixer.named_parameters():
            seen[name] = weight.dtype

    # When the last of the matrices is about to run, all weights of the layer are gathered.
    mixer.out_proj.register_forward_pre_hook(look)
    return train(model, adamw(model)), seen


def prepared(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = small_model()
    if kind == "fsdp":
        shard(model)  # type: ignore[arg-type]
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    return model, adamw(model)


def train_and_save(kind: str, folder: Path) -> list[float]:
    model, optimizer = prepared(kind)
    losses = train(model, optimizer, stop=2)
    save_sharded(folder, model, optimizer, {"step": 2})
    return losses


def load_and_train(kind: str, folder: Path) -> list[float]:
    model, optimizer = prepared(kind)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    optimizer.param_groups[0]["lr"] = 0.5
    progress = load_sharded(folder, model, optimizer)
    return train(model, optimizer, first=progress["step"])


def save_twice(folder: Path) -> str:
    """The second time, the name is taken."""
    model, _ = prepared("fsdp")
    save_sharded(folder, model)
    try:
        save_sharded(folder, model)
    except AnyMambaError as error:
        return str(error)
    return "nothing was raised"


def gradients_along_the_sequence(length: int, changes: Record) -> tuple[float, Record, Tensor]:
    """Loss, gradients and this process's logits of two rows that all processes share."""
    model = small_model(**changes)
    if changes.get("use_cache") is None:
        model.config.use_cache = False
    ids = batch(0, 2, length)
    labels = ids.clone()
    labels[0, 3:6] = -100
    with sequence_parallel(model):
        loss = sequence_loss(model, ids, labels)
        loss.backward()
        with torch.no_grad():
            logits = model(chunk_of(ids)).logits
    sum_gradients(model)
    return loss.item(), {name: w.grad for name, w in model.named_parameters()}, logits


def checkpointed_along_the_sequence(length: int) -> tuple[float, Record, Tensor]:
    model = small_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = batch(0, 2, length)
    with sequence_parallel(model):
        loss = sequence_loss(model, ids)
        loss.backward()
    sum_gradients(model)
    return loss.item(), {name: w.grad for name, w in model.named_parameters()}, torch.empty(0)


def sharded_along_the_sequence(length: int) -> tuple[float, Record, Tensor]:
    """FSDP2 and sequence parallelism over the same processes, as docs/distributed.md has it."""
    model = shard(small_model())
    with sequence_parallel(model):
        loss = sequence_loss(model, batch(0, 2, length))
        (loss * processes()).backward()
    gradients = {name: w.grad.full_tensor() for name, w in model.named_parameters()}  # type: ignore[union-attr]
    return loss.item(), gradients, torch.empty(0)


def mistakes_along_the_sequence() -> list[str]:
    model = small_model().eval()
    ids = batch(0, 1, 20)
    found = []
    with sequence_parallel(model):
        why = why_not_fused(model)
        for wrong in (
            lambda: sequence_loss(model, ids[:, :5]),
            lambda: sequence_loss(model, ids, ids[:, :5]),
            lambda: model(chunk_of(ids), use_cache=True),
            lambda: model(chunk_of(ids), attention_mask=torch.zeros(1, 10), use_cache=False),
            lambda: sequence_parallel(model).__enter__(),
        ):
            try:
                wrong()
                found.append("nothing was raised")
            except AnyMambaError as error:
                found.append(str(error))
    return [*found, str(why), str(why_not_fused(model))]


def weights_of(folder: Path) -> dict[str, Tensor]:
    model, _ = prepared("fsdp")
    load_sharded(folder, model)
    return whole_weights(model)
