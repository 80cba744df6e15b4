"""A text gets the same bits alone and beside others, in any cut, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anymamba
from anymamba.errors import BackendError
from anymamba.runtime.convert import convert
from anymamba.runtime.network import Network
from anymamba.runtime.state import BatchState
from tests.support.files import write_folder
from tests.support.instruction_sets import ISAS
from tests.support.operators import natively

# Numbers of states that fill vectors and leave rests, and an inner width that no block divides.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 128, "state_size": 21, "time_step_rank": 7},
    "falcon_mamba": {"hidden_size": 128, "state_size": 16, "time_step_rank": 8},
    "mamba2": {"hidden_size": 128, "state_size": 40, "head_dim": 32, "num_heads": 8, "n_groups": 2},
}
WEIGHTS = ("f32", "bf16", "f16", "int8", "int4")
LENGTH = 40


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with natively(request.param):
        yield request.param


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"model_type": request.param, **ARCHITECTURES[request.param]}
    return write_folder(tmp_path_factory.mktemp("model") / request.param, **fields)


@pytest.fixture(scope="module", params=WEIGHTS)
def text(folder: Path, request: pytest.FixtureRequest, isa: str) -> Text:
    return Text(folder, request.param)


class Text:
    """A text in one call, and the same in any number of calls."""

    def __init__(self, folder: Path, weights: str, matmul_dtype: str | None = None) -> None:
        engine = load(folder, weights)
        self.network = Network(engine.weights, 2, matmul_dtype, deterministic=True)
        self.sizes = engine.identity.sizes
        self.ids = np.random.default_rng(1).integers(0, self.network.vocabulary, LENGTH)
        blocks = BatchState.empty(self.sizes, 1)
        self.logits = self.network.read_all(blocks, self.ids)
        self.states = blocks.conv[:, 0], blocks.ssm[:, 0]

    def check(self, cuts: list[int], others: list[list[int]], threads: int) -> None:
        """Read it in parts of some lengths, beside other texts that read so many tokens each."""
        self.network.threads = threads
        random = np.random.default_rng(sum(cuts))
        rows = 1 + max(map(len, others), default=0)
        blocks, start = BatchState.empty(self.sizes, rows), 0
        mine = int(random.integers(rows))
        rest = [row for row in range(rows) if row != mine]
        for turn, cut in enumerate([*cuts, LENGTH]):
            part = self.ids[start : start + cut]
            lengths = others[turn % len(others)] if others else []
            beside = [random.integers(0, self.network.vocabulary, length) for length in lengths]
            self.network.advance(blocks, [mine, *rest[: len(beside)]], [part, *beside])
            start += part.size
            assert np.array_equal(blocks.logits[mine], self.logits[start - 1])
        states = blocks.conv[:, mine], blocks.ssm[:, mine]
        assert all(map(np.array_equal, states, self.states))


@cache
def load(folder: Path, weights: str) -> anymamba.Engine:
    if weights != "f16":
        return anymamba.load(folder, weights)
    return anymamba.load(convert(folder, folder.with_name("f16.gguf"), "gguf", "f16"))


parts = st.lists(st.integers(1, 17), max_size=12)
# Mostly single tokens: then all texts take one step.
neighbours = st.lists(st.one_of(st.just(1), st.integers(0, 9)), max_size=20)


@given(cuts=parts, others=st.lists(neighbours, max_size=3), threads=st.integers(1, 3))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_beside_any_others(
    text: Text, cuts: list[int], others: list[list[int]], threads: int
) -> None:
    text.check(cuts, others, threads)


@pytest.mark.parametrize("batch", [2, 5, 8, 9, 13, 16, 33, 64])
def test_each_size_of_a_batch(text: Text, batch: int) -> None:
    text.check([LENGTH - 3, 1, 1], [[1] * (batch - 1)], 2)


@pytest.mark.usefixtures("isa")
def test_products_in_bfloat16(folder: Path) -> None:
    try:
        text = Text(folder, "bf16", "bfloat16")
    except BackendError:
        pytest.skip("this processor does not multiply bfloat16")
    for batch in (1, 3, 9, 20):
        text.check([LENGTH - 5, 1, 3], [[1] * (batch - 1)], 2)


def test_who_is_deterministic(folder: Path) -> None:
    assert [load(folder, weights).deterministic for weights in WEIGHTS] == [False] * 3 + [True] * 2
    engine = anymamba.load(folder, "f32", deterministic=True)
    assert engine.deterministic
    # What is kept of texts on disk serves the same arithmetic only.
    assert engine.identity.arithmetic != load(folder, "f32").identity.arithmetic
