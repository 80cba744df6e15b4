"""The architectures as the contract sees them: shapes, and three models with equal weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tests.support.tolerance import assert_same, naming
from torch import Tensor, nn

import anymamba
from anymamba import minimal, minimal_mamba2

Shapes = Mapping[str, dict[str, Any]]
BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "pad_token_id": None,
}
# Every size is another, and chunks are shorter than the texts.
HEADS = {"state_size": 5, "num_heads": 8, "head_dim": 6, "n_groups": 2, "chunk_size": 8}
# Each differs from the default in at least one way that code could overlook.
SHAPES: Shapes = {
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
SHAPES_OF_HEADS: Shapes = {
    "default": {},
    "one group": {"n_groups": 1},
    "a group for each head": {"n_groups": 8},
    "one head": {"num_heads": 1, "head_dim": 48, "n_groups": 1},
    "heads of width one": {"num_heads": 48, "head_dim": 1},
    "state of 64": {"state_size": 64},
    "state of 1": {"state_size": 1},
    "kernel of 2": {"conv_kernel": 2},
    "biases everywhere": {"use_bias": True, "use_conv_bias": True},
    "no bias at all": {"use_bias": False, "use_conv_bias": False},
    "tied head": {"tie_word_embeddings": True},
    "limited steps": {"time_step_limit": (0.02, 0.4)},
    "chunks longer than the text": {"chunk_size": 256},
    "chunks of one": {"chunk_size": 1},
    "another activation": {"hidden_act": "gelu"},
    "all at once": {
        "hidden_size": 20,
        "expand": 3,
        "num_heads": 4,
        "head_dim": 15,
        "n_groups": 4,
        "conv_kernel": 3,
        "num_hidden_layers": 3,
        "use_bias": True,
        "vocab_size": 37,
    },
}


@dataclass(frozen=True)
class Architecture:
    """`name` is what Transformers' and our classes begin with; `specify` makes the specification's
    model of a config, or is None where it has none."""

    name: str
    base: dict[str, Any]
    shapes: Shapes
    specify: Callable[[Any], nn.Module] | None

    def model(self, library: Any = anymamba, **fields: Any) -> Any:
        """A model with random weights: no bias zero and no two rows alike."""
        torch.manual_seed(0)
        config = getattr(library, f"{self.name}Config")(**self.base | fields)
        model = getattr(library, f"{self.name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return model

    def pair(self, **fields: Any) -> tuple[Any, Any]:
        """Transformers' model and ours with equal weights."""
        theirs, ours = self.model(transformers, **fields), self.model(**fields)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return theirs, ours

    def specification(self, model: Any) -> Any:
        """The specification with the weights of a model, or None."""
        if self.specify is None or model.config.hidden_act != "silu":
            return None
        specified: Any = self.specify(model.config)
        if not model.config.tie_word_embeddings:
            specified.lm_head.weight = nn.Parameter(torch.empty_like(specified.lm_head.weight))
        weights = {original_name(name): value for name, value in model.state_dict().items()}
        specified.load_state_dict(weights, strict=True)
        return specified


def _mamba(config: Any) -> minimal.Mamba:
    return minimal.Mamba(
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


def _mamba2(config: Any) -> minimal_mamba2.Mamba2:
    return minimal_mamba2.Mamba2(minimal_mamba2.args_of(config.to_dict()))


# What only the authors' layout can say, and Transformers' classes do not compute.
OPTIONS: Shapes = {
    "norm before the gate": {"gate_after_norm": True},
    "norm before the gate, one group": {"gate_after_norm": True, "n_groups": 1, "use_bias": True},
    "no norm in the mixer": {"use_gated_norm": False},
}

MAMBA = Architecture("Mamba", BASE, SHAPES, _mamba)
# An epsilon of the norms that no result can be right without.
FALCON_MAMBA = Architecture("FalconMamba", BASE | {"mixer_rms_eps": 0.3}, SHAPES, None)
MAMBA2 = Architecture("Mamba2", BASE | HEADS, SHAPES_OF_HEADS, _mamba2)
ARCHITECTURES = {each.name: each for each in (MAMBA, FALCON_MAMBA, MAMBA2)}
EVERY_SHAPE = [(each.name, shape) for each in ARCHITECTURES.values() for shape in each.shapes]


def tokens(b: int, l: int, seed: int = 1) -> Tensor:
    """(b, l) random token ids."""
    return torch.randint(1, 37, (b, l), generator=torch.Generator().manual_seed(seed))


@dataclass
class Outcome:
    """What one model made of one batch; names are those of Transformers."""

    logits: Tensor
    loss: Tensor
    layers: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def agrees(self, expected: "Outcome") -> None:
        """Hold all that a model made to another's."""
        assert_same(self.logits, expected.logits)
        assert_same(self.loss, expected.loss)
        for i, layers in enumerate(zip(self.layers, expected.layers, strict=True)):
            with naming(f"output of layer {i}"):
                assert_same(*layers)
        assert self.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            with naming(f"gradient of {name}"):
                assert_same(self.gradients[name], gradient)


def original_name(name: str) -> str:
    """From Transformers' name of a tensor to the specifications'."""
    return name.removeprefix("backbone.").replace("embeddings.", "embedding.")


def run_transformers(model: Any, ids: Tensor) -> Outcome:
    """Its hidden states are each layer's output, and after them the normed last one."""
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    return with_gradients(model, Outcome(out.logits, out.loss, list(out.hidden_states[:-1])))


def run_anymamba(model: Any, ids: Tensor) -> Outcome:
    """Its hidden states are the embeddings' output, and after it each layer's."""
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    embedded, *layers = out.hidden_states
    assert torch.equal(embedded, model.get_input_embeddings()(ids))
    return with_gradients(model, Outcome(out.logits, out.loss, layers))


def run_specification(model: Any, ids: Tensor, names: Mapping[str, Tensor]) -> Outcome:
    """Its gradients by Transformers' names, which are those of `names`."""
    layers: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: layers.append(out)) for block in model.layers
    ]
    logits = model(ids)
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    outcome = with_gradients(model, Outcome(logits, loss, layers))
    assert len(outcome.gradients) == len(names)
    outcome.gradients = {name: outcome.gradients[original_name(name)] for name in names}
    return outcome


def with_gradients(model: nn.Module, outcome: Outcome) -> Outcome:
    outcome.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        outcome.gradients[name] = parameter.grad
    return outcome
