"""The native core's instruction sets, and which mixers were called."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from anymamba.modeling.mamba.model import MambaMixer
from tests.support.instruction_sets import ISAS
from tests.support.operators import natively


@pytest.fixture(params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with natively(request.param):
        yield


@pytest.fixture
def mixers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose mixer was called; none where a step was one native call.

    Through a private method, for a replaced forward would keep the native calls away.
    """
    called: list[int] = []
    convolve = MambaMixer._convolve

    def counted(self: MambaMixer, *args: Any, **kwargs: Any) -> Tensor:
        called.append(self.layer_idx)
        return convolve(self, *args, **kwargs)

    monkeypatch.setattr(MambaMixer, "_convolve", counted)
    return called
