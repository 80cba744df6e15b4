"""The vectorized exp, silu and softplus over float32's whole range, against float64."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from anymamba import _core
from tests.support.instruction_sets import ISAS, kernels_of

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# The design's promise, in the scale of a unit in the last place: 2^-23 of the value.
UNITS = 2.0
TINIEST = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = float(np.finfo(np.float32).max)


def silu(x: Doubles) -> Doubles:
    # x / (1 + e^-x), written so that nothing overflows.
    return np.where(x >= 0, x / (1 + np.exp(-np.abs(x))), x * np.exp(x) / (1 + np.exp(x)))


FUNCTIONS: dict[str, Callable[[Doubles], Doubles]] = {
    "exp": np.exp,
    "silu": silu,
    "softplus": lambda x: np.logaddexp(0.0, x),
}


@pytest.fixture(params=ISAS, autouse=True)
def _each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels_of(request.param):
        yield


def apply(name: str, x: Floats) -> Floats:
    y = np.empty_like(x)
    _core.apply(name, x, y)
    return y


def units(actual: Floats, exact: Doubles) -> Doubles:
    """The distance in units of 2^-23 of the exact value, or of the smallest number near zero."""
    unit = np.maximum(np.abs(exact) * 2.0**-23, TINIEST)
    return np.abs(actual.astype(np.float64) - exact) / unit


def every(step: int, offset: int = 0) -> Floats:
    """Every step-th of all float32 numbers by their bits, which is logarithmic in their size."""
    bits = np.arange(offset, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    return np.ascontiguousarray(x[np.isfinite(x)])


def assert_close(name: str, x: Floats) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = FUNCTIONS[name](x.astype(np.float64))
        actual = apply(name, x)
        # What rounds to infinity is infinity.
        beyond = exact.astype(np.float32)
    infinite = np.isinf(beyond)
    assert np.array_equal(actual[infinite], beyond[infinite])
    errors = units(actual[~infinite], exact[~infinite])
    worst = int(np.argmax(errors)) if errors.size else 0
    assert errors.size == 0 or errors[worst] <= UNITS, (
        f"{name}({x[~infinite][worst]!r}) is {actual[~infinite][worst]!r}, "
        f"{errors[worst]:.2f} units from {exact[~infinite][worst]!r}"
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_whole_range(name: str) -> None:
    # A prime step, so that no bit pattern is favoured: 1.4 million numbers of all sizes.
    assert_close(name, every(3067))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_results_are_neither_zero_nor_infinite(name: str) -> None:
    assert_close(name, np.linspace(-110, 95, 2_000_003, dtype=np.float32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_around_every_number_at_which_something_changes(name: str) -> None:
    """Multiples of log(2) and of its half, where exponents step, the ends, and small numbers."""
    points = [k * np.log(2) / 2 for k in range(-320, 280)]
    points += [-150, -120, -110, -104, -103.97, -103.3, -88, -87.34, -87, -80, 80, 87, 88, 88.72]
    points += [88.73, 90, 104, 110, 120, 128, -128, 0.0, 1e-45, 1e-38, 1e-20, 1e-7, 1e-4, 1, 20]
    points += [-float(point) for point in points]
    bits = np.array(points, dtype=np.float32).view(np.int32)
    around = (bits[:, None] + np.arange(-40, 41, dtype=np.int32)).ravel()
    x = around.view(np.float32)
    assert_close(name, np.ascontiguousarray(x[np.isfinite(x)]))


SPECIAL = {
    "exp": {np.inf: np.inf, -np.inf: 0.0, 0.0: 1.0, 1e30: np.inf, -1e30: 0.0},
    "silu": {np.inf: np.inf, -np.inf: 0.0, 0.0: 0.0, 1e30: 1e30, -1e30: 0.0},
    "softplus": {np.inf: np.inf, -np.inf: 0.0, 1e30: 1e30, -1e30: 0.0, LARGEST: LARGEST},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_infinity_and_the_ends(name: str) -> None:
    given = np.array(list(SPECIAL[name]), dtype=np.float32)
    expected = np.array(list(SPECIAL[name].values()), dtype=np.float32)
    assert np.array_equal(apply(name, given), expected)
    quiet = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], dtype=np.uint32)
    assert np.isnan(apply(name, quiet.view(np.float32))).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_is_the_same_wherever_it_stands(name: str) -> None:
    """In a whole vector or in the rest behind it, and beside NaN and infinity."""
    x = np.array([-3.25, 88.5, -88.5, 1e-6, 0.75], dtype=np.float32)
    expected = [apply(name, x[i : i + 1].copy())[0] for i in range(len(x))]
    for count in range(1, 41):
        for place in {0, count // 2, count - 1}:
            for value, result in zip(x, expected, strict=True):
                line = np.full(count, np.nan, dtype=np.float32)
                line[place] = value
                assert apply(name, line)[place] == result
    assert apply(name, np.empty(0, dtype=np.float32)).size == 0


def test_softplus_and_silu_never_turn_around() -> None:
    """softplus rises everywhere; silu rises from its minimum near -1.278 on.

    By up to the allowed error twice, which neighbouring numbers may each have.
    """
    x = np.linspace(-100, 100, 400_001, dtype=np.float32)
    y = apply("softplus", x).astype(np.float64)
    assert (np.diff(y) >= -2 * UNITS * 2.0**-23 * y[1:] - TINIEST).all()
    x = x[x > -1.2]  # right of the minimum
    y = apply("silu", x).astype(np.float64)
    assert (np.diff(y) >= -2 * UNITS * 2.0**-23 * np.abs(y[1:]) - TINIEST).all()


def test_bad_input_is_named() -> None:
    x = np.zeros(4, dtype=np.float32)
    with pytest.raises(ValueError, match="no function is called tanh"):
        _core.apply("tanh", x, x.copy())
    with pytest.raises(ValueError, match="y has shape"):
        _core.apply("exp", x, np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="must be float32"):
        _core.apply("exp", x.astype(np.float64), x.copy())
    with pytest.raises(ValueError, match="contiguous"):
        _core.apply("exp", np.zeros(8, dtype=np.float32)[::2], x.copy())
    with pytest.raises(TypeError):
        _core.apply("exp", x, None)
