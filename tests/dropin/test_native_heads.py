"""Mamba-2's functions on the native core, in every type it offers, against themselves in float64.

In float64, which the core does not offer, they run PyTorch's code; the other files of this folder
hold that to plain loops.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba.dropin.mamba_ssm.ops.triton import ssd_combined
from anymamba.dropin.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from tests.dropin.test_ssd_combined import layer_arguments, normal, scan_arguments
from tests.support.instruction_sets import ISAS
from tests.support.operators import TYPES, natively
from tests.support.tolerance import assert_contract, assert_same, naming, share_of_layer

Arguments = dict[str, Any]
B, L, H, P, G, N = 2, 70, 4, 6, 2, 5
OFFSETS = torch.tensor([0, 17, 17, 64], dtype=torch.int32)


def scan(**changed: Any) -> Arguments:
    return scan_arguments(B, L, H, P, G, N) | {"dt_limit": (0.1, 1.0)} | changed


def packed() -> Arguments:
    """Sequences in one row, one of them empty, and padding behind the last."""
    return scan_arguments(1, L, H, P, G, N) | {
        "seq_idx": torch.tensor([[0] * 17 + [2] * 47 + [3] * 6]),
        "cu_seqlens": OFFSETS,
        "return_final_states": True,
        "return_varlen_states": True,
    }


CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    "with all options": (
        ssd_combined.mamba_chunk_scan_combined,
        scan(
            initial_states=normal(B, H, P, N),
            seq_idx=torch.arange(L).expand(B, L) // 33,
            return_final_states=True,
        ),
    ),
    "without options": (
        ssd_combined.mamba_chunk_scan_combined,
        scan(D=None, z=None, dt_bias=None, dt_softplus=False),
    ),
    "packed": (ssd_combined.mamba_chunk_scan_combined, packed()),
    "packed after states": (
        ssd_combined.mamba_chunk_scan_combined,
        packed() | {"initial_states": normal(1, H, P, N)},
    ),
    "a whole layer": (
        ssd_combined.mamba_split_conv1d_scan_combined,
        layer_arguments(l=L, mlp=2) | {"return_final_states": True},
    ),
    "a layer with the norm behind the gate": (
        ssd_combined.mamba_split_conv1d_scan_combined,
        layer_arguments(l=L) | {"norm_before_gate": False, "D": normal(4, 3), "headdim": None},
    ),
    "a layer without a norm": (
        ssd_combined.mamba_split_conv1d_scan_combined,
        layer_arguments(l=L)
        | {"rmsnorm_weight": None, "outproj_weight": None, "outproj_bias": None},
    ),
}
# The type of activations may be narrower than that of these.
WIDE = ("A", "D", "dt_bias", "initial_states")


def in_type(given: Arguments, dtype: torch.dtype) -> Arguments:
    """The numbers in a type; in 16 bits those that decide decays stay float32, as in models."""
    found = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wide = name in WIDE and dtype.itemsize == 2
            found[name] = value.to(torch.float32 if wide else dtype)
    return found


def results_and_gradients(
    function: Callable[..., Any], given: Arguments
) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    returned = function(**given | leaves)
    results = [returned] if isinstance(returned, Tensor) else list(returned)
    # A fixed weighting, so that no gradient cancels.
    total = sum(
        (r.double() * torch.linspace(0.5, 1.5, r.numel()).view_as(r)).mean() for r in results
    )
    found = torch.autograd.grad(100 * total, list(leaves.values()))
    return [r.detach() for r in results], dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients(call: str, dtype: torch.dtype, isa: str) -> None:
    function, given = CALLS[call]
    rounded = in_type(given, dtype)
    expected, wanted = results_and_gradients(function, in_type(rounded, torch.float64))
    with natively(isa):
        found, gradients = results_and_gradients(function, rounded)
        with torch.no_grad():
            returned = function(**rounded)
    without = [returned] if isinstance(returned, Tensor) else returned
    for result, other, double in zip(found, without, expected, strict=True):
        assert_same(result, double, share_of_layer(dtype))
        assert_same(other, double, share_of_layer(dtype))
    for name, gradient in gradients.items():
        with naming(f"the gradient of {name}"):
            # In 16 bits projection, norm, scan and convolution each round what they hand back.
            share = share_of_layer(dtype) * (2 if dtype.itemsize == 2 else 1)
            assert_same(gradient, wanted[name], share)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [None, torch.tensor([3, -1])])
def test_steps(dtype: torch.dtype, rows: Tensor | None, isa: str) -> None:
    """With one decay a head, as Transformers and the layers call it."""
    given = in_type(
        {
            "state": normal(5 if rows is not None else B, H, P, N),
            "x": normal(B, H, P),
            "dt": normal(B, H),
            "A": -normal(H).abs(),
            "B": normal(B, G, N),
            "C": normal(B, G, N),
            "D": normal(H),
            "z": normal(B, H, P),
            "dt_bias": normal(H),
        },
        dtype,
    )

    def step(given: Arguments) -> list[Tensor]:
        expanded = given | {
            "dt": given["dt"][..., None].expand(B, H, P),
            "A": given["A"][:, None, None].expand(H, P, N),
            "D": given["D"][:, None].expand(H, P),
            "dt_bias": given["dt_bias"][:, None].expand(H, P),
            "state": given["state"].clone(),
        }
        out = selective_state_update(**expanded, dt_softplus=True, state_batch_indices=rows)
        return [out, expanded["state"]]

    expected = step(in_type(given, torch.float64))
    with natively(isa):
        found = step(given)
    for result, double in zip(found, expected, strict=True):
        assert_contract(result, double)
