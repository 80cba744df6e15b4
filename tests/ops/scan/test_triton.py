"""The scan's Triton kernels against the reference in float64: whole, in splits, packed, stepped."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from anymamba import ops
from anymamba.errors import BackendError
from tests.support.operators import HALVES, SCAN, TYPES, first_step, leaves, scan_inputs
from tests.support.tolerance import assert_contract
from tests.support.triton import with_triton

# Around the sides of tiles: 16 steps and 32 channels.
SHAPES = [
    (0, 3, 2, 2),
    (2, 0, 3, 2),
    (1, 1, 1, 1),
    (2, 15, 31, 3),
    (1, 16, 32, 1),
    (1, 17, 33, 5),
    (3, 70, 5, 2),
]


@pytest.fixture(scope="module", params=["whole segments", "splits"], autouse=True)
def cut(request: pytest.FixtureRequest) -> Iterator[str]:
    """Programs that walk whole segments, as where these fill a GPU, or splits of them."""
    with with_triton(), pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("anymamba.ops.scan.triton")
        in_splits = request.param == "splits"
        patch.setattr(module, "wanted_programs", lambda _: 1000 if in_splits else 1)
        patch.setattr(module, "KEPT_CHUNKS", 1 if in_splits else 2)
        yield request.param


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("b", "l", "e", "n"), SHAPES)
def test_shapes(b: int, l: int, e: int, n: int, reverse: bool) -> None:
    inputs = scan_inputs(b, l, e, n) | {"initial_state": torch.randn(b, e, n)}
    SCAN.check(inputs, reverse=reverse)


@pytest.mark.parametrize("absent", ["D_e", "z_ble", "delta_bias_e", "delta_softplus"])
def test_each_option_may_be_absent(absent: str) -> None:
    inputs = scan_inputs(2, 20, 5, 2)
    del inputs[absent]
    # Without softplus, negative steps would make states grow beyond all numbers.
    for name in ("delta_ble", "delta_bias_e"):
        if name in inputs:
            inputs[name] = inputs[name].abs() * 0.1
    SCAN.check(inputs)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups(groups: int) -> None:
    SCAN.check(scan_inputs(1, 20, 6, 2, groups=groups))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_only_storage(dtype: torch.dtype) -> None:
    SCAN.check(scan_inputs(1, 40, 5, 2, dtype=dtype))


@pytest.mark.slow
def test_the_largest_state_size() -> None:
    SCAN.check(scan_inputs(1, 3, 2, 256))


def test_more_splits_than_are_joined_at_once() -> None:
    SCAN.check(scan_inputs(1, 40 * 16 + 3, 1, 1) | {"initial_state": torch.randn(1, 1, 1)})


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@example(lengths=[0, 17], reverse=False)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum), reverse=st.booleans()
)
def test_packed_sequences(lengths: list[int], reverse: bool) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = scan_inputs(1, sum(lengths), 3, 2)
    inputs |= {"initial_state": torch.randn(len(lengths), 3, 2)}
    SCAN.check(inputs, cu_seqlens=offsets, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_seq_idx(reverse: bool) -> None:
    marks = torch.tensor([[0] * 20 + [1] + [2] * 14, [5] * 35])
    inputs = scan_inputs(2, 35, 3, 2) | {"initial_state": torch.randn(2, 3, 2)}
    SCAN.check(inputs, seq_idx=marks, reverse=reverse)


def test_no_step_and_huge_steps() -> None:
    """Decays of exactly 1, and of 0: they go through the scan of gradients too."""
    inputs = scan_inputs(1, 40, 4, 3, extras=False)
    inputs["delta_ble"] = torch.zeros(1, 40, 4)
    inputs["delta_ble"][:, ::7] = 1e4
    SCAN.check(inputs | {"initial_state": torch.randn(1, 4, 3)})


def test_two_runs_give_the_same_bits() -> None:
    def run() -> tuple[Tensor, ...]:
        inputs = leaves(scan_inputs(2, 40, 35, 3))
        outputs = ops.selective_scan(**inputs, return_last_state=True)
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        return (
            *outputs,
            *torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs]),
        )

    assert all(map(torch.equal, run(), run()))


def test_few_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state for 64 steps: nothing of size l e n."""
    module = importlib.import_module("anymamba.ops.scan.triton")
    monkeypatch.setattr(module, "KEPT_CHUNKS", 4)
    saved = []
    inputs = leaves(scan_inputs(1, 160, 32, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.selective_scan(**inputs)
    assert max(tensor.numel() for tensor in saved) <= 160 * 32


def test_compiled_once_for_all_lengths() -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=count)
    scan = torch.compile(ops.selective_scan, dynamic=True, fullgraph=True, backend=backend)
    for l in (5, 20, 40, 70):
        inputs = leaves(scan_inputs(1, l, 3, 2))
        y = scan(**inputs)
        assert_contract(y, ops.selective_scan(**inputs).double())
        y.sum().backward()
    assert len(graphs) == 2  # forward and backward


def test_tables_of_packed_batches_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("anymamba.ops.scan.triton")
    module._tables.cache_clear()
    inputs = leaves(scan_inputs(1, 20, 3, 2))
    for _ in range(2):  # layers
        ops.selective_scan(**inputs, cu_seqlens=torch.tensor([0, 3, 20])).sum().backward()
    assert module._tables.cache_info().misses == 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize(("b", "n"), [(1, 1), (3, 16), (2, 5)])
def test_updates(b: int, n: int, groups: int | None, dtype: torch.dtype, cut: str) -> None:
    inputs = first_step(scan_inputs(b, 1, 9, n, groups=groups, dtype=dtype))
    # Strided, as a step of Transformers' cache may be.
    state = torch.randn(b, n, 9).mT
    exact, kept = state.double(), state
    y = ops.selective_state_update(state, **inputs)
    doubled = {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    expected = ops.selective_state_update(exact, **doubled, backend="reference")
    assert y.dtype == dtype
    assert_contract(y, expected)
    assert_contract(kept, exact)


def test_what_the_kernels_do_not_offer_is_said(cut: str) -> None:
    for inputs, message in (
        (scan_inputs(1, 2, 2, 300), "state sizes from 1 to 256, not 300"),
        (scan_inputs(1, 2, 2, 2, dtype=torch.float64), "do not offer torch.float64"),
    ):
        with pytest.raises(BackendError, match=message):
            ops.selective_scan(**inputs)
