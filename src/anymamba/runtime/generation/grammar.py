"""Texts that have a form: JSON, or JSON by a schema, enforced token by token with llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_CHARACTERS = 100_000
"""How long a schema may be."""

MOST_GRAMMAR = 2 * MOST_CHARACTERS
"""How long a grammar may be, with all schemas in it."""


class Grammars:
    """Makes constraints for `Sampling` of forms that a text is to have.

    Args:
        tokenizer: the model's.
        vocabulary: how many tokens the model has.
        end_ids: the tokens that end a text. Without any, one that stands for no character that may
            occur in JSON takes their place.

    Raises:
        MissingDependencyError: llguidance is not installed.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> grammars = Grammars(engine.tokenizer, 256, engine.end_ids)
        >>> wanted = grammars.json({"const": "no"})
        >>> found = engine.generate("ROMEO:", constraint=wanted, stop_ids=grammars.end_ids)
        >>> found.text in ('"yes"', '"no"'), found.finish_reason
        (True, 'eos')
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        if find_spec("llguidance") is None:
            raise MissingDependencyError(
                "JSON by a schema needs llguidance: pip install 'anymamba[server]'"
            )
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._end_ids = tuple(end_ids)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end such a text.

        Raises:
            InputError: the model has none, and no token that could stand for one.
        """
        if self._end_ids:
            return self._end_ids
        for id in range(min(self._vocabulary, 256)):
            if self._tokenizer.decode([id]) == "\0":
                return (id,)
        raise InputError("the model has no end token, so that nothing says where JSON ends")

    def json(self, schema: Mapping[str, Any] | bool | None = None) -> Constraint:
        """A constraint to JSON, or to what a JSON schema describes.

        Args:
            schema: the schema; None for any object.

        Raises:
            InputError: it is no schema, asks for what cannot be enforced, or is too large.
        """
        from llguidance import LLMatcher

        try:
            text = json.dumps({"type": "object"} if schema is None else schema)
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it has {len(text)} characters, more than {MOST_CHARACTERS}")
            # Else a model that likes spaces could go on with them forever.
            options: Any = {"whitespace_flexible": False}
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the JSON schema cannot be enforced: {str(error)[:500]}") from None
        return self._constraint(grammar, "JSON schema")

    def lark(self, grammar: str) -> Constraint:
        """A constraint to what a grammar in llguidance's variant of Lark describes.

        Raises:
            InputError: it is no grammar, or is too large.
        """
        from llguidance import LLMatcher

        if len(grammar) > MOST_GRAMMAR:
            message = f"it has {len(grammar)} characters, more than {MOST_GRAMMAR}"
            raise InputError(f"the grammar cannot be enforced: {message}")
        return self._constraint(LLMatcher.grammar_from_lark(grammar), "grammar")

    def special_token(self, text: str) -> str | None:
        """A special token as such a grammar names it, or None where the text is not one."""
        found = self._tokenizer.token_to_id(text)
        added = self._tokenizer.get_added_tokens_decoder() if found is not None else {}
        return text if found in added and added[found].special else None

    def _constraint(self, grammar: str, kind: str) -> Constraint:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._known_tokens, grammar, log_level=0, limits=self._limits())
        if matcher.is_error():
            reason = str(matcher.get_error()).strip()[:500]
            raise InputError(f"the {kind} cannot be enforced: {reason}")
        constraint = Constraint(matcher, self._vocabulary)
        constraint.fresh()(())  # what is too much for the limits shows here
        return constraint

    @staticmethod
    def _limits() -> Any:
        """What a token may cost in steps of the parser and the lexer: bombs hit these."""
        from llguidance import LLParserLimits

        return LLParserLimits(
            max_items_in_row=2000, initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000
        )

    @cached_property
    def _known_tokens(self) -> Any:
        from llguidance import LLTokenizer

        text = self._tokenizer.to_str()
        return LLTokenizer(text, n_vocab=self._vocabulary, eos_token=list(self.end_ids))


class Constraint:
    """Says which tokens may come next, for one text."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._read = 0

    def fresh(self) -> Constraint:
        """The same for another text."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Constraint(matcher, self._vocabulary)

    def __call__(
        self, ids: Sequence[int], scores_v: NDArray[np.float32] | None = None
    ) -> NDArray[np.bool_]:
        """The mask of allowed tokens after those chosen so far."""
        for id in ids[self._read :]:
            if not self._matcher.consume_token(id):
                raise self._failed()
        self._read = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._failed()
        allowed_v = np.unpackbits(bits, bitorder="little")[: self._vocabulary]
        return allowed_v.astype(np.bool_)

    def _failed(self) -> InputError:
        """Why no token may come; behind the first line, llguidance tells its whole state."""
        reason = str(self._matcher.get_error()).strip().partition("\n")[0]
        return InputError(f"the grammar fails: {reason[:500]}")
