"""Weights in few bits: the format byte by byte, the rounding, and the product, by scalar loops."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anymamba import _core
from anymamba.checkpoint.dtypes import to_bfloat16, to_float32
from anymamba.checkpoint.quantization import (
    QuantizedArray,
    dequantize,
    pack,
    quantize,
    quantize_rows,
    quantized_product,
    unpack,
)
from anymamba.errors import ConfigError, InputError
from tests.support.instruction_sets import kernels_of

FORMATS = [(bits, symmetric) for bits in (8, 4) for symmetric in (True, False)]
formats = pytest.mark.parametrize(("bits", "symmetric"), FORMATS)


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def number(weight: QuantizedArray, i: int, p: int) -> int:
    """The whole number of one weight, read from the bytes as the format is described."""
    g, place = divmod(p, weight.group)
    if weight.bits == 8:
        return int(weight.q[i, p])
    half = weight.group // 2
    byte = int(weight.q[i, g * half + place % half])
    return byte % 16 if place < half else byte // 16


def widened(bits: int) -> float:
    """A bfloat16 by its definition: a sign, 8 bits of exponent, 7 of fraction."""
    sign, exponent, fraction = bits >> 15, bits >> 7 & 255, bits & 127
    scale = 2.0 ** (max(exponent, 1) - 127)
    return (-1) ** sign * scale * ((exponent > 0) + fraction / 128)


def value(weight: QuantizedArray, i: int, p: int) -> float:
    """One weight, as the format is described."""
    g = p // weight.group
    scale = widened(int(weight.scales[i, g]))
    if weight.minima is None:
        return scale * (number(weight, i, p) - 2 ** (weight.bits - 1))
    return scale * number(weight, i, p) + widened(int(weight.minima[i, g]))


@formats
@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantize_reads_the_format(bits: Any, symmetric: bool, group: int) -> None:
    made = quantize(weights(3, 256), bits, group, symmetric)
    expected = [[value(made, i, p) for p in range(256)] for i in range(3)]
    # One rounding to float32 of a product and a sum of numbers up to 4.
    np.testing.assert_allclose(dequantize(made), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@formats
@given(st.data())
def test_each_weight_gets_the_nearest_number(bits: Any, symmetric: bool, data: Any) -> None:
    numbers = st.floats(-1000, 1000, width=32)
    weight = data.draw(arrays(np.float32, (2, 64), elements=numbers))
    made = quantize(weight, bits, 32, symmetric)
    least = 1 if symmetric and bits == 8 else 0
    for i in range(2):
        for p in range(64):
            scale = widened(int(made.scales[i, p // 32]))
            offset = -scale * 2 ** (bits - 1)
            if made.minima is not None:
                offset = widened(int(made.minima[i, p // 32]))
            assert least <= number(made, i, p) < 2**bits
            errors = [abs(scale * q + offset - weight[i, p]) for q in range(least, 2**bits)]
            # Of two equally near numbers float32 may take either.
            slack = 1e-5 * float(np.abs(weight).max())
            assert abs(value(made, i, p) - weight[i, p]) <= min(errors) + slack


@formats
@given(st.data())
def test_no_weight_moves_by_more_than_half_a_step(bits: Any, symmetric: bool, data: Any) -> None:
    numbers = st.floats(-1000, 1000, width=32)
    weight = data.draw(arrays(np.float32, (2, 64), elements=numbers))
    made = quantize(weight, bits, 32, symmetric)
    steps = np.abs(to_float32(made.scales)).repeat(32, axis=1)
    largest = np.abs(weight).reshape(2, 2, 32).max(axis=2).repeat(32, axis=1)
    # Rounding scale and minimum to bfloat16 moves the ends of a range by 2^-8 of them; where
    # neither end is at the largest magnitude's own sign, 4 symmetric bits lack one number there.
    # Scales below 2^-100 count as zero.
    bound = steps / 2 + largest * 2.0**-7 + 2.0**-92
    if (bits, symmetric) == (4, True):
        bound = bound + steps / 2
    assert (np.abs(dequantize(made) - weight) <= bound).all()


@given(st.sampled_from([8, 4]), st.integers(0, 3), st.integers(0, 3), st.sampled_from([32, 64]))
def test_unpacking_undoes_packing(bits: int, n: int, g: int, group: int) -> None:
    random = np.random.default_rng(n + g)
    q = random.integers(0, 2**bits, (n, g, group)).astype(np.uint8)
    stored = pack(q, bits)
    assert stored.shape == (n, g * group * bits // 8)
    np.testing.assert_array_equal(unpack(stored, bits, group), q)


def test_the_largest_of_four_symmetric_bits_is_exact_whatever_its_sign() -> None:
    weight = np.tile(np.linspace(-0.5, 0.5, 32, dtype=np.float32), (2, 1))
    weight[0, 3], weight[1, 3] = 2.0, -2.0
    made = quantize(weight, 4, 32)
    assert dequantize(made)[:, 3].tolist() == [2.0, -2.0]
    assert [number(made, i, 3) for i in (0, 1)] == [0, 0]
    assert to_float32(made.scales)[:, 0].tolist() == [-0.25, 0.25]


@formats
def test_zeros_stay_zeros(bits: Any, symmetric: bool) -> None:
    weight = weights(2, 64)
    weight[0, :32] = 0
    kept = dequantize(quantize(weight, bits, 32, symmetric))
    assert not kept[0, :32].any()
    assert kept[0, 32:].any()


@formats
@pytest.mark.parametrize("constant", [0.25, -3.0, 1e30, -1e-20])
def test_a_constant_group(bits: Any, symmetric: bool, constant: float) -> None:
    kept = dequantize(quantize(np.full((1, 32), constant, np.float32), bits, 32, symmetric))
    # bfloat16 has 8 significant bits.
    np.testing.assert_allclose(kept, constant, rtol=2.0**-8)


@formats
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-32])
def test_tiny_weights_become_zeros_or_stay_near(bits: Any, symmetric: bool, size: float) -> None:
    weight = (weights(1, 32) * size).astype(np.float32)
    made = quantize(weight, bits, 32, symmetric)
    assert np.isfinite(dequantize(made)).all()
    assert np.abs(dequantize(made) - weight).max() <= max(2.0**-92, 4 * size / 2**bits)
    scales = np.abs(to_float32(made.scales))
    assert ((scales == 0) | (scales >= np.finfo(np.float32).tiny)).all()


@formats
def test_a_clipped_range_cuts_off_the_ends_and_refines_the_rest(bits: Any, symmetric: bool) -> None:
    weight = weights(4, 128)
    clip = np.full((4, 2), 0.5, np.float32)
    clip[0, 0] = 1
    whole = quantize(weight, bits, 64, symmetric)
    made = quantize(weight, bits, 64, symmetric, clip)
    same = quantize(weight, bits, 64, symmetric, 0.5)
    np.testing.assert_array_equal(made.q[0, : 8 * bits], whole.q[0, : 8 * bits])
    np.testing.assert_array_equal(made.q[1:], same.q[1:])
    steps, clipped = np.abs(to_float32(whole.scales)), np.abs(to_float32(made.scales))
    np.testing.assert_allclose(clipped[1:], steps[1:] / 2, rtol=2.0**-6)
    parts = weight.reshape(4, 2, 64)
    ends = [end(axis=2, keepdims=True) for end in (parts.min, parts.max)]
    inside = ((parts > 0.4 * ends[0]) & (parts < 0.4 * ends[1])).reshape(4, 128)
    error = np.abs(dequantize(made) - weight)
    if (bits, symmetric) == (8, True):
        assert made.q.min() == 1  # what is cut off does not become the number that is not used
    # Half a step, and what rounding a minimum of about 2 to bfloat16 may add.
    assert (error <= clipped.repeat(64, axis=1) / 2 + 2.0**-7)[inside].all()


@formats
def test_no_rows_and_strided_rows(bits: Any, symmetric: bool) -> None:
    none = quantize(np.empty((0, 64), np.float32), bits, 32, symmetric)
    assert dequantize(none).shape == (0, 64)
    assert quantized_product(np.ones((3, 64), np.float32), none).shape == (3, 0)
    weight = weights(64, 10)
    np.testing.assert_array_equal(
        quantize(weight.T, bits, 32, symmetric).q,
        quantize(np.ascontiguousarray(weight.T), bits, 32, symmetric).q,
    )


@formats
def test_many_rows_are_rounded_as_each_alone(bits: Any, symmetric: bool) -> None:
    """The work goes in blocks of rows, which must not show."""
    weight = weights(3000, 128)
    made = quantize(weight, bits, 64, symmetric)
    for i in (0, 1023, 1024, 1025, 2999):
        alone = quantize(weight[i : i + 1], bits, 64, symmetric)
        np.testing.assert_array_equal(made.q[i], alone.q[0])
        np.testing.assert_array_equal(made.scales[i], alone.scales[0])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 2.0**121])
def test_what_no_scale_fits_is_refused_by_name(wrong: float) -> None:
    weight = weights(3, 64)
    weight[1, 5] = wrong
    with pytest.raises(InputError, match=r"layers\.3\.in_proj holds NaN, .*1 of 3 rows"):
        quantize(weight, 4, 32, name="layers.3.in_proj")


def test_other_refusals() -> None:
    weight = weights(2, 48)
    with pytest.raises(InputError, match="dt_proj has rows of 48, which groups of 32"):
        quantize(weight, 4, 32, name="dt_proj")
    with pytest.raises(InputError, match="rows of 0"):
        quantize(weight[:, :0], 4, 32)
    with pytest.raises(ConfigError, match="group must be one of 32, 64, 128, got 48"):
        quantize(weight, 4, 48)
    with pytest.raises(ConfigError, match="bits must be 8 or 4, got 3"):
        quantize(weight, 3, 32)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float32 matrix, got float64"):
        quantize(weight.astype(np.float64), 4, 32)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float32 matrix"):
        quantize(weight[0], 4, 32)
    for clip in (0.0, 1.5, math.nan, np.ones((2, 2), np.float32)):
        with pytest.raises(ConfigError, match="clip must be"):
            quantize(weights(2, 32), 4, 32, clip=clip)


def test_arrays_that_do_not_fit_are_refused() -> None:
    made = quantize(weights(2, 64), 4, 32, symmetric=False)
    assert made.minima is not None
    with pytest.raises(InputError, match=r"q of a weight .* must be uint8 \(2, 32\)"):
        QuantizedArray(made.q[:, 1:], made.scales, None, 4, 32, (2, 64))
    with pytest.raises(InputError, match="scales of a weight"):
        QuantizedArray(made.q, made.scales.astype(np.float32), None, 4, 32, (2, 64))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="minima of a weight"):
        QuantizedArray(made.q, made.scales, made.minima[:1], 4, 32, (2, 64))
    assert made.nbytes == 2 * 32 + 2 * 2 * 2 * 2
    assert set(made.arrays()) == {"q", "scales", "minima"}


def test_rows_are_rounded_to_even_with_exact_products() -> None:
    x = weights(5, 96, seed=3)
    x[1, :32] = 0
    x[2, :32] = np.resize(np.float32([254, 1, 3, 5, -1, -3]), 32)  # halves: 127/254 of odd numbers
    q, scales = quantize_rows(x, 32)
    for i in range(5):
        for g in range(3):
            part = x[i, 32 * g : 32 * g + 32]
            largest = np.abs(part).max()
            assert scales[i, g] == largest / np.float32(127)
            inverse = np.float32(127) / largest if largest else np.float32(0)
            exact = [Fraction(float(v)) * Fraction(float(inverse)) for v in part]
            assert q[i, 32 * g : 32 * g + 32].tolist() == [round(v) for v in exact]
    assert q[2, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_rows_with_nan_infinity_or_next_to_nothing() -> None:
    x = np.ones((4, 64), np.float32)
    x[0, 3], x[1, 3], x[2, :32] = np.nan, -np.inf, 1e-39
    q, scales = quantize_rows(x, 32)
    assert np.isnan(scales[:2, 0]).all()
    assert np.isfinite(scales[:, 1]).all()
    assert not q[:3, :32].any()
    y = quantized_product(x, quantize(weights(3, 64), 4, 32))
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2:]).all()
    with pytest.raises(InputError, match="activations has rows of 40"):
        quantize_rows(np.ones((1, 40), np.float32), 32)


@formats
@pytest.mark.parametrize("group", [32, 128])
def test_the_product_against_a_scalar_loop(bits: Any, symmetric: bool, group: int) -> None:
    x, made = weights(2, 256, seed=1), quantize(weights(3, 256), bits, group, symmetric)
    q, scales = quantize_rows(x, group)
    expected = [
        [
            math.fsum(
                float(scales[m, p // group]) * int(q[m, p]) * value(made, i, p) for p in range(256)
            )
            for i in range(3)
        ]
        for m in range(2)
    ]
    # Within a group the sums are exact; outside it is float64, rounded to float32 once.
    np.testing.assert_allclose(quantized_product(x, made), expected, rtol=1e-6, atol=1e-6)


def test_the_product_of_the_largest_numbers_is_exact() -> None:
    """127 * 255 * 128 is the largest sum of a group, and float32 holds it."""
    n, group = 2, 128
    q = np.full((n, group), 255, np.uint8)
    one = to_bfloat16(np.ones((n, 1), np.float32))
    made = QuantizedArray(q, one, np.zeros_like(one), 8, group, (n, group))
    x = np.full((1, group), 127, np.float32)
    assert quantized_product(x, made).tolist() == [[127.0 * 255 * 128] * 2]


@pytest.mark.parametrize("shape", [(2, 31), (64,), (0, 32)])
def test_the_product_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"x must be float32 \(m, 64\)"):
        quantized_product(np.ones(shape, np.float32), quantize(weights(3, 64), 8, 32))


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    format_=st.sampled_from(FORMATS),
    few=st.booleans(),
)
def test_the_kernels_compute_this_product(
    m: int, n: int, groups: int, group: int, format_: Any, few: bool
) -> None:
    k = groups * group
    few = few and m <= 16
    x, made = weights(m, k, seed=m), quantize(weights(n, k, seed=n), format_[0], group, format_[1])
    expected = quantized_product(x, made)
    for isa in _core.isas():
        y = np.empty((m, n), np.float32)
        with kernels_of(isa):
            _core.quantized_product(x, made.q, made.scales, made.minima, None, y, few)
        # The contract's tolerance for an operator in float32: the sums over groups differ.
        assert np.abs(y - expected).max() <= 1e-5 * max(1, float(np.abs(expected).max())), isa
