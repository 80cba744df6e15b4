"""The settings by which a text is continued, as a call gives them or a model suggests them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from anymamba.checkpoint.io import shown
from anymamba.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Constraint = Callable[[Sequence[int], "NDArray[np.float32]"], "ArrayLike"]

# Factors and summands outside of these would turn usual logits into zeros or infinities.
_SMALLEST, _LARGEST = 1e-6, 1e6
_MOST = 2**63 - 1
# What says how tokens are drawn.
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SUMMANDS = f"a number from -{_LARGEST:g} to {_LARGEST:g}"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when the text ends. The names are Transformers'.

    Without any setting the likeliest token is taken (greedy), as by Transformers' `generate`.
    It is drawn by chance if one of `temperature`, `top_k`, `top_p`, `min_p` and `typical_p` is
    given, or `do_sample=True`; but never if `temperature` is 0 or `do_sample` is False.

    Args:
        temperature: below 1 makes likely tokens likelier, above 1 less so. 0 is greedy, and 1 is
            what is used if the token is drawn and this is None.
        top_k: draw among the k likeliest. 0 or None: all.
        top_p: draw among the likeliest that together have this probability. 1 or None: all.
        min_p: draw among those at least so many times as likely as the likeliest. 0 or None: all.
        typical_p: draw among those whose surprise is nearest to the expected one and that
            together have this probability. 1 or None: all.
        do_sample: False for greedy whatever else is set.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely.
        presence_penalty: taken from the logit of each token that was chosen before; the prompt
            does not count.
        frequency_penalty: the same, once for each time that it was chosen.
        logit_bias: what is added to the logits of these tokens.
        seed: makes the run reproducible. None: another one each time.
        stop: strings before which the text ends.
        stop_ids: tokens that end the text, besides the model's own end tokens.
        max_new_tokens: how many tokens are made at most.
        top_logprobs: None for no log-probabilities, 0 for that of each chosen token, k for those
            of the k likeliest too.
        constraint: called with the tokens chosen so far (without the prompt; the same growing
            list each time) and the scores after bias and penalties, which it must not write to.
            It returns a boolean for each token of the vocabulary: whether it is allowed now.

    Raises:
        InputError: a setting has the wrong type or is out of its range.

    Example:
        >>> Sampling().greedy, Sampling(top_p=0.9).greedy, Sampling(temperature=0).greedy
        (True, False, True)
        >>> Sampling(top_p=1.5)
        Traceback (most recent call last):
        anymamba.errors.InputError: top_p is 1.5, expected a number above 0, at most 1, or None
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    max_new_tokens: int = 200
    top_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        temperatures = f"0 for greedy, or a number from {_SMALLEST:g} to {_LARGEST:g}, or None"
        self._number("temperature", lambda x: x == 0 or _SMALLEST <= x <= _LARGEST, temperatures)
        for name in ("top_p", "typical_p"):
            self._number(name, lambda x: 0 < x <= 1, "a number above 0, at most 1, or None")
        self._number("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1, or None")
        factors = f"a number from {_SMALLEST:g} to {_LARGEST:g}"
        self._number("repetition_penalty", lambda x: _SMALLEST <= x <= _LARGEST, factors)
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, _is_summand, _SUMMANDS)
        for name in ("top_k", "top_logprobs"):
            self._integer(name, 0, "a whole number, 0 or more, or None")
        self._integer("seed", 0, "a whole number, 0 or more, or None")
        self._integer("max_new_tokens", 1, "a whole number, 1 or more")
        if not isinstance(self.do_sample, bool | None):
            raise _refusal("do_sample", self.do_sample, "True, False or None")
        if self.constraint is not None and not callable(self.constraint):
            raise _refusal("constraint", self.constraint, "a function, or None")
        self._set("logit_bias", _checked_bias(self.logit_bias))
        self._set("stop", _checked_stop(self.stop))
        self._set("stop_ids", _checked_stop_ids(self.stop_ids))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, rather than one drawn by chance."""
        if self.do_sample is False or self.temperature == 0:
            return True
        return not self.do_sample and all(getattr(self, name) is None for name in _DRAWING)

    def _number(self, name: str, fits: Callable[[float], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is None and expected.endswith("or None"):
            return
        number = _as_number(value)
        if number is None or not fits(number):
            raise _refusal(name, value, expected)
        self._set(name, number)

    def _integer(self, name: str, least: int, expected: str) -> None:
        value = getattr(self, name)
        if value is None and expected.endswith("or None"):
            return
        if not _is_integer(value) or not least <= value <= _MOST:
            raise _refusal(name, value, expected)
        self._set(name, int(value))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _is_summand(number: float) -> bool:
    return -_LARGEST <= number <= _LARGEST


def _as_number(value: object) -> float | None:
    """The value as a float if it is a finite number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return _is_integer(value) and 0 <= value <= _MOST  # type: ignore[operator]


def _checked_bias(bias: object) -> dict[int, float]:
    expected = f"a dict from token ids, 0 or more, to {_SUMMANDS}"
    if not isinstance(bias, Mapping):
        raise _refusal("logit_bias", bias, expected)
    checked = {}
    for id, value in bias.items():
        number = _as_number(value)
        if not _is_id(id) or number is None or not _is_summand(number):
            raise _refusal("logit_bias", {id: value}, expected)
        checked[int(id)] = number
    return checked


def _checked_stop(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
        raise _refusal("stop", stop, "strings of at least one character each")
    return tuple(stops)


def _checked_stop_ids(stop_ids: object) -> tuple[int, ...]:
    ids = (stop_ids,) if _is_id(stop_ids) else stop_ids
    if not isinstance(ids, Sequence) or not all(_is_id(id) for id in ids):
        raise _refusal("stop_ids", stop_ids, "token ids, whole numbers, 0 or more")
    return tuple(int(id) for id in ids)


def _refusal(name: str, value: object, expected: str) -> InputError:
    return InputError(f"{name} is {shown(value)}, expected {expected}")


def chosen_sampling(
    sampling: Sampling | None, max_new_tokens: int | None, settings: Mapping[str, Any]
) -> Sampling:
    """Put together what a call says about sampling.

    Args:
        sampling: where the others start from; None for the defaults.
        max_new_tokens: goes before the field of that name, unless it is None.
        settings: fields of `Sampling` by name, which go before those of `sampling`.

    Raises:
        InputError: there is no such field, or a value makes no sense.

    Example:
        >>> chosen_sampling(Sampling(top_k=5), 3, {"temperature": 0.5}).top_k
        5
    """
    known = [field.name for field in fields(Sampling)]
    unknown = sorted(settings.keys() - {*known})
    if unknown:
        raise InputError(f"there is no setting {', '.join(unknown)}; there are {', '.join(known)}")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a Sampling, got {shown(sampling)}")
    given = dict(settings)
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    return replace(sampling or Sampling(), **given)


def suggested_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the fields of `Sampling` that a generation_config.json sets.

    Transformers draws tokens only where the file says `do_sample`; without it, temperature and
    the like suggest nothing, and they are left out.

    Args:
        generation_config: the file's fields; empty where there is no file.

    Returns:
        Fields for `Sampling`, those that are set only.

    Raises:
        CheckpointError: a value makes no sense.

    Example:
        >>> suggested_sampling({"do_sample": True, "temperature": 0.7, "top_p": None})
        {'temperature': 0.7}
        >>> suggested_sampling({"temperature": 0.7, "repetition_penalty": 1.1})
        {'repetition_penalty': 1.1}
    """
    draws = generation_config.get("do_sample") is True
    names = (*(_DRAWING if draws else ()), "repetition_penalty")
    found = {name: generation_config.get(name) for name in names}
    if draws and found["temperature"] is None:
        found["temperature"] = 1.0  # Transformers' default
    kept = {name: value for name, value in found.items() if value is not None}
    try:
        Sampling(**kept)
    except InputError as error:
        raise CheckpointError(f"generation_config.json: {error}; got {shown(kept)}") from None
    return kept
