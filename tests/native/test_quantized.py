"""Products with weights of 8 and 4 bits, against the same roundings in float64."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba import _core
from tests.support.instruction_sets import ISAS, kernels_of

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Within a group sums are whole and exact; between groups they are float32, in another order.
TOLERANCE = 1e-5


def to_bfloat16(x: Doubles) -> npt.NDArray[np.uint16]:
    """The upper halves; whether they are rounded or cut matters to no test here."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Doubles:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(x_mk: Floats, group: int) -> Doubles:
    """The rows as the kernels round them: 8 bits, in groups."""
    groups = x_mk.reshape(x_mk.shape[0], -1, group)
    most = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    whole = np.rint(groups.astype(np.float64) * inverse)
    return (whole * (most / np.float32(127))).reshape(x_mk.shape)


class Weight:
    """Random numbers of `bits` bits, packed and not."""

    def __init__(self, n: int, k: int, bits: int, group: int, offset: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        q = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
        self.scales = to_bfloat16(rng.uniform(0.01, 0.1, (n, k // group)))
        self.minima = to_bfloat16(rng.normal(size=(n, k // group))) if offset else None
        self.q = q
        if bits == 4:
            halves = q.reshape(n, -1, 2, group // 2)
            self.q = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(n, k // 2)
        scales = np.repeat(from_bfloat16(self.scales), group, 1)
        self.values = scales * (q.astype(np.float64) - (0 if offset else 2 ** (bits - 1)))
        if self.minima is not None:
            self.values += np.repeat(from_bfloat16(self.minima), group, 1)


def check(m: int, n: int, k: int, bits: int, group: int, offset: bool, few: bool) -> None:
    rng = np.random.default_rng(m + n + k)
    weight = Weight(n, k, bits, group, offset, seed=m + 3 * n + 5 * k)
    x_mk = rng.normal(size=(m, k)).astype(np.float32)
    bias_n = rng.normal(size=n).astype(np.float32)
    y_mn = np.full((m, n), np.nan, np.float32)
    _core.quantized_product(x_mk, weight.q, weight.scales, weight.minima, bias_n, y_mn, few)
    expected = rounded(x_mk, group) @ weight.values.T + bias_n
    assert np.abs(y_mn - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("few", [True, False])
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    groups=st.integers(1, 40),
    group=st.sampled_from([32, 64, 128]),
    offset=st.booleans(),
)
def test_products(
    isa: str, bits: int, few: bool, m: int, n: int, groups: int, group: int, offset: bool
) -> None:
    with kernels_of(isa):
        check(m, n, groups * group, bits, group, offset, few)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("few", [True, False])
def test_rows_of_zeros_and_of_no_numbers(isa: str, few: bool) -> None:
    """Zeros stay zeros; what is infinite or no number spoils its row and no other."""
    weight = Weight(5, 256, 8, 128, offset=False, seed=0)
    x_mk = np.zeros((4, 256), np.float32)
    x_mk[1, 200], x_mk[2, 3], x_mk[3, 130] = np.nan, np.inf, -np.inf
    y_mn = np.ones((4, 5), np.float32)
    with kernels_of(isa):
        _core.quantized_product(x_mk, weight.q, weight.scales, None, None, y_mn, few)
    assert not y_mn[0].any()
    assert np.isnan(y_mn[1:]).all()


@pytest.mark.parametrize("few", [True, False])
def test_the_number_of_threads_changes_no_bit(few: bool) -> None:
    weight = Weight(1000, 256, 4, 64, offset=True, seed=0)
    x_mk = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    results = []
    before = _core.threads()
    for threads in (1, 2, 4):
        _core.set_threads(threads)
        y_mn = np.empty((16, 1000), np.float32)
        _core.quantized_product(x_mk, weight.q, weight.scales, weight.minima, None, y_mn, few)
        results.append(y_mn)
    _core.set_threads(before)
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_what_does_not_fit_is_refused() -> None:
    x_mk, y_mn = np.zeros((1, 128), np.float32), np.zeros((1, 2), np.float32)
    scales = np.zeros((2, 1), np.uint16)
    for q in (np.zeros((2, 100), np.uint8), np.zeros((2, 128), np.int8)):
        with pytest.raises(ValueError, match="weight: q "):
            _core.quantized_product(x_mk, q, scales, None, None, y_mn)
    q = np.zeros((2, 64), np.uint8)
    for wrong in (np.zeros((2, 3), np.uint16), np.zeros((2, 0), np.uint16)):
        with pytest.raises(ValueError, match="8 or 4 bits in groups of 32, 64 or 128"):
            _core.quantized_product(x_mk, q, wrong, None, None, y_mn)
    with pytest.raises(ValueError, match="scales must be bfloat16"):
        _core.quantized_product(x_mk, q, scales.astype(np.float32), None, None, y_mn)
