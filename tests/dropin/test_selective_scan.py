"""The selective scan under the original's names, against a loop over single numbers.

The loop is `brute_force` of the scan's own tests; what this file adds is how the original lays out
its tensors: channels before time, constant B and C, complex numbers as pairs in a row.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import (
    SelectiveScanFn,
    selective_scan_fn,
    selective_scan_ref,
)
from anymamba.errors import InputError
from tests.ops.scan.test_scan import brute_force
from tests.support.tolerance import assert_contract, assert_each, assert_gradient

SEQUENCES = ("u", "delta", "z", "B", "C")
FORMS = ["constant", "variable", "2 groups", "6 groups"]


def map_of(form: str, sizes: tuple[int, int, int, int], is_complex: bool, seed: int) -> Tensor:
    """A B or C as the original wants it."""
    (b, e, l, n), g = sizes, torch.Generator().manual_seed(seed)
    real = torch.complex64 if is_complex else torch.float32
    if form == "constant":
        return torch.randn(e, n, generator=g, dtype=real)
    shape = (b, n) if form == "variable" else (b, int(form[0]), n)
    return torch.randn(*shape, 2 * l if is_complex else l, generator=g)


def channel_last(B: Tensor, form: str, l: int, is_complex: bool, b: int) -> Tensor:
    """The same numbers position by position, (b, l, n) or (b, l, g, n)."""
    if form == "constant":
        return torch.stack([torch.stack([B] * l)] * b)
    columns = [
        torch.complex(B[..., 2 * t], B[..., 2 * t + 1]) if is_complex else B[..., t]
        for t in range(l)
    ]
    return torch.stack(columns, 1)


def inputs(
    sizes: tuple[int, int, int, int] = (2, 6, 7, 4),
    of_B: str = "variable",
    of_C: str = "variable",
    is_complex: bool = False,
) -> dict[str, Any]:
    (b, e, l, n), g = sizes, torch.Generator().manual_seed(0)
    A = -torch.rand(e, n, generator=g) * n
    if is_complex:
        A = torch.complex(A, torch.randn(e, n, generator=g))
    return {
        "u": torch.randn(b, e, l, generator=g),
        "delta": torch.randn(b, e, l, generator=g) - 1,
        "A": A,
        "B": map_of(of_B, sizes, is_complex, 1),
        "C": map_of(of_C, sizes, is_complex, 2),
        "D": torch.randn(e, generator=g),
        "z": torch.randn(b, e, l, generator=g),
        "delta_bias": torch.randn(e, generator=g),
        "delta_softplus": True,
    }


def by_hand(call: dict[str, Any], of_B: str, of_C: str) -> tuple[Tensor, Tensor]:
    (b, _, l), is_complex = call["u"].shape, call["A"].is_complex()
    z = call["z"]
    y, last = brute_force(
        call["u"].mT,
        call["delta"].mT,
        call["A"],
        each_channel(channel_last(call["B"], of_B, l, is_complex, b), call),
        each_channel(channel_last(call["C"], of_C, l, is_complex, b), call),
        call["D"],
        None if z is None else z.mT,
        call["delta_bias"],
        call["delta_softplus"],
    )
    return y.mT, last


def each_channel(B: Tensor, call: dict[str, Any]) -> Tensor:
    return B if B.ndim == 3 else B.repeat_interleave(call["u"].shape[1] // B.shape[2], 2)


def assert_state(actual: Tensor, expected: Tensor) -> None:
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert_contract(actual, expected)


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("of_B", FORMS)
@pytest.mark.parametrize("of_C", FORMS)
def test_equals_the_loop(function: Any, is_complex: bool, of_B: str, of_C: str) -> None:
    call = inputs(of_B=of_B, of_C=of_C, is_complex=is_complex)
    out, last = function(**call, return_last_state=True)
    expected, expected_last = by_hand(call, of_B, of_C)
    assert_contract(out, expected)
    assert_state(last, expected_last)
    assert torch.equal(function(**call), out)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 1, 5), (1, 5, 70, 17), (0, 3, 4, 2)])
@pytest.mark.parametrize("is_complex", [False, True])
def test_odd_sizes(sizes: tuple[int, int, int, int], is_complex: bool) -> None:
    call = inputs(sizes, is_complex=is_complex)
    out, last = selective_scan_fn(**call, return_last_state=True)
    expected, expected_last = by_hand(call, "variable", "variable")
    assert_contract(out, expected)
    assert_state(last, expected_last)


def test_what_may_be_left_out() -> None:
    call = inputs() | {"D": None, "z": None, "delta_bias": None}
    assert_contract(selective_scan_fn(**call), by_hand(call, "variable", "variable")[0])
    call |= {"delta": call["delta"].abs(), "delta_softplus": False}
    assert_contract(selective_scan_fn(**call), by_hand(call, "variable", "variable")[0])


def test_memory_may_be_channel_last_or_part_of_something_bigger() -> None:
    call = inputs()
    expected = selective_scan_fn(**call)
    turned = {k: v.mT.contiguous().mT if k in SEQUENCES else v for k, v in call.items()}
    assert torch.equal(selective_scan_fn(**turned), expected)
    halves = {
        k: torch.cat([v, v], 1)[:, v.shape[1] :] if k in SEQUENCES else v for k, v in call.items()
    }
    assert torch.equal(selective_scan_fn(**halves), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(dtype: torch.dtype) -> None:
    call = inputs()
    call |= {name: call[name].to(dtype) for name in ("u", "delta", "B", "C", "z")}
    out, last = selective_scan_fn(**call, return_last_state=True)
    expected, expected_last = by_hand(call, "variable", "variable")
    assert out.dtype == dtype
    assert last.dtype == torch.float32
    assert_contract(out, expected)
    assert_contract(last, expected_last)


def leaves(call: dict[str, Any], wide: bool) -> dict[str, Any]:
    types = {torch.float32: torch.float64, torch.complex64: torch.complex128} if wide else {}
    return {
        name: value.to(types.get(value.dtype, value.dtype)).clone().requires_grad_()
        if isinstance(value, Tensor)
        else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("of_B", "of_C"), [("constant", "2 groups"), ("variable", "constant")])
def test_gradients_are_the_numerical_derivatives(is_complex: bool, of_B: str, of_C: str) -> None:
    call = leaves(inputs((1, 2, 4, 2), of_B, of_C, is_complex), wide=True)
    names = [name for name, value in call.items() if isinstance(value, Tensor)]

    def function(*values: Tensor) -> Any:
        changed = call | dict(zip(names, values, strict=True))
        return selective_scan_fn(**changed, return_last_state=True)

    assert torch.autograd.gradcheck(function, [call[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("of_B", FORMS)
@pytest.mark.parametrize("of_C", FORMS)
def test_the_cores_gradients_are_those_of_double_precision(of_B: str, of_C: str) -> None:
    call = inputs((2, 6, 20, 4), of_B, of_C)
    found = []
    for wide in (False, True):
        tensors = leaves(call, wide)
        out, last = selective_scan_fn(**tensors, return_last_state=True)
        (out.sin().sum() + last.sum()).backward()
        found.append({k: v.grad for k, v in tensors.items() if isinstance(v, Tensor)})
    for name, gradient in found[0].items():
        assert_gradient(gradient, found[1][name])


def test_the_autograd_functions_name_is_the_function() -> None:
    arguments = (*inputs().values(), True)
    assert_each(torch.equal, SelectiveScanFn.apply(*arguments), selective_scan_fn(*arguments))


BAD_CALLS: dict[str, dict[str, Any]] = {
    "expected u of shape": {"u": torch.ones(2, 6)},
    "delta has shape": {"delta": torch.ones(2, 6, 8)},
    "B has shape": {"B": torch.ones(2, 7, 4)},
    "C has 4 groups": {"C": torch.ones(2, 4, 4, 7)},
    "z has shape": {"z": torch.ones(2, 7, 6)},
    "D has shape": {"D": torch.ones(4)},
    "B is complex and A is real": {"B": torch.ones(6, 4, dtype=torch.complex64)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message: str) -> None:
    with pytest.raises(InputError, match=message):
        selective_scan_fn(**(inputs() | BAD_CALLS[message]))
