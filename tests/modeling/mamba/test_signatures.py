"""Positional arguments, defaults and outputs are Transformers'; what is ours is by keyword."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.mamba import configuration_mamba
from transformers.models.mamba import modeling_mamba as theirs

from anymamba import MambaCache, MambaConfig, MambaForCausalLM, MambaModel
from anymamba.modeling.mamba import model as ours
from anymamba.modeling.mamba import outputs
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

PAIRS: dict[str, tuple[Any, Any]] = {
    "MambaModel.forward": (MambaModel.forward, theirs.MambaModel.forward),
    "MambaForCausalLM.forward": (MambaForCausalLM.forward, theirs.MambaForCausalLM.forward),
    "prepare_inputs_for_generation": (
        MambaForCausalLM.prepare_inputs_for_generation,
        theirs.MambaForCausalLM.prepare_inputs_for_generation,
    ),
    "MambaMixer": (ours.MambaMixer.__init__, theirs.MambaMixer.__init__),
    "MambaMixer.forward": (ours.MambaMixer.forward, theirs.MambaMixer.forward),
    "MambaBlock": (ours.MambaBlock.__init__, theirs.MambaBlock.__init__),
    "MambaBlock.forward": (ours.MambaBlock.forward, theirs.MambaBlock.forward),
    "MambaRMSNorm": (ours.MambaRMSNorm.__init__, theirs.MambaRMSNorm.__init__),
    "MambaRMSNorm.forward": (ours.MambaRMSNorm.forward, theirs.MambaRMSNorm.forward),
    "MambaConfig": (MambaConfig.__init__, configuration_mamba.MambaConfig.__init__),
    "MambaOutput": (outputs.MambaOutput.__init__, theirs.MambaOutput.__init__),
    "MambaCausalLMOutput": (
        outputs.MambaCausalLMOutput.__init__,
        theirs.MambaCausalLMOutput.__init__,
    ),
}
PAIRS |= {
    f"MambaModel.{name}": (getattr(MambaModel, name), getattr(theirs.MambaModel, name))
    for name in ("get_input_embeddings", "set_input_embeddings", "__init__")
}
PAIRS |= {
    f"MambaCache.{name}": (getattr(MambaCache, name), getattr(Cache, name))
    for name in sorted(vars(MambaCache).keys() & vars(Cache).keys())
    if callable(getattr(MambaCache, name)) and not name.startswith("_")
    # The constructor and the first are those of Transformers' historical MambaCache; the second
    # does nothing, whatever it is given.
    if name not in ("update_conv_state", "early_initialization")
}


def positional(function: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind in POSITIONAL]


@pytest.mark.parametrize("name", PAIRS)
def test_positional_arguments_are_theirs(name: str) -> None:
    mine, expected = (positional(function) for function in PAIRS[name])
    assert [n for n, _ in mine] == [n for n, _ in expected]
    for (argument, default), (_, theirs_default) in zip(mine, expected, strict=True):
        # A default where they have none is one more way to call it.
        assert default == theirs_default or theirs_default is inspect.Parameter.empty, argument


def test_outputs_have_their_fields_in_their_order() -> None:
    for kind in ("MambaOutput", "MambaCausalLMOutput"):
        fields = [
            [field.name for field in dataclasses.fields(getattr(module, kind))]
            for module in (outputs, theirs)
        ]
        assert fields[0] == fields[1]


def test_what_is_read_off_their_modules_is_here() -> None:
    """Sizes, submodules and parameters of Transformers' modules."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
    mine = MambaModel(MambaConfig(**sizes)).layers[1]
    expected = theirs.MambaModel(configuration_mamba.MambaConfig(**sizes)).layers[1]
    for part, other in ((mine, expected), (mine.mixer, expected.mixer), (mine.norm, expected.norm)):
        assert set(other._modules) <= set(part._modules)
        assert set(other._parameters) == set(part._parameters)
        for name, value in vars(other).items():
            if type(value) in (int, float) and not name.startswith("_"):
                assert getattr(part, name) == value, name


def test_by_position_as_documented() -> None:
    lm, ids = small_model(), words(2, 7)
    model, embeds = lm.backbone, lm.backbone.embeddings(ids).detach()
    assert_same(model(None, embeds)[0], model(ids)[0])
    assert model(ids, None, None, True).cache is not None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    everything = model(ids, None, MambaCache.for_model(lm, 2), True, True, False, mask)
    assert_same(everything[0], model(ids, attention_mask=mask)[0])
    assert lm(ids, None, None, None, ids).loss is not None
    assert lm(ids, mask, None, None, None, True, False, False, 2)[0].shape == (2, 2, 61)
    block, hidden = model.layers[0], torch.randn(2, 7, 24)
    masked = block(hidden, None, mask)
    assert torch.equal(masked[0, :3], hidden[0, :3])
    assert_same(masked[0, 3:], block(hidden[:1, 3:])[0])


# Labels that are shifted already, and positions that are kept.


def their_model(model: MambaForCausalLM) -> nn.Module:
    config = configuration_mamba.MambaConfig(
        **{k: v for k, v in model.config.to_dict().items() if k != "layer_types"}
    )
    other = theirs.MambaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("items", [None, 5])
def test_shifted_labels_give_their_loss(items: int | None) -> None:
    model, ids = small_model(), words(2, 9)
    shifted = torch.cat([ids[:, 3:], torch.full((2, 3), -100)], 1)
    options = {} if items is None else {"num_items_in_batch": items}
    expected = their_model(model)(ids, labels=ids, shift_labels=shifted, **options).loss
    assert_same(model(ids, labels=ids, shift_labels=shifted, **options).loss, expected)
    assert_same(model(ids, shift_labels=shifted, **options).loss, expected)
    usual = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    assert_same(model(ids, shift_labels=usual).loss, model(ids, labels=ids).loss)


def test_shifted_labels_at_deleted_positions_count_for_nothing() -> None:
    model, ids = small_model(), words(1, 9)
    mask = torch.ones_like(ids)
    mask[0, 2:4] = 0
    kept = mask[0].bool()
    shifted = words(1, 9, 7)
    found = model(ids, attention_mask=mask, shift_labels=shifted).loss
    assert_same(found, model(ids[:, kept], shift_labels=shifted[:, kept]).loss)


KEPT = {
    "the last": 3,
    "for all rows": torch.tensor([4, 1]),
    "for each row": torch.tensor([[0, 5, 8], [8, 1, 1]]),
    "booleans": words(2, 9) % 2 == 0,
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_kept_positions_are_theirs(name: str, mode: Any) -> None:
    model, ids, keep = small_model(), words(2, 9), KEPT[name]
    with mode():
        found = model(ids, logits_to_keep=keep).logits
        expected = their_model(model)(ids, logits_to_keep=keep).logits
        assert_same(found, expected)
        labelled = model(ids, labels=ids, logits_to_keep=keep)
        assert_same(labelled.logits, expected)
    # The loss at those positions alone, from the logits of all of them.
    target = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    everything = model(ids).logits
    if name == "the last":
        pairs = (everything[:, -3:], target[:, -3:])
    elif name == "for each row":
        rows = torch.arange(2)[:, None]
        pairs = (everything[rows, keep], target[rows, keep])
    elif name == "booleans":
        pairs = (everything[keep], target[keep])
    else:
        pairs = (everything[:, keep], target[:, keep])
    loss = nn.functional.cross_entropy(pairs[0].reshape(-1, 61), pairs[1].reshape(-1))
    assert_same(labelled.loss, loss)
