"""A model whose parts lie on several devices, or nowhere until they are called, gives its text.

"cpu:0" stands for a second device: `Tensor.to("cpu:0")` copies, as between devices (weights cannot
be moved there twice: accelerate then finds no parameter). What is held to the undivided model is
the text, the logits from a state, and the caller's state itself.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from anymamba import MambaCache, MambaForCausalLM
from anymamba.modeling.state import LayerState
from tests.support.models import talkative_model, words
from tests.support.tolerance import assert_same

LAYERS = 3


def whole_model() -> MambaForCausalLM:
    """Untied, because accelerate keeps tied weights together."""
    return talkative_model(num_hidden_layers=LAYERS)


def device_map(*devices: str) -> dict[str, str]:
    """The embeddings and then the layers in turn on each device, the rest on the last."""
    places = ["backbone.embeddings", *(f"backbone.layers.{i}" for i in range(LAYERS))]
    shares = {place: devices[i % len(devices)] for i, place in enumerate(places)}
    return {**shares, "backbone.norm_f": devices[-1], "lm_head": devices[-1]}


def hook_each(model: MambaForCausalLM, parts: list[nn.Module], skip: bool) -> MambaForCausalLM:
    for part in parts:
        keys = model._skip_keys_device_placement if skip else None
        add_hook_to_module(part, AlignDevicesHook(torch.device("cpu:0"), skip_keys=keys))
    return model


def saved(model: MambaForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder / "model")
    return folder / "model"


Place = Callable[[MambaForCausalLM, Path], MambaForCausalLM]
PLACEMENTS: dict[str, Place] = {
    "blocks, as from_pretrained": lambda m, _: hook_each(m, [*m.backbone.layers[1:]], skip=True),
    "blocks, nothing skipped": lambda m, _: hook_each(m, [*m.backbone.layers[1:]], skip=False),
    "mixers": lambda m, _: hook_each(m, [b.mixer for b in m.backbone.layers], skip=False),
    "backbone": lambda m, _: hook_each(m, [m.backbone], skip=False),
    "everything": lambda m, _: hook_each(m, [m], skip=False),
    "dispatched": lambda m, _: dispatch_model(m, device_map("cpu"), force_hooks=True),
    "dispatched to disk": lambda m, folder: dispatch_model(
        m, device_map("cpu", "disk"), offload_dir=str(folder)
    ),
    "dispatched to disk, cache skipped": lambda m, folder: dispatch_model(
        m,
        device_map("disk", "cpu"),
        offload_dir=str(folder),
        skip_keys=m._skip_keys_device_placement,
    ),
    "offloaded": lambda m, _: cpu_offload(m, torch.device("cpu")),
    "offloaded to disk": lambda m, folder: disk_offload(m, str(folder), torch.device("cpu")),
    "offloaded as a whole": lambda m, _: cpu_offload_with_hook(m, torch.device("cpu:0"))[0],
    "loaded and dispatched": lambda m, folder: load_checkpoint_and_dispatch(
        m, str(saved(m, folder)), device_map=device_map("cpu", "disk"), offload_folder=str(folder)
    ),
    "from_pretrained": lambda m, folder: MambaForCausalLM.from_pretrained(
        saved(m, folder), device_map={"": "cpu"}
    ),
    "from_pretrained, disk": lambda m, folder: MambaForCausalLM.from_pretrained(
        saved(m, folder), device_map=device_map("cpu", "disk"), offload_folder=folder / "disk"
    ),
}

IDS = words(2, 11)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def text(model: MambaForCausalLM, mask: Tensor | None) -> Tensor:
    found: Tensor = model.generate(
        IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return found


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_divided_model_is_the_undivided_one(name: str, tmp_path: Path) -> None:
    whole = whole_model()
    divided = PLACEMENTS[name](copy.deepcopy(whole), tmp_path).eval()
    for mask in (None, MASK):
        assert torch.equal(text(divided, mask), text(whole, mask))
        with torch.no_grad():
            mine, expected = (MambaCache.for_model(whole, 2) for _ in range(2))
            # The caller's state, by keyword and by place, read masked and token by token.
            divided(IDS, attention_mask=mask, cache=mine)
            whole(IDS, attention_mask=mask, cache=expected)
            for column in words(2, 2, 5).split(1, 1):
                logits = divided(column, None, None, mine).logits
                assert_same(logits, whole(column, None, None, expected).logits)
    assert_same(mine.ssm_states, expected.ssm_states)
    assert_same(mine.conv_states, expected.conv_states)
    assert torch.equal(mine.token_counts, expected.token_counts)


def test_a_layers_state_is_not_movable_and_a_hook_moves_the_cache_in_place() -> None:
    cache = MambaCache.for_model(whole_model())
    assert not hasattr(LayerState, "to")
    before = cache.ssm_states
    assert cache.to("cpu:0", non_blocking=False) is cache
    assert cache.ssm_states is not before  # it was copied, so "cpu:0" is a second device here
