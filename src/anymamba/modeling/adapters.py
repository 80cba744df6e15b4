"""PEFT's adapters on AnyMamba's models: what `register` changes in PEFT, and how it is undone.

PEFT assumes two things of every Mamba that do not hold here. It refuses adapters of `out_proj`
and `conv1d`, because other implementations read those weights past the module; ours calls every
module that is not plain. And it merges an adapter of the embeddings into a weight that the head
shares, which changes the head too, although the adapter never did; ours unties the head first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from torch import nn

from anymamba.modeling.mamba import MambaForCausalLM, MambaPreTrainedModel

_GUARD = "_check_lora_target_modules_mamba"
_ALLOWED = "get_default_import_allowlist"
_MERGES = ("merge_and_unload", "merge_adapter")


def untie_head(model: MambaForCausalLM) -> None:
    """Give the head a weight of its own, equal to the embeddings' it shared so far.

    The config then says so, and `save_pretrained` writes both. A head that is not tied stays as
    it is. Adapters on either module are left alone: it is their base weights that part.

    Example:
        >>> from anymamba.modeling.config import MambaConfig
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
        >>> model.lm_head.weight is model.backbone.embeddings.weight
        True
        >>> untie_head(model)
        >>> model.lm_head.weight is model.backbone.embeddings.weight
        False
        >>> model.config.tie_word_embeddings
        False
    """
    embeddings, head = _beneath(model.get_input_embeddings()), _beneath(model.lm_head)
    if head.weight is embeddings.weight:
        shared = embeddings.weight
        head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def patch_peft() -> Callable[[], None]:
    """Fit PEFT to AnyMamba's models; other models are treated as before.

    Returns:
        A function that undoes it. Where PEFT is not installed, there is nothing to do or undo.

    Example:
        >>> undo = patch_peft()
        >>> undo()
    """
    try:
        from peft import auto
        from peft.tuners import tuners_utils
    except ImportError:
        return lambda: None
    undo = ExitStack()
    undo.callback(_replace(tuners_utils, _GUARD, _guard_others_only))
    undo.callback(_replace(auto, _ALLOWED, _with_ours))
    for name in _MERGES:
        undo.callback(_replace(tuners_utils.BaseTuner, name, _untie_before))
    return undo.close


def _replace(
    owner: ModuleType | type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    original = getattr(owner, name, None)
    # A PEFT without the function has no such obstacle either.
    if original is None:
        return lambda: None
    wrapped = functools.wraps(original)(wrap(original))
    setattr(owner, name, wrapped)

    def undo() -> None:
        # Whoever replaced ours in the meantime keeps what they put there.
        if getattr(owner, name) is wrapped:
            setattr(owner, name, original)

    return undo


def _guard_others_only(guard: Callable[..., None]) -> Callable[..., None]:
    def check(peft_config: Any, model: nn.Module, target_name: str) -> None:
        if not isinstance(model, MambaPreTrainedModel):
            guard(peft_config, model, target_name)

    return check


def _with_ours(allowed: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """AutoPeftModel imports the class that an adapter names, of these packages only."""
    return lambda: [*allowed(), "anymamba"]


def _untie_before(merge: Callable[..., Any]) -> Callable[..., Any]:
    def untie_and_merge(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tuner.model, MambaForCausalLM) and _adapts_tied_weight(tuner.model):
            untie_head(tuner.model)
        return merge(tuner, *args, **kwargs)

    return untie_and_merge


def _adapts_tied_weight(model: MambaForCausalLM) -> bool:
    embeddings, head = model.get_input_embeddings(), model.lm_head
    tied = _beneath(embeddings).weight is _beneath(head).weight
    if _trains_same_tokens(embeddings, head):
        return False
    return tied and not (isinstance(embeddings, nn.Embedding) and isinstance(head, nn.Linear))


def _trains_same_tokens(embeddings: Any, head: Any) -> bool:
    """Whether PEFT trains tokens of the table and the head as one: merged, they are equal."""
    of_head = getattr(head, "token_adapter", None)
    return of_head is not None and of_head.tied_adapter is getattr(
        embeddings, "token_adapter", None
    )


def _beneath(module: nn.Module) -> Any:
    """The module itself under PEFT's wrappers, which name it in one of two ways."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            return module
        module = inner
