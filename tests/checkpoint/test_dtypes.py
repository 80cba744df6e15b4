"""bfloat16 rounds as the format says: brute force over its numbers and their neighbours."""

import numpy as np
import pytest

from anymamba.checkpoint.dtypes import to_bfloat16, to_float32

ALL = np.arange(1 << 16, dtype=np.uint16)


def test_what_was_widened_narrows_to_itself() -> None:
    wide = to_float32(ALL)
    numbers = ~np.isnan(wide)
    assert (to_bfloat16(wide)[numbers] == ALL[numbers]).all()
    assert np.isnan(to_float32(to_bfloat16(wide[~numbers]))).all()


def test_widening_puts_zeros_behind() -> None:
    assert to_float32(np.array([0x3FC0, 0xC2F7], np.uint16)).tolist() == [1.5, -123.5]


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_rounds_to_the_nearest_and_ties_to_even(sign: int) -> None:
    """Between each two neighbours: just below the middle, the middle, just above."""
    below = (ALL[:0x7F7F] | sign).astype(np.uint32)  # all finite ones but the last
    middle = (below << 16 | 0x8000).astype(np.int64)
    for offset, expected in ((-1, below), (0, below + (below & 1)), (1, below + 1)):
        values = (middle + offset).astype(np.uint32).view(np.float32)
        assert (to_bfloat16(values) == expected).all()


def test_nan_stays_nan_and_the_large_becomes_infinite() -> None:
    # All bits of the first NaN lie in the half that is dropped.
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32)
    back = to_float32(to_bfloat16(bits.view(np.float32)))
    assert np.isnan(back[:2]).all()
    assert back[2] == np.inf


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), ((1 << 20) + 3,)])
def test_shapes_types_and_strides(shape: tuple[int, ...]) -> None:
    values = np.full(shape, 1.5, np.float32)
    assert (to_bfloat16(values) == 0x3FC0).all()
    assert to_bfloat16(values).shape == to_float32(to_bfloat16(values)).shape == shape
    assert (to_bfloat16(values.astype(np.float16)) == 0x3FC0).all()
    assert (to_bfloat16(np.stack([values, values], axis=-1)[..., 0]) == 0x3FC0).all()
