"""How weights start: docs/configuration.md states it, and every field does what it says there."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anymamba.modeling import MambaConfig, MambaForCausalLM
from anymamba.modeling.mamba.model import MambaBlock, MambaMixer, MambaRMSNorm

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
EVERYTHING = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "use_bias": True,
    "tie_word_embeddings": False,
}
D, E, N, R, K = 64, 128, 16, 4, 4


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, as lists of cells."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def weights(seed: int = 0, **settings: object) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = MambaForCausalLM(MambaConfig(**{**EVERYTHING, **settings}))
    return {name.removeprefix("backbone."): p.detach() for name, p in model.named_parameters()}


def each(named: dict[str, Tensor], ending: str) -> list[Tensor]:
    found = [tensor for name, tensor in named.items() if name.endswith(ending)]
    assert found
    return found


def assert_uniform(tensor: Tensor, bound: float) -> None:
    """Inside the bound, near it on both sides, and as wide as a uniform distribution is."""
    assert float(tensor.abs().max()) <= bound
    assert float(tensor.min()) < -0.9 * bound
    assert float(tensor.max()) > 0.9 * bound
    # The smallest tensor has 512 entries: its sample deviation is good to about 3 %.
    assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def assert_normal(tensor: Tensor, deviation: float) -> None:
    # 32,000 entries: good to well under 1 %.
    assert float(tensor.mean()) == pytest.approx(0, abs=0.03 * deviation)
    assert float(tensor.std()) == pytest.approx(deviation, rel=0.03)
    # A uniform distribution has nothing beyond 1.74 deviations.
    assert float((tensor.abs() > 2 * deviation).float().mean()) == pytest.approx(0.0455, abs=0.01)


def test_the_page_lists_every_field_with_its_default() -> None:
    stated = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in table("Fields")}
    assert list(stated) == list(MambaConfig.__annotations__)
    for name, value in stated.items():
        assert value == getattr(MambaConfig, name), name


def test_the_page_lists_every_tensor_with_its_shape() -> None:
    sizes = {"v": 500, "d": D, "e": E, "n": N, "r": R, "k": K}
    stated = {}
    for name, shape, _ in table("How each tensor starts"):
        expression = re.sub(r"(\d)([a-z])", r"\1 * \2", shape)
        stated[name.strip("`")] = tuple(eval(expression, {}, sizes))
    found = {re.sub(r"\.\d+\.", ".*.", name): tuple(t.shape) for name, t in weights().items()}
    assert stated == found


@pytest.mark.parametrize("deviation", [0.1, 0.02])
def test_embeddings_and_head(deviation: float) -> None:
    named = weights(initializer_range=deviation)
    assert_normal(named["embeddings.weight"], deviation)
    assert_normal(named["lm_head.weight"], deviation)
    assert not torch.equal(named["embeddings.weight"], named["lm_head.weight"])


def test_projections_and_convolution() -> None:
    named = weights(initializer_range=7.0)  # which must not concern them
    for ending, fan_in in (("in_proj.weight", D), ("x_proj.weight", E), ("out_proj.weight", E)):
        for tensor in each(named, ending):
            assert_uniform(tensor, 1 / math.sqrt(fan_in))
    for tensor in each(named, "conv1d.weight"):
        assert_uniform(tensor, 1 / math.sqrt(K))
    for ending in ("in_proj.bias", "out_proj.bias", "conv1d.bias"):
        assert all(not tensor.any() for tensor in each(named, ending))
    for ending in ("norm.weight", "norm_f.weight", "mixer.D"):
        assert all(bool((tensor == 1).all()) for tensor in each(named, ending))


def test_rescaled_residual_projections() -> None:
    named = weights(rescale_prenorm_residual=True)
    for tensor in each(named, "out_proj.weight"):
        assert_uniform(tensor, 1 / math.sqrt(E) / math.sqrt(4))
    for tensor in each(named, "in_proj.weight"):
        assert_uniform(tensor, 1 / math.sqrt(D))


@pytest.mark.parametrize("state_size", [1, 16])
def test_s4d_real(state_size: int) -> None:
    for tensor in each(weights(state_size=state_size), "A_log"):
        expected = torch.arange(1.0, state_size + 1).expand(E, state_size)
        # One rounding of log and one of exp.
        assert torch.allclose(tensor.exp(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["random", "uniform", "constant"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_step_size_weights(scheme: str, scale: float) -> None:
    named = weights(time_step_init_scheme=scheme, time_step_scale=scale)
    bound = scale / math.sqrt(R)
    for tensor in each(named, "dt_proj.weight"):
        if scheme == "constant":
            assert torch.allclose(tensor, torch.tensor(bound), rtol=1e-6, atol=0)
        else:
            assert_uniform(tensor, bound)


@pytest.mark.parametrize(
    ("low", "high", "floor"), [(0.001, 0.1, 1e-4), (0.01, 1.0, 1e-4), (0.001, 0.1, 0.02)]
)
def test_step_size_biases(low: float, high: float, floor: float) -> None:
    named = weights(time_step_min=low, time_step_max=high, time_step_floor=floor)
    steps = torch.cat([torch.nn.functional.softplus(b) for b in each(named, "dt_proj.bias")])
    # The inverse of softplus is good to a few float32 roundings at these sizes.
    assert float(steps.min()) >= max(low, floor) * (1 - 1e-4)
    assert float(steps.max()) <= high * (1 + 1e-4)
    if floor <= low:
        # Log-uniform: half of the 512 steps lie below the geometric mean.
        below = float((steps < math.sqrt(low * high)).float().mean())
        assert below == pytest.approx(0.5, abs=0.1)
    else:
        share = math.log(floor / low) / math.log(high / low)
        at_floor = float((steps < floor * 1.001).float().mean())
        assert at_floor == pytest.approx(share, abs=0.1)


def test_layers_start_apart_and_a_seed_repeats() -> None:
    named, again = weights(seed=3), weights(seed=3)
    assert all(torch.equal(named[name], again[name]) for name in named)
    first, second = each(named, "in_proj.weight")[:2]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [MambaMixer, MambaBlock, MambaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_by_itself_starts_as_in_a_model(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Memory that was never written is NaN here; every weight has its place's bounds in a model."""
    config = MambaConfig(**EVERYTHING)
    in_a_model = weights()
    usual, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        module = kind(D) if kind is MambaRMSNorm else kind(config, 0)
    finally:
        torch.set_default_dtype(usual)
        torch.use_deterministic_algorithms(deterministic)
    beginning = {MambaMixer: "layers.0.mixer.", MambaBlock: "layers.0.", MambaRMSNorm: "norm_f."}
    for name, weight in module.named_parameters():
        expected = in_a_model[beginning[kind] + name]
        actual = weight.detach().float()
        assert actual.isfinite().all()
        # Drawn anew: within a tenth of the same range; what is not drawn is equal up to bfloat16.
        spread = float(expected.max() - expected.min())
        assert float(actual.min()) == pytest.approx(float(expected.min()), abs=0.1 * spread + 0.01)
        assert float(actual.max()) == pytest.approx(float(expected.max()), abs=0.1 * spread + 0.01)
        assert float(actual.std()) == pytest.approx(float(expected.std()), rel=0.25, abs=1e-3)


def test_a_module_on_the_meta_device() -> None:
    config = MambaConfig(**EVERYTHING)
    with torch.device("meta"):
        assert MambaBlock(config, 0).mixer.A_log.is_meta
