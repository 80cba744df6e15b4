"""The compiled extensions under their own names: both passes against the recurrence in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba.dropin import causal_conv1d_cuda, selective_scan_cuda
from anymamba.dropin.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_ref,
    causal_conv1d_update_ref,
)
from anymamba.dropin.causal_conv1d.cpp_functions import causal_conv1d_bwd_function
from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from anymamba.errors import ArgumentError
from tests.dropin.test_selective_scan import inputs, leaves
from tests.support.tolerance import assert_contract, assert_each, assert_gradient

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan_inputs(
    l: int = 9, form: str = "2 groups", is_complex: bool = False, n: int = 3
) -> dict[str, Tensor]:
    call = inputs((2, 4, l, n), form, form, is_complex)
    return {name: call[name] for name in NAMES}


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, which the tolerances are for."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


CASES: list[tuple[dict[str, Any], tuple[str, ...], bool]] = [
    ({}, (), True),
    ({"form": "constant"}, ("z",), False),
    ({"is_complex": True}, ("D", "delta_bias"), True),
    ({"form": "constant", "is_complex": True}, (), True),
    ({"l": 1}, ("D", "z", "delta_bias"), False),
]


@pytest.mark.parametrize(("sizes", "missing", "softplus"), CASES)
def test_both_passes_of_the_scan(
    sizes: dict[str, Any], missing: tuple[str, ...], softplus: bool
) -> None:
    call: dict[str, Tensor | None] = {**scan_inputs(**sizes), **dict.fromkeys(missing)}
    if not softplus:
        call["delta"] = call["delta"].abs()
    wide = leaves(call, wide=True)
    expected = selective_scan_ref(**wide, delta_softplus=softplus)
    before_gate, last = selective_scan_ref(
        **{**wide, "z": None}, delta_softplus=softplus, return_last_state=True
    )
    out, x, *out_z = selective_scan_cuda.fwd(*call.values(), softplus)
    assert_contract(out, before_gate)
    assert_contract(real(x[:, :, -1, 1::2]), real(last))
    assert len(out_z) == (call["z"] is not None)
    for gated in out_z:
        assert_contract(gated, expected)

    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    names = [name for name in NAMES if call[name] is not None]
    expected_gradients = dict(
        zip(
            names,
            torch.autograd.grad(expected, [wide[n] for n in names], dout.double()),
            strict=True,
        )
    )
    place = None if call["z"] is None else torch.empty_like(call["z"])
    found = selective_scan_cuda.bwd(*call.values(), dout, x, out, place, softplus, bool(out_z))
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", *(("z",) if out_z else ()))
    for name, gradient in zip(order, found, strict=False):
        if call[name] is None:
            assert gradient is None
        else:
            assert gradient.dtype == call[name].dtype
            assert_gradient(real(gradient), real(expected_gradients[name]))
    if out_z:
        assert found[7] is place
        assert_contract(found[8], expected)
    assert len(found) == len(order) + bool(out_z)


def test_states_after_each_chunk_of_a_long_sequence() -> None:
    """2048 steps a chunk, as the original's backward pass wants them."""
    call = {**scan_inputs(l=4100, n=1), "z": None}
    out, x = selective_scan_cuda.fwd(*call.values(), True)
    assert x.shape == (2, 4, 3, 2)
    for chunk, stop in enumerate((2048, 4096, 4100)):
        part = {
            name: t[..., :stop] if name in ("u", "delta", "B", "C") else t
            for name, t in call.items()
        }
        expected, last = selective_scan_ref(**part, delta_softplus=True, return_last_state=True)
        assert_contract(out[..., :stop], expected)
        assert_contract(x[:, :, chunk, 1::2], last)
        steps = torch.nn.functional.softplus(part["delta"] + call["delta_bias"][:, None])
        decay = torch.exp(steps.sum(-1, keepdim=True) * call["A"])
        assert_contract(x[:, :, chunk, 0::2], decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scan_in_half_precision(dtype: torch.dtype) -> None:
    call = scan_inputs()
    half = {n: t.to(dtype) if n in ("u", "delta", "B", "C", "z") else t for n, t in call.items()}
    out, _, out_z = selective_scan_cuda.fwd(*half.values(), True)
    assert out.dtype == out_z.dtype == dtype
    assert_contract(out_z, selective_scan_ref(**leaves(half, wide=True), delta_softplus=True))
    du, *_ = selective_scan_cuda.bwd(
        *half.values(), torch.ones_like(out), None, out, None, True, False
    )
    assert du.dtype == dtype


def conv_inputs(width: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 5, 7, generator=g),
        "weight": torch.randn(5, width, generator=g),
        "bias": torch.randn(5, generator=g),
        "initial": torch.randn(2, 5, width - 1, generator=g),
    }


@pytest.mark.parametrize("silu", [False, True])
def test_the_convolution_in_every_published_order(silu: bool) -> None:
    x, weight, bias, initial = conv_inputs().values()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 2, 2, 2, 2, 2]], dtype=torch.int32)
    how = {"activation": "silu" if silu else None}
    fwd = causal_conv1d_cuda.causal_conv1d_fwd
    plain, packed = causal_conv1d_ref(x, weight, bias, **how), None
    packed = causal_conv1d_ref(x, weight, bias, seq_idx=seq_idx, **how)
    from_state, final = causal_conv1d_ref(
        x, weight, bias, initial_states=initial, return_final_states=True, **how
    )
    assert_contract(fwd(x, weight, bias, silu), plain)
    assert_contract(fwd(x, weight, bias, seq_idx, silu), packed)
    place, out = torch.empty_like(initial), torch.empty_like(x)
    assert_contract(fwd(x, weight, bias, None, initial, place, silu), from_state)
    assert_contract(place, final)
    assert fwd(x, weight, bias, None, initial, out, place.zero_(), silu) is None
    assert_contract(out, from_state)
    assert_contract(place, final)


@pytest.mark.parametrize("layout", ["time next to time", "channel next to channel"])
def test_the_convolutions_gradients_in_every_published_order(layout: str) -> None:
    call = conv_inputs()
    if layout.startswith("channel"):
        call = {n: t.mT.contiguous().mT if t.ndim == 3 else t for n, t in call.items()}
    x, weight, bias, initial = call.values()
    g = torch.Generator().manual_seed(1)
    dout, dfinal = torch.randn(x.shape, generator=g), torch.randn(initial.shape, generator=g)
    bwd, nothing = causal_conv1d_cuda.causal_conv1d_bwd, (None, None, None)

    def expected(with_state: bool) -> list[Tensor]:
        leaves = [t.double().requires_grad_() for t in call.values()]
        start = leaves[3] if with_state else None
        out, final = causal_conv1d_ref(
            *leaves[:3], initial_states=start, return_final_states=True, activation="silu"
        )
        outputs, given = ([out, final], [dout, dfinal]) if with_state else ([out], [dout])
        wanted = leaves if with_state else leaves[:3]
        return list(torch.autograd.grad(outputs, wanted, [t.double() for t in given]))

    def check(found: Any, with_state: bool) -> None:
        assert_each(assert_gradient, found, expected(with_state))

    place = torch.empty_like(x)
    check(bwd(x, weight, bias, dout, place, True), False)
    check([place, *bwd(x, weight, bias, dout, None, None, True)[1:]], False)
    check(bwd(x, weight, bias, dout, None, initial, dfinal, None, True, True), True)
    assert bwd(x, weight, bias, dout, *nothing, None, False, True)[3] is None
    assert bwd(x, weight, None, dout, None, True)[2] is None
    places = [torch.empty_like(x), *map(torch.zeros_like, (weight, bias, initial))]
    assert bwd(x, weight, bias, dout, None, initial, dfinal, *places, True) is None
    check(places, True)


def test_the_convolutions_gradients_across_packed_sequences() -> None:
    x, weight, bias, _ = conv_inputs().values()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2, dtype=torch.int32)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    options = (None, None, None, False, True)
    whole = causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, *options)
    parts = [
        causal_conv1d_bwd_function(x[..., s], weight, bias, dout[..., s], None, *options)
        for s in (slice(0, 3), slice(3, 7))
    ]
    assert_gradient(whole[0], torch.cat([part[0] for part in parts], -1))
    for i in (1, 2):
        assert_gradient(whole[i], parts[0][i] + parts[1][i])


def test_updates_in_every_published_order() -> None:
    call = conv_inputs()
    x, (weight, bias) = call["x"][..., 0], (call["weight"], call["bias"])
    start = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    expected_state = start.clone()
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, "silu")
    update, rows = causal_conv1d_cuda.causal_conv1d_update, torch.tensor([1, 0], dtype=torch.int32)
    for more in ((), (None,), (None, None)):
        state = start.clone()
        assert_contract(update(x, state, weight, bias, True, *more), expected)
        assert_contract(state, expected_state)
    state = start.flip(0)
    assert_contract(update(x, state, weight, bias, True, None, rows), expected)
    state, out = start.clone(), torch.empty_like(x)
    assert update(x, state, weight, bias, out, True, None, None) is None
    assert_contract(out, expected)


@pytest.mark.parametrize("name", causal_conv1d_cuda.__all__)
def test_an_unknown_version_is_refused_by_name(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"causal_conv1d_cuda\.{name}: AnyMamba.*got 3"):
        getattr(causal_conv1d_cuda, name)(1, 2, 3)
    with pytest.raises(ArgumentError, match="got 0"):
        getattr(causal_conv1d_cuda, name)()
