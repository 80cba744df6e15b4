"""Models with weights of 8 and 4 bits: operator, layers, folders, and the native calls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import MambaCache, MambaForCausalLM, _core, ops
from anymamba.checkpoint.quantization import dequantize, quantize
from anymamba.errors import BackendError, InputError
from anymamba.modeling.fused import why_not_fused
from anymamba.modeling.quantized import QuantizedLinear
from anymamba.ops.quantized_linear import reference
from tests.support.files import LARGE, write_quantized
from tests.support.instruction_sets import kernels_of
from tests.support.models import small_model, words
from tests.support.tolerance import assert_contract, assert_same

# Kernels are held to the contract one by one, below. Through a whole model a last bit may carry an
# activation over a border of its rounding: it then moves by 1/127 of its group's largest, and what
# follows with it. A wrong kernel or a wrong weight is off by as much as the logits are large.
ONE_ROUNDING = 0.02


def parts_of(weight: Tensor, bits: int, group: int, symmetric: bool) -> dict[str, Tensor]:
    made = quantize(weight.detach().numpy(), bits, group, symmetric)
    parts = {
        "weight_q": torch.from_numpy(made.q),
        "weight_scales": torch.from_numpy(made.scales).view(torch.bfloat16),
    }
    if made.minima is not None:
        parts["weight_minima"] = torch.from_numpy(made.minima).view(torch.bfloat16)
    return parts


def write_folder(
    folder: Path,
    bits: int = 8,
    group: int = 32,
    symmetric: bool = True,
    quantized: tuple[str, ...] = LARGE,
    **fields: Any,
) -> tuple[MambaForCausalLM, MambaForCausalLM]:
    """A quantized folder; the model it was made of, and one with the same weights dequantized."""
    model, widened_model = (small_model(0, **({"hidden_size": 64} | fields)) for _ in range(2))
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    config = model.config.to_dict()
    write_quantized(folder, config, weights, bits, group, symmetric, quantized)
    for name, weight in widened_model.state_dict().items():
        if name in weights and name.endswith(quantized):
            made = quantize(weights[name], bits, group, symmetric)
            weight.copy_(torch.from_numpy(dequantize(made)))
    return model, widened_model


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([8, 4]),
    symmetric=st.booleans(),
)
def test_the_operator_against_the_reference(
    rows: int, n: int, groups: int, group: int, bits: int, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + n)
    x = torch.randn(rows, groups * group, generator=generator)
    parts = parts_of(torch.randn(n, groups * group, generator=generator), bits, group, symmetric)
    arguments = (parts["weight_q"], parts["weight_scales"], parts.get("weight_minima"))
    bias = torch.randn(n, generator=generator)
    expected = ops.quantized_linear(x, *arguments, bias, backend="reference")
    # Whole numbers inside a group: only the order of float32 sums over groups differs.
    assert_contract(ops.quantized_linear(x, *arguments, bias, backend="cpu"), expected)


def test_the_reference_widens_as_the_format_says() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    for bits in (8, 4):
        for symmetric in (True, False):
            made = quantize(weight, bits, 64, symmetric)  # type: ignore[arg-type]
            parts = parts_of(torch.from_numpy(weight), bits, 64, symmetric)
            wide = reference.dequantize(
                parts["weight_q"], parts["weight_scales"], parts.get("weight_minima"), 128
            )
            # One rounding more or less of scale * q + minimum.
            np.testing.assert_allclose(wide.numpy(), dequantize(made), rtol=1e-6, atol=1e-6)


def test_the_gradient_passes_by_the_rounding() -> None:
    parts = parts_of(torch.randn(5, 64), 8, 32, symmetric=True)
    arguments = (parts["weight_q"], parts["weight_scales"], None)
    gradients = []
    for backend in ("cpu", "reference"):
        x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).requires_grad_()
        bias = torch.zeros(5, requires_grad=True)
        y = ops.quantized_linear(x, *arguments, bias, backend=backend)
        (y * torch.arange(15.0).reshape(3, 5)).sum().backward()
        gradients.append((x.grad, bias.grad))
    for ours, expected in zip(*gradients, strict=True):
        assert ours is not None
        assert_same(ours, expected)


def test_the_operator_passes_opcheck() -> None:
    parts = parts_of(torch.randn(5, 64), 4, 32, symmetric=False)
    operator = torch.ops.anymamba.quantized_linear.default
    arguments = (torch.randn(3, 64, requires_grad=True), *parts.values(), torch.randn(5))
    torch.library.opcheck(operator, arguments)


def test_what_does_not_fit_is_refused() -> None:
    q, scales = torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 2, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="do not fit rows of 50"):
        ops.quantized_linear(torch.zeros(1, 50), q, scales)
    with pytest.raises(InputError, match="scales"):
        ops.quantized_linear(torch.zeros(1, 64), q, scales[:2])
    with pytest.raises(BackendError):
        ops.quantized_linear(torch.zeros(1, 64), q, scales, backend="nothing")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_loads_and_runs_natively(
    tmp_path: Path, bits: int, symmetric: bool, tied: bool
) -> None:
    _, expected_model = write_folder(
        tmp_path, bits, 32, symmetric, tie_word_embeddings=tied, use_bias=True
    )
    model = MambaForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model.backbone.layers[0].mixer.in_proj, QuantizedLinear)
    assert why_not_fused(model) is None
    ids = words(2, 20)
    with torch.no_grad():
        logits = model(ids).logits
        modules = model(ids, output_hidden_states=True).logits
        expected = expected_model(ids).logits
        with ops.backend("reference"):
            reference = model(ids).logits
    assert_same(modules, reference, ONE_ROUNDING)
    assert_same(logits, reference, ONE_ROUNDING)
    # Against the same weights with activations that are not rounded to 8 bits.
    assert_same(logits, expected, 0.05)


def test_steps_continue_a_prompt(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    ids = words(2, 12)
    cache = MambaCache(model.config, 2, torch.float32)
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(ids[:, t : t + 1], cache=cache).logits for t in range(12)]
    assert_same(torch.cat(pieces, 1), whole, ONE_ROUNDING)


def test_generate(tmp_path: Path) -> None:
    write_folder(tmp_path, bits=4)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    text = model.generate(words(2, 5), max_new_tokens=6, do_sample=False)
    assert text.shape == (2, 11)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a", bits=4)
    model = MambaForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    again = MambaForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(model(words(1, 9)).logits, again(words(1, 9)).logits)


def test_to_another_type_leaves_the_format_alone(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16).float()
    assert model.backbone.layers[0].mixer.in_proj.weight_scales.dtype == torch.bfloat16
    with torch.no_grad():
        model(words(1, 3))


def test_arguments_that_mean_nothing_here(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(InputError, match="dtype"):
        MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch_dtype", torch.float16),
        ("device_map", {"backbone": "cpu", "lm_head": "cuda:0"}),
        ("device_map", {"": "disk"}),
        ("quantization_config", {"quant_method": "torchao"}),
        ("use_kernels", True),
        ("attn_implementation", "sdpa"),
        ("ignore_mismatched_sizes", True),
    ],
)
def test_arguments_that_a_quantized_model_cannot_meet(
    tmp_path: Path, name: str, value: object
) -> None:
    write_folder(tmp_path)
    with pytest.raises(InputError, match=f"^{name}(:| is) "):
        MambaForCausalLM.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize("places", [0, "cuda", {"backbone": 0, "lm_head": "cuda:0"}])
def test_one_device_that_is_not_there(tmp_path: Path, places: Any) -> None:
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without a GPU")
    write_folder(tmp_path)
    with pytest.raises(BackendError, match="there is no device 'cuda:0' here"):
        MambaForCausalLM.from_pretrained(tmp_path, device_map=places)


def test_what_a_quantized_folder_says_of_generating_counts(tmp_path: Path) -> None:
    write_folder(tmp_path)
    transformers.GenerationConfig(max_new_tokens=3).save_pretrained(tmp_path)
    options = {"device_map": "cpu", "dtype": "auto", "output_loading_info": True}
    model, info = MambaForCausalLM.from_pretrained(tmp_path, **options)
    assert model.generation_config.max_new_tokens == 3
    assert not info["missing_keys"]


def test_the_step_sees_a_replaced_weight(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    cache = MambaCache(model.config, 1, torch.float32)
    with torch.no_grad():
        before = model(words(1, 1), cache=cache.clone()).logits
        mixer = model.backbone.layers[0].mixer
        mixer.in_proj.weight_q = 255 - mixer.in_proj.weight_q
        after = model(words(1, 1), cache=cache.clone()).logits
    assert not torch.allclose(before, after)


def test_every_isa_gives_the_same_rounding(tmp_path: Path) -> None:
    write_folder(tmp_path, bits=4)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    results = []
    for isa in _core.isas():
        with kernels_of(isa), torch.no_grad():
            results.append(model(words(1, 30)).logits)
    for other in results[1:]:
        assert_same(other, results[0], ONE_ROUNDING)


def test_transformers_refuses_the_folder(tmp_path: Path) -> None:
    """It must not fill the weights that it does not find with random numbers."""
    from transformers import MambaForCausalLM as TheirMamba

    write_folder(tmp_path)
    with pytest.raises(ValueError, match="quant"):
        TheirMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [1e-38, 1e-32, 1e-29])
def test_tiny_activations(size: float) -> None:
    parts = parts_of(torch.randn(5, 64), 8, 32, symmetric=True)
    x = torch.full((2, 64), size)
    for backend in ("cpu", "reference"):
        y = ops.quantized_linear(x, parts["weight_q"], parts["weight_scales"], backend=backend)
        assert y.isfinite().all()
        assert y.abs().max() <= 64 * 5 * size


def test_a_table_that_is_not_quantized_is_the_head_too(tmp_path: Path) -> None:
    """As where a model's width is no multiple of the group."""
    projections = ("in_proj.weight", "out_proj.weight")
    _, expected = write_folder(tmp_path, quantized=projections, tie_word_embeddings=True)
    model = MambaForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    ids = words(1, 9)
    assert_same(model.to("cpu")(ids).logits, expected(ids).logits, ONE_ROUNDING)
