"""Whether sums are taken in one order. AnyMamba's always are."""

from __future__ import annotations

__all__ = ["set_deterministic_mode", "use_deterministic_mode"]


def use_deterministic_mode() -> bool:
    """True: results do not depend on the run, nor on the number of threads.

    Example:
        >>> use_deterministic_mode()
        True
    """
    return True


def set_deterministic_mode(value: bool | None) -> None:
    """Change nothing: there is no other mode.

    Args:
        value: what the original would be set to.
    """
