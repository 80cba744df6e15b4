"""The norms and the gated activation under the original's names, against formulas in numpy."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from anymamba.dropin.mamba_ssm.ops.triton import layer_norm, layernorm_gated
from anymamba.dropin.mamba_ssm.ops.triton.k_activations import SwiGLU, swiglu
from anymamba.dropin.mamba_ssm.ops.triton.softplus import softplus
from anymamba.errors import InputError
from tests.support.tolerance import assert_contract, assert_gradient

Numbers = NDArray[np.float64]
D = 12


def numbers(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double().numpy()


def normed(x: Numbers, weight: Numbers, bias: Numbers | None, eps: float, rms: bool) -> Numbers:
    """Row by row."""
    out = np.empty_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        row = x[place] if rms else x[place] - x[place].mean()
        out[place] = row / np.sqrt((row * row).mean() + eps) * weight
    return out if bias is None else out + bias


def silu(x: Numbers) -> Numbers:
    return x / (1 + np.exp(-x))


def tensors(dtype: torch.dtype = torch.float32, *shape: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = ("x", "residual", "x1", "z")
    found = {name: torch.randn(*(shape or (2, 5, D)), generator=g).to(dtype) for name in rows}
    gains = ("weight", "bias", "weight1", "bias1")
    return found | {name: torch.randn(D, generator=g).to(dtype) for name in gains}


NORMS = {
    "layer": (layer_norm.layer_norm_fn, layer_norm.layer_norm_ref, False),
    "rms": (layer_norm.rms_norm_fn, layer_norm.rms_norm_ref, True),
}
FLAGS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("residual", "second_input", "second_gain", "bias"), FLAGS)
def test_norm_of_a_sum(
    kind: str, residual: bool, second_input: bool, second_gain: bool, bias: bool
) -> None:
    t = tensors()
    left_out = {
        "residual": residual,
        "x1": second_input,
        "weight1": second_gain,
        "bias1": second_gain and bias,
        "bias": bias,
    }
    call: dict[str, Any] = {n: t[n] if left_out.get(n, True) else None for n in t if n != "z"}
    function, reference, rms = NORMS[kind]
    total = sum(numbers(call[n]) for n in ("x", "residual", "x1") if call[n] is not None)
    expected = [normed(total, numbers(t["weight"]), numbers(call["bias"]), 1e-3, rms)]
    if second_gain:
        expected.append(normed(total, numbers(t["weight1"]), numbers(call["bias1"]), 1e-3, rms))
    for compute in (function, reference):
        out = compute(**call, eps=1e-3)
        for one, other in zip(out if second_gain else [out], expected, strict=True):
            assert_contract(one, torch.from_numpy(other))
        *_, kept = compute(**call, eps=1e-3, prenorm=True)
        assert_contract(kept, torch.from_numpy(total))


@pytest.mark.parametrize("kind", NORMS)
def test_rows_may_be_scaled(kind: str) -> None:
    t, scale = tensors(), torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).repeat(2, 1)
    total = numbers(t["x"]) * numbers(scale)[..., None] + numbers(t["residual"])
    for compute in NORMS[kind][:2]:
        call = (t["x"], t["weight"], t["bias"], t["residual"])
        out, kept = compute(*call, eps=1e-3, rowscale=scale, prenorm=True)
        expected = normed(total, *(numbers(t[n]) for n in ("weight", "bias")), 1e-3, kind == "rms")
        assert_contract(out, torch.from_numpy(expected))
        assert_contract(kept, torch.from_numpy(total))


@pytest.mark.parametrize("kind", NORMS)
def test_dropout_says_what_it_kept(kind: str) -> None:
    torch.manual_seed(0)
    t = tensors(torch.float32, 200, D)
    function, reference, rms = NORMS[kind]
    call = (t["x"], t["weight"], t["bias"], t["residual"], t["x1"])
    options: dict[str, Any] = {"eps": 1e-3, "dropout_p": 0.25, "prenorm": True}
    out, total, kept, kept1 = function(*call, **options, return_dropout_mask=True)
    for mask in (kept, kept1):
        # The share of 2,400 draws strays by more than 0.03 once in a thousand runs; a seed is set.
        assert abs(float(mask.float().mean()) - 0.75) < 0.03
    assert not torch.equal(kept, kept1)
    parts = numbers(t["x"]) * numbers(kept) / 0.75 + numbers(t["x1"]) * numbers(kept1) / 0.75
    parts += numbers(t["residual"])
    assert_contract(total, torch.from_numpy(parts))
    gains = (numbers(t["weight"]), numbers(t["bias"]))
    assert_contract(out, torch.from_numpy(normed(parts, *gains, 1e-3, rms)))
    again, _ = reference(*call, **options, dropout_mask=kept, dropout_mask1=kept1)
    assert_contract(again, out)
    assert reference(*call, **options)[0].shape == out.shape
    assert function(*call, return_dropout_mask=True)[1:] == (None, None)


@pytest.mark.parametrize("kind", NORMS)
def test_types_of_output_and_sum(kind: str) -> None:
    half, wide = tensors(torch.bfloat16), tensors()
    function = NORMS[kind][0]
    gains = (wide["weight"], wide["bias"])
    for residual, in_fp32, of_sum in [
        (None, False, torch.bfloat16),
        (None, True, torch.float32),
        (half["residual"], True, torch.bfloat16),
        (wide["residual"], False, torch.float32),
    ]:
        out, total = function(
            half["x"], *gains, residual, eps=1e-3, prenorm=True, residual_in_fp32=in_fp32
        )
        assert (out.dtype, total.dtype) == (torch.bfloat16, of_sum)
        expected = numbers(half["x"]) + (0 if residual is None else numbers(residual))
        assert_contract(total, torch.from_numpy(expected))
        expected = normed(expected, *map(numbers, gains), 1e-3, kind == "rms")
        assert_contract(out, torch.from_numpy(expected))


@pytest.mark.parametrize("kind", NORMS)
def test_gradients(kind: str) -> None:
    t = {k: v.double().requires_grad_() for k, v in tensors(torch.float32, 2, D).items()}
    names = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    function = NORMS[kind][0]

    def run(*values: Tensor) -> Any:
        return function(*values, eps=1e-3, prenorm=True)

    assert torch.autograd.gradcheck(run, [t[n] for n in names], fast_mode=True)
    single = {n: t[n].detach().float().requires_grad_() for n in names}
    for leaves in (t, single):
        sum(out.sin().sum() for out in run(*(leaves[n] for n in names))).backward()
    for n in names:
        assert_gradient(single[n].grad, t[n].grad)


def test_module_and_class_names() -> None:
    t = tensors()
    norm = layer_norm.RMSNorm(D, eps=1e-3, dropout_p=0.5)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    torch.manual_seed(0)
    dropped = norm(t["x"], t["residual"], prenorm=True, residual_in_fp32=True)[1]
    assert not torch.equal(dropped, t["x"] + t["residual"])
    norm.eval()
    expected = normed(numbers(t["x"]), np.ones(D), None, 1e-3, rms=True)
    assert_contract(norm(t["x"]), torch.from_numpy(expected))
    call = (t["x"], t["weight"], t["bias"])
    assert torch.equal(layer_norm.LayerNormFn.apply(*call), layer_norm.layer_norm_fn(*call))


@pytest.mark.parametrize("rms", [False, True])
def test_norm_and_linear(rms: bool) -> None:
    t, weight = tensors(), torch.randn(3, D)
    bias = torch.randn(3)
    call = (t["x"], t["weight"], t["bias"], weight, bias, t["residual"], 1e-3, True, False, rms)
    total = numbers(t["x"]) + numbers(t["residual"])
    inner = normed(total, numbers(t["weight"]), numbers(t["bias"]), 1e-3, rms)
    out, kept = layer_norm.layer_norm_linear_fn(*call)
    assert_contract(out, torch.from_numpy(inner @ numbers(weight).T + numbers(bias)))
    assert_contract(kept, torch.from_numpy(total))
    assert torch.equal(layer_norm.LayerNormLinearFn.apply(*call)[0], out)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm.layer_norm_linear_fn(*call)[0].dtype == torch.bfloat16


GATED = list(itertools.product([False, True], [None, 3, D], [False, True], [False, True]))


def gated_by_hand(
    t: dict[str, Tensor], rms: bool, group: int | None, gate_last: bool, with_bias: bool
) -> Tensor:
    x, z = numbers(t["x"]), numbers(t["z"])
    x = x if gate_last else x * silu(z)
    weight, bias = numbers(t["weight"]), numbers(t["bias"] if with_bias else None)
    spans = [slice(i, i + (group or D)) for i in range(0, D, group or D)]
    parts = [
        normed(x[..., s], weight[s], None if bias is None else bias[s], 1e-3, rms) for s in spans
    ]
    out = np.concatenate(parts, -1)
    return torch.from_numpy(out * silu(z) if gate_last else out)


@pytest.mark.parametrize(("rms", "group", "gate_last", "with_bias"), GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_norms(
    rms: bool, group: int | None, gate_last: bool, with_bias: bool, dtype: torch.dtype
) -> None:
    t = tensors(dtype)
    expected = gated_by_hand(t, rms, group, gate_last, with_bias)
    call = (t["x"], t["weight"], t["bias"] if with_bias else None, t["z"], 1e-3, group, gate_last)
    out = layernorm_gated.layernorm_fn(*call, rms)
    assert out.dtype == dtype
    assert_contract(out, expected)
    assert torch.equal(layernorm_gated.LayerNormFn.apply(*call, rms), out)
    if rms:
        assert torch.equal(layernorm_gated.rmsnorm_fn(*call), out)
        assert_contract(layernorm_gated.rms_norm_ref(*call), expected)


@pytest.mark.parametrize(("rms", "group", "gate_last", "with_bias"), GATED)
def test_gradients_of_gated_norms(
    rms: bool, group: int | None, gate_last: bool, with_bias: bool
) -> None:
    t = {k: v.double().requires_grad_() for k, v in tensors(torch.float32, 2, D).items()}

    def run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        offset = bias if with_bias else None
        return layernorm_gated.layernorm_fn(x, weight, offset, z, 1e-3, group, gate_last, rms)

    leaves = [t[n] for n in ("x", "weight", "bias", "z")]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    for some in (leaves, single):
        run(*some).sin().sum().backward()
    for one, other in zip(single, leaves, strict=True):
        if other.grad is not None:
            assert_gradient(one.grad, other.grad)


@pytest.mark.parametrize("rms", [False, True])
def test_gated_modules(rms: bool) -> None:
    t = tensors()
    norm = (layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm)(D, 1e-3, 3, False)
    assert [name for name, _ in norm.named_parameters()] == ["weight"] + ["bias"] * (not rms)
    ones = t | {"weight": torch.ones(D), "bias": torch.zeros(D)}
    assert_contract(norm(t["x"], t["z"]), gated_by_hand(ones, rms, 3, False, True))
    assert norm(t["x"]).shape == t["x"].shape


def test_no_rows_are_no_trouble() -> None:
    t = tensors(torch.float32, 0, 5, D)
    assert layer_norm.rms_norm_fn(t["x"], t["weight"], None, t["residual"]).shape == (0, 5, D)
    for group in (None, 3):
        out = layernorm_gated.rmsnorm_fn(t["x"], t["weight"], None, t["z"], group_size=group)
        assert out.shape == (0, 5, D)


def test_activations() -> None:
    xy = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    out = swiglu(xy)
    values = numbers(xy)
    assert_contract(out, torch.from_numpy(silu(values[..., :7]) * values[..., 7:]))
    assert torch.equal(SwiGLU.apply(xy), out)
    assert torch.autograd.gradcheck(swiglu, xy, fast_mode=True)
    assert_contract(softplus(xy), torch.from_numpy(np.log1p(np.exp(values))))


ROWS, GAIN = torch.ones(2, D), torch.ones(D)
BAD_CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "weight has shape": (layer_norm.layer_norm_fn, (ROWS, GAIN[:3], None), {}),
    "bias1 has shape": (layer_norm.rms_norm_fn, (ROWS, GAIN, None), {"bias1": ROWS}),
    "residual has shape": (layer_norm.rms_norm_ref, (ROWS, GAIN, None, GAIN), {}),
    "rowscale has shape": (layer_norm.rms_norm_fn, (ROWS, GAIN, None), {"rowscale": ROWS}),
    "rowscale cannot come with x1": (
        layer_norm.layer_norm_ref,
        (ROWS, GAIN, None),
        {"rowscale": ROWS[:, 0], "x1": ROWS},
    ),
    "z has shape": (layernorm_gated.rmsnorm_fn, (ROWS, GAIN, None, GAIN), {}),
    "groups of 5 channels do not divide all 12": (
        layernorm_gated.layernorm_fn,
        (ROWS, GAIN, None),
        {"group_size": 5},
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message: str) -> None:
    function, arguments, options = BAD_CALLS[message]
    with pytest.raises(InputError, match=message):
        function(*arguments, **options)
