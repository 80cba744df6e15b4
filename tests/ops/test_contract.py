"""What every kernel does, on each instruction set and in Triton: one contract, held by all of them.

Any strides, of inputs and of gradients; gradients of some inputs and through some outputs alone;
and bits that do not depend on the number of threads. PyTorch's own rules for custom operators are
in test_custom_operators.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anymamba import _core
from tests.support.operators import (
    CONVOLUTION,
    LAYOUTS,
    LINEAR,
    NORM,
    SCAN,
    SSD,
    TYPES,
    Operator,
    conv_inputs,
    gradients,
    leaves,
    norm_inputs,
    product_inputs,
    scan_inputs,
    ssd_inputs,
)
from tests.support.tolerance import assert_each

every_kernel = pytest.mark.usefixtures("each_kernel")
native = pytest.mark.usefixtures("each_isa")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An operator, inputs for it in a storage type, and which of them may lie in any way."""

    operator: Operator
    inputs: Callable[[torch.dtype], list[Inputs]]
    strided: tuple[str, ...]
    large: tuple[Inputs, ...]  # so large that threads share the work, and not evenly
    options: tuple[dict[str, Any], ...] = ({},)


CASES = {
    "scan": Case(
        SCAN,
        lambda dtype: [
            scan_inputs(2, 45, 19, n, dtype=dtype) | {"initial_state": torch.randn(2, 19, n)}
            for n in (5, 16)
        ],
        ("x_ble", "delta_ble", "z_ble", "B_bln", "C_bln", "A_en", "D_e", "delta_bias_e"),
        (
            scan_inputs(1, 300, 19, 16),
            scan_inputs(5, 70, 130, 16),
            scan_inputs(3, 65, 70, 33, dtype=torch.bfloat16),
            scan_inputs(1, 33, 600, 5, dtype=torch.float16),
        ),
        ({"reverse": False}, {"reverse": True}),
    ),
    "ssd": Case(
        SSD,
        lambda dtype: [ssd_inputs(2, 70, 4, 6, 2, n, dtype) for n in (5, 16)],
        ("x_blhp", "dt_blh", "z_blhp", "B_blgn", "C_blgn", "A_h", "dt_bias_h", "D_h"),
        (
            ssd_inputs(1, 300, 19, 3, 1, 16),
            ssd_inputs(5, 70, 4, 33, 2, 17),
            ssd_inputs(3, 65, 6, 16, 1, 33, torch.bfloat16),
        ),
    ),
    "convolution": Case(
        CONVOLUTION,
        lambda dtype: [conv_inputs(2, 45, 19, k, dtype=dtype) for k in (3, 4, 6)],
        ("x_ble", "weight_ek", "initial_window", "bias_e"),
        (
            conv_inputs(1, 700, 19, 4),
            conv_inputs(5, 70, 300, 3),
            conv_inputs(3, 165, 70, 6, dtype=torch.bfloat16),
        ),
        ({"reverse": False}, {"reverse": True}),
    ),
    "norm": Case(
        NORM,
        lambda dtype: [
            norm_inputs(*shape, types=(dtype, torch.float32, torch.float32))
            for shape in ((3, 19), (2, 5, 33))
        ],
        ("x", "residual", "weight_d"),
        (norm_inputs(700, 19), norm_inputs(33, 1001), norm_inputs(5, 7, 64)),
        ({}, {"residual_in_fp32": True}),
    ),
    "linear": Case(
        LINEAR,
        lambda dtype: [product_inputs(m, 37, 45, (dtype,) * 3) for m in (3, 35)],
        ("x", "weight_nk", "bias_n"),
        tuple(
            product_inputs(*sizes, types=(dtype,) * 3)
            for sizes in ((1, 700, 130), (16, 333, 70), (100, 130, 500), (3, 5, 2000))
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def laid_out(inputs: Inputs, names: tuple[str, ...], layout: str, step: int = 0) -> Inputs:
    """The named inputs in a layout, each `step` layouts further than the one before."""
    ways = list(LAYOUTS)
    first = ways.index(layout)
    return inputs | {
        name: in_layout(inputs[name], ways[(first + step * i) % len(ways)])
        for i, name in enumerate(names)
    }


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """A tensor in a layout; one of a single axis is a column of what is laid out."""
    if tensor.ndim == 1:
        return LAYOUTS[layout](tensor[:, None])[:, 0]
    return LAYOUTS[layout](tensor)


# With a step of 1 no two neighbours lie alike.
@every_kernel
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, dtype: torch.dtype, step: int, case: Case) -> None:
    """Results are the same, and inputs stay as they were."""
    for number, plain in enumerate(case.inputs(dtype)):
        inputs = laid_out(plain, case.strided, layout, step)
        kept = {name: inputs[name].clone() for name in case.strided}
        assert all(torch.equal(kept[name], plain[name]) for name in kept)
        options = case.options[(number + step) % len(case.options)]
        case.operator.assert_results(inputs, **options)
        assert all(torch.equal(inputs[name], kept[name]) for name in kept)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(layout: str, dtype: torch.dtype, case: Case) -> None:
    def in_memory(output: Tensor) -> Tensor:
        cotangent = torch.randn(output.shape).to(output.dtype)
        return LAYOUTS[layout](cotangent) if cotangent.ndim > 1 else cotangent

    for number, inputs in enumerate(case.inputs(dtype)):
        case.operator.assert_gradients(
            inputs,
            lay_out=lambda given: laid_out(given, case.strided, layout, number),  # noqa: B023
            cotangent=in_memory,
        )


@every_kernel
def test_gradients_that_are_one_number_for_all(case: Case) -> None:
    """What `y.sum().backward()` sends back has no strides at all."""
    inputs = case.inputs(torch.float32)[0]
    ones = lambda output: torch.ones((), dtype=output.dtype).expand(output.shape)  # noqa: E731
    case.operator.assert_gradients(inputs, cotangent=ones)


@every_kernel
def test_gradients_where_only_one_output_counts(case: Case) -> None:
    inputs = case.inputs(torch.float32)[0]
    for options in case.options:
        for index in range(len(case.operator.call(inputs))):
            case.operator.assert_gradients(inputs, outputs=[index], **options)


@every_kernel
def test_gradients_of_some_inputs_alone(case: Case) -> None:
    inputs = case.inputs(torch.float32)[0]
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for i, name in enumerate(names):
        case.operator.assert_gradients(inputs, of=[name])
        case.operator.assert_gradients(inputs, of=[name, names[i - 1]])


def packed_scan(b: int, l: int, e: int, n: int, states: int, dtype: torch.dtype) -> Inputs:
    return scan_inputs(b, l, e, n, dtype=dtype) | {"initial_state": torch.randn(states, e, n)}


def packed_conv(b: int, l: int, e: int, k: int, states: int, dtype: torch.dtype) -> Inputs:
    """Some windows are wider than needed."""
    return conv_inputs(b, l, e, k, windows=states, columns=k + e % 4, dtype=dtype)


PACKED = {
    "scan": (SCAN, packed_scan, "initial_state"),
    "convolution": (CONVOLUTION, packed_conv, "initial_window"),
}


@native
@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    sizes=st.tuples(st.integers(1, 35), st.integers(1, 20)),
    reverse=st.booleans(),
    dtype=st.sampled_from(TYPES),
)
def test_packed_sequences(
    name: str, lengths: list[int], sizes: tuple[int, int], reverse: bool, dtype: torch.dtype
) -> None:
    operator, packed, _ = PACKED[name]
    inputs = packed(1, sum(lengths), *sizes, len(lengths), dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    operator.check(inputs, cu_seqlens=cu_seqlens, reverse=reverse)


@native
@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=30)
@given(
    marks=st.lists(st.integers(0, 1), min_size=90, max_size=90),
    width=st.integers(1, 6),
    reverse=st.booleans(),
    starts=st.booleans(),
)
def test_seq_idx(name: str, marks: list[int], width: int, reverse: bool, starts: bool) -> None:
    operator, packed, start = PACKED[name]
    inputs = packed(2, 45, 7, width, 2, torch.float32)
    if not starts:
        inputs[start] = None
    # Many short sequences in the first row, few long ones in the second.
    seq_idx = torch.tensor(marks).view(2, 45)
    seq_idx[1] = seq_idx[1].cumsum(0) // 16
    operator.check(inputs, seq_idx=seq_idx, reverse=reverse)


@native
def test_the_number_of_threads_changes_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def bits_with(threads: int, inputs: Inputs) -> list[Tensor]:
        monkeypatch.setenv("ANYMAMBA_NUM_THREADS", str(threads))
        ours = leaves(inputs)
        outputs = case.operator.call(ours)
        cotangents = [torch.ones_like(output) for output in outputs]
        found = gradients(outputs, cotangents, ours)
        assert _core.threads() == threads
        return [*outputs, *found.values()]

    for inputs in case.large:
        alone = bits_with(1, inputs)
        for threads in (2, 4):
            assert_each(torch.equal, bits_with(threads, inputs), alone)
