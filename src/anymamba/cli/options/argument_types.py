"""Numbers on the command line, refused where they make no sense."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(at_least: int, at_most: int = 2**63 - 1) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < at_least:
            raise argparse.ArgumentTypeError(f"{text} is too small, the least is {at_least}")
        if value > at_most:
            raise argparse.ArgumentTypeError(f"{text} is too large, the most is {at_most}")
        return value

    return parse


def number(
    low: float, high: float = math.inf, *, above_low: bool = False
) -> Callable[[str], float]:
    """A parser of finite numbers from `low` to `high`, or with `above_low` from just above."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        fits = low < value <= high if above_low else low <= value <= high
        if not fits or math.isinf(value):
            start = f"above {low:g}" if above_low else f"{low:g} or more"
            end = "" if math.isinf(high) else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {start}{end}")
        return value

    return parse


def byte_count(text: str) -> int:
    """A number of bytes, such as `500M` or `2G`; each unit is 1,024 times the one before."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    factors = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    if unit not in factors or not number.isdecimal() or len(number) > 12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 2G")
    return int(number) * factors[unit]
