"""A class's forward, or what it calls, is replaced: with and without gradients that counts."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from anymamba import MambaForCausalLM, MambaModel
from anymamba.modeling.fused import why_not_fused
from anymamba.modeling.mamba.model import MambaBlock, MambaMixer, MambaRMSNorm
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

IDS = words(2, 9)
PATCHES = [
    *((kind, "forward") for kind in (nn.Linear, nn.Conv1d, nn.Embedding, SiLUActivation)),
    *((kind, "forward") for kind in (MambaRMSNorm, MambaMixer, MambaBlock)),
    (nn.Linear, "__call__"),
    (nn.Conv1d, "_call_impl"),
    (MambaMixer, "__call__"),
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (functional, "linear"),
    (functional, "conv1d"),
    (functional, "embedding"),
    (functional, "silu"),
]


def halved(original: Any) -> Any:
    """The same function, whose tensors are half of what they were."""

    def half(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return found * 0.5 if isinstance(found, Tensor) else found

    return half


def without_gradients(model: MambaForCausalLM) -> tuple[Tensor, Tensor]:
    """Logits of a prompt, and of its last token from a state."""
    with torch.no_grad():
        whole = model(IDS).logits
        cache = model(IDS[:, :-1], use_cache=True).cache
        return whole, model(IDS[:, -1:], cache=cache).logits


@pytest.mark.parametrize(
    ("owner", "name"), PATCHES, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_a_replaced_function_counts(
    owner: Any, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(use_bias=True)
    usual = model(IDS).logits.detach()
    if when == "after it":
        without_gradients(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, halved(getattr(owner, name)))
        expected = model(IDS).logits.detach()  # with gradients
        assert float((expected - usual).abs().max()) > 1e-3
        assert why_not_fused(model) is not None
        whole, last = without_gradients(model)
        assert_same(whole, expected)
        assert_same(last, expected[:, -1:])
    # And the native calls are back, with what they gave before.
    assert why_not_fused(model) is None
    assert_same(without_gradients(model)[1], usual[:, -1:])


def test_the_reason_names_what_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    with monkeypatch.context() as patch:
        patch.setattr(MambaRMSNorm, "forward", lambda self, x: x)
        assert why_not_fused(model) == "norm_f: the forward of MambaRMSNorm was replaced"
    monkeypatch.setattr(functional, "linear", halved(functional.linear))
    assert why_not_fused(model) == "lm_head: torch.nn.functional.linear was replaced"


@pytest.mark.slow
def test_replaced_before_the_import() -> None:
    """A profiler that patches PyTorch first is no less heard."""
    program = """
from torch import nn
original, calls = nn.Linear.forward, []
nn.Linear.forward = lambda self, x: (calls.append(1), original(self, x))[1]
import torch
from anymamba import MambaConfig, MambaForCausalLM
model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
with torch.no_grad():
    model(torch.tensor([[1, 2]]))
assert len(calls) == 5, calls
"""
    subprocess.run([sys.executable, "-c", program], check=True)


class WithOwnMixer(MambaMixer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * super().forward(*args, **kwargs)


class WithOwnBackbone(MambaForCausalLM):
    """A program's own model: a mixer of its own and a head of another width."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for place, block in enumerate(self.backbone.layers):
            block.mixer = WithOwnMixer(config, place)


class OwnPass(MambaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output


class WithOwnPass(MambaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = OwnPass(config)
        self.post_init()


class OwnHead(MambaForCausalLM):
    """A plain head, of fewer outputs than there are tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, 5, bias=False)


@pytest.mark.parametrize("kind", [WithOwnBackbone, WithOwnPass, OwnHead])
def test_subclasses_are_not_bypassed(kind: type[MambaForCausalLM]) -> None:
    config = small_model(tie_word_embeddings=False).config
    torch.manual_seed(0)
    model = kind(config).eval()
    expected = model(IDS).logits.detach()
    whole, last = without_gradients(model)
    assert_same(whole, expected)
    assert_same(last, expected[:, -1:])
