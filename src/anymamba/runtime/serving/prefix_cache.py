"""States of texts that were read before, found by the exact tokens that a new text begins with.

A state is one block of fixed size, however long its text is. It stands for exactly the tokens that
were read into it: a hit is a copy, and nothing has to be recomputed or cut.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anymamba.errors import InputError, StateError
from anymamba.runtime.serving.state_folder import StateFolder
from anymamba.runtime.state import Identity, State

Key = tuple[int, str]
"""How many tokens a text has, and what tells them from others."""

# So many states that were thrown away are remembered by name, to say why a text was read anew.
_MOST_FORGOTTEN = 1 << 16


@dataclass(frozen=True)
class Found:
    """What the cache has for a text.

    Args:
        state: what was read of it, not to be written to; None where nothing was.
        count: how many of its tokens that is.
        miss: why no more were: "no such prefix", "evicted", "other model" or
            "other adapter". None where all of them were read.
    """

    state: State | None
    count: int
    miss: str | None


class TokenHash:
    """Tells a text from others by all its tokens, as it grows.

    Example:
        >>> text = TokenHash()
        >>> text.add(np.array([1, 2]))
        >>> text.add(np.array([3]))
        >>> text.key == key_of(np.array([1, 2, 3]))
        True
    """

    def __init__(self) -> None:
        self.count = 0
        self._digest = hashlib.sha256()

    def add(self, ids: NDArray[np.int64]) -> None:
        """Let the text have these tokens too."""
        self.count += ids.size
        self._digest.update(np.ascontiguousarray(ids, "<i8").tobytes())

    @property
    def key(self) -> Key:
        """The key of the text as it is now."""
        return self.count, self._digest.hexdigest()


def key_of(ids: NDArray[np.int64]) -> Key:
    """The key of a text of these tokens."""
    text = TokenHash()
    text.add(ids)
    return text.key


class PrefixCache:
    """States by the tokens that were read, within a budget of memory: the last used stay.

    One thread uses it.

    Args:
        most_bytes: of states in memory.
        folder: where states are kept as files beside, if anywhere.

    Raises:
        InputError: the budget is negative.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> cache, ids = PrefixCache(1 << 20), np.array(engine.tokenize("ROMEO: But soft"))
        >>> state = engine.prefill(engine.state(), ids[:6].tolist())
        >>> cache.keep("bundled", key_of(ids[:6]), state)
        >>> cache.find("bundled", ids, engine.identity).count
        6
        >>> cache.find("another", ids, engine.identity).miss
        'other model'
    """

    def __init__(self, most_bytes: int, folder: StateFolder | None = None) -> None:
        if most_bytes < 0:
            raise InputError(f"the cache's memory is {most_bytes} bytes, expected 0 or more")
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._folder = folder
        self._states: OrderedDict[tuple[str, Key], State] = OrderedDict()
        self._forgotten: OrderedDict[tuple[str, Key], None] = OrderedDict()
        # Of both: which models have read a text, and how many texts there are of a length.
        self._models: dict[Key, set[str]] = {}
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._states)

    def keep(self, model: str, key: Key, state: State) -> None:
        """Remember what was read of a text.

        Args:
            model: the name of the model and its adapter.
            key: of all tokens that were read, from the text's beginning.
            state: what holds them; it may not change any more.

        Raises:
            InputError: the state has read another number of tokens.
        """
        if state.token_count != key[0]:
            raise InputError(
                f"the state has read {state.token_count} tokens, expected the {key[0]} given"
            )
        if self._folder is not None:
            self._folder.write(key, state)
        self._put((model, key), state)

    def find(self, model: str, ids: NDArray[np.int64], identity: Identity) -> Found:
        """The longest beginning of a text that this model has read.

        Args:
            model: the name of the model and its adapter.
            ids: the text's tokens.
            identity: the model's, which a state from a file must have.
        """
        counts = self._counts(identity)
        keys = list(_keys(ids, counts))
        for key in reversed(keys):
            state = self._get(model, key, identity)
            if state is not None:
                return Found(state, key[0], self._miss(model, keys, key[0], ids.size))
        return Found(None, 0, self._miss(model, keys, 0, ids.size))

    def _counts(self, identity: Identity) -> Collection[int]:
        known = self._lengths.keys()
        return known if self._folder is None else known | self._folder.counts(identity)

    def _get(self, model: str, key: Key, identity: Identity) -> State | None:
        state = self._states.get((model, key))
        if state is not None:
            self._states.move_to_end((model, key))
            return state
        if self._folder is None:
            return None
        try:
            state = self._folder.read(key, identity)
        except (StateError, OSError):  # broken or replaced since: the text is read again
            return None
        if state is not None:
            self._put((model, key), state)
        return state

    def _put(self, name: tuple[str, Key], state: State) -> None:
        if (before := self._states.pop(name, None)) is not None:
            self.nbytes -= before.nbytes
        self._forgotten.pop(name, None)
        self._states[name] = state
        self.nbytes += state.nbytes
        model, key = name
        self._lengths[key[0]] += key not in self._models
        self._models.setdefault(key, set()).add(model)
        while self.nbytes > self.most_bytes:
            old, evicted = self._states.popitem(last=False)
            self.nbytes -= evicted.nbytes
            self._forgotten[old] = None
            if len(self._forgotten) > _MOST_FORGOTTEN:
                self._drop_name(*self._forgotten.popitem(last=False)[0])

    def _drop_name(self, model: str, key: Key) -> None:
        self._models[key].discard(model)
        if not self._models[key]:
            del self._models[key]
            self._lengths[key[0]] -= 1
            if not self._lengths[key[0]]:
                del self._lengths[key[0]]

    def _miss(self, model: str, keys: list[Key], count: int, length: int) -> str | None:
        """Why no more than `count` of a text's tokens are known."""
        if count == length:
            return None
        longer = [key for key in keys if key[0] > count]
        if any((model, key) in self._forgotten for key in longer):
            return "evicted"
        others = {name for key in longer for name in self._models.get(key, ())}
        if not others:
            return "no such prefix"
        base = model.partition(":")[0]
        same_base = any(name.partition(":")[0] == base for name in others)
        return "other adapter" if same_base else "other model"


def _keys(ids: NDArray[np.int64], counts: Collection[int]) -> Iterator[Key]:
    """The keys of a text's beginnings of so many tokens, the shortest first, in one pass."""
    text = TokenHash()
    for count in sorted(count for count in counts if 0 < count <= ids.size):
        text.add(ids[text.count : count])
        yield text.key
