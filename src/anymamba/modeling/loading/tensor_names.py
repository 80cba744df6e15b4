"""A model's tensors under every name that a layout gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from anymamba.checkpoint.architecture import EMBEDDINGS, HEAD, to_transformers_name


def ties_head(cls: Any) -> bool:
    """Whether models of a class have a language model's head that may be the embedding table."""
    return HEAD in (getattr(cls, "_tied_weights_keys", None) or {})


def tensor_names(module: nn.Module) -> list[str]:
    """The names of a module's parameters and buffers, a tied weight under each of its names."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return [name for named in (parameters, buffers) for name, _ in named]


def own_names(
    cls: Any, config: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Any:
    """The names that a model of a user's own class gives its tensors, which is made without memory.

    Returns:
        Its name by Transformers' name, or by itself where no layout knows it.
    """
    with torch.device("meta"):
        model = cls(config, *arguments, **keywords)
    return {to_transformers_name(name): name for name in tensor_names(model)}


def rename_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let `load_state_dict` take the names of every layout: a hook of each Mamba model.

    A tied model takes a state dict without the head, as minimal models and files have it. The state
    dict is changed in place; PyTorch hands out a copy.

    Example:
        >>> state_dict = {"backbone.embedding.weight": torch.ones(2, 3)}
        >>> module = nn.Module()
        >>> module.backbone = nn.Module()
        >>> module.backbone.embeddings = nn.Embedding(2, 3)
        >>> rename_state_dict(module, state_dict, "")
        >>> list(state_dict)
        ['backbone.embeddings.weight']
    """
    own = tensor_names(module)
    by_meaning = {to_transformers_name(name): prefix + name for name in own}
    known = {prefix + name for name in own}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in known]:
        target = by_meaning.get(to_transformers_name(name.removeprefix(prefix)))
        if target is not None and target not in state_dict:
            state_dict[target] = state_dict.pop(name)
    head, table = prefix + HEAD, by_meaning.get(EMBEDDINGS)
    if head in known and head not in state_dict and table in state_dict and _is_tied(module):
        state_dict[head] = state_dict[table]


def _is_tied(module: Any) -> bool:
    return module.lm_head.weight is module.get_input_embeddings().weight


def is_of_mamba(name: str) -> bool:
    """Whether a tensor is a Mamba's by Transformers' name, and not of another task's head, say.

    Example:
        >>> is_of_mamba("backbone.norm_f.weight"), is_of_mamba("score.weight")
        (True, False)
    """
    return name == HEAD or name.startswith("backbone.")
