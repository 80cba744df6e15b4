"""Three Mambas with the same weights: the specification, AnyMamba, and Transformers' own.

They share no code, so that what all three agree on is Mamba, and not a mistake made twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.support.tolerance import assert_same, naming
from torch import Tensor, nn

import anymamba
from anymamba import minimal

# Each differs from the default in at least one way that code could overlook.
SHAPES: dict[str, dict[str, object]] = {
    "default": {},
    "odd widths": {"hidden_size": 33, "vocab_size": 101, "expand": 3, "time_step_rank": 5},
    "width 40, not a power of two": {"hidden_size": 40, "vocab_size": 59},
    "one layer": {"num_hidden_layers": 1},
    "state of 1": {"state_size": 1},
    "state of 8, odd width": {"state_size": 8, "hidden_size": 17},
    "state of 64": {"state_size": 64},
    "kernel of 2": {"conv_kernel": 2},
    "biases everywhere": {"use_bias": True, "use_conv_bias": True},
    "no bias at all": {"use_bias": False, "use_conv_bias": False},
    "untied head": {"tie_word_embeddings": False},
    "all at once": {
        "hidden_size": 21,
        "vocab_size": 37,
        "state_size": 5,
        "num_hidden_layers": 4,
        "conv_kernel": 3,
        "expand": 1,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
}
BASE = {"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": None}


@dataclass
class Outcome:
    """What one model made of one batch; names are those of Transformers."""

    logits: Tensor
    loss: Tensor
    layers: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def original_name(name: str) -> str:
    """From Transformers' name of a tensor to `minimal.py`'s."""
    return name.removeprefix("backbone.").replace("embeddings.", "embedding.")


def run_transformers(model: transformers.PreTrainedModel, tokens: Tensor) -> Outcome:
    """Its hidden states are each layer's output, and after them the normed last one."""
    out = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False)
    return Outcome(out.logits, out.loss, list(out.hidden_states[:-1]))


def run_anymamba(model: nn.Module, tokens: Tensor) -> Outcome:
    """Its hidden states are the embeddings' output, and after it each layer's."""
    out = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False)
    embedded, *layers = out.hidden_states
    assert torch.equal(embedded, model.get_input_embeddings()(tokens))
    return Outcome(out.logits, out.loss, layers)


def run_minimal(model: minimal.Mamba, tokens: Tensor) -> Outcome:
    layers: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: layers.append(out)) for block in model.layers
    ]
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return Outcome(logits, loss, layers)


def with_gradients(
    run: Callable[[Any, Tensor], Outcome], model: nn.Module, tokens: Tensor
) -> Outcome:
    outcome = run(model, tokens)
    outcome.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        outcome.gradients[name] = parameter.grad
    return outcome


def transformers_model(shape: dict[str, object]) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**{**BASE, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias zero, no norm weight one, no two rows alike
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def minimal_model(source: transformers.PreTrainedModel) -> minimal.Mamba:
    config = source.config
    model = minimal.Mamba(
        minimal.ModelArgs(
            d_model=config.hidden_size,
            n_layer=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            d_state=config.state_size,
            expand=config.expand,
            dt_rank=config.time_step_rank,
            d_conv=config.conv_kernel,
            pad_vocab_size_multiple=1,
            conv_bias=config.use_conv_bias,
            bias=config.use_bias,
        )
    )
    if not config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    weights = {original_name(name): value for name, value in source.state_dict().items()}
    model.load_state_dict(weights, strict=True)
    return model


def anymamba_model(source: transformers.PreTrainedModel, shape: dict[str, object]) -> nn.Module:
    model = anymamba.MambaForCausalLM(anymamba.MambaConfig(**{**BASE, **shape})).eval()
    model.load_state_dict(source.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_three_models_agree(name: str) -> None:
    shape = SHAPES[name]
    theirs = transformers_model(shape)
    tokens = torch.randint(theirs.config.vocab_size, (2, 19))
    expected = with_gradients(run_transformers, theirs, tokens)
    assert len(expected.layers) == theirs.config.num_hidden_layers
    # Gradients that vanish would agree with anything.
    assert all(gradient.abs().max() > 1e-5 for gradient in expected.gradients.values())

    ours = with_gradients(run_anymamba, anymamba_model(theirs, shape), tokens)
    plain = with_gradients(run_minimal, minimal_model(theirs), tokens)
    for who, actual in {"anymamba": ours, "minimal": plain}.items():
        layers = zip(actual.layers, expected.layers, strict=True)
        with naming(who):
            assert_same(actual.logits, expected.logits)
            assert_same(actual.loss, expected.loss)
        for i, pair in enumerate(layers):
            with naming(f"{who}, output of layer {i}"):
                assert_same(*pair)
        assert len(actual.gradients) == len(expected.gradients)
        for tensor, gradient in expected.gradients.items():
            its_name = original_name(tensor) if who == "minimal" else tensor
            with naming(f"{who}, gradient of {tensor}"):
                assert_same(actual.gradients[its_name], gradient)
