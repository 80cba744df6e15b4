"""Texts that are written side by side come out as each would alone, whoever comes and goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anymamba
from anymamba import Engine, Sampling
from anymamba.errors import InputError
from anymamba.runtime.generation import Batch, Sampler, TokenGenerator
from anymamba.runtime.state import BatchState
from tests.support.files import write_folder
from tests.support.reference import words
from tests.support.tolerance import assert_same

SLOTS = 4
# Longer than one call reads, so that a prompt goes on beside others' tokens.
LONG = 600


@pytest.fixture(params=["mamba", "mamba2"], scope="module")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_folder(tmp_path_factory.mktemp("batch") / "model", model_type=request.param)
    return anymamba.load(folder)


def generator(engine: Engine, ids: list[int], **chosen: Any) -> TokenGenerator:
    sampler = Sampler(Sampling(**chosen), ids, engine._network.vocabulary)
    return TokenGenerator(sampler, lambda _: "", ())


def empty(engine: Engine, rows: int = SLOTS) -> BatchState:
    return BatchState.empty(engine.identity.sizes, rows)


def add(batch: Batch, engine: Engine, row: int, ids: list[int], **chosen: Any) -> None:
    batch.add(row, np.array(ids), generator(engine, ids, **chosen))


TEXTS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 17, LONG]),  # of the prompt
        st.integers(1, 6),  # new tokens
        st.integers(0, 5),  # steps until it comes
        st.booleans(),  # whether it is cancelled after a token
        st.integers(0, 1 << 16),  # its seed
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=15)
@given(texts=TEXTS)
def test_texts_that_come_and_go(
    engine: Engine, texts: list[tuple[int, int, int, bool, int]]
) -> None:
    blocks = empty(engine)
    batch, waiting, row_of = Batch(engine._network, blocks), list(range(len(texts))), {}
    written: dict[int, list[int]] = {number: [] for number in waiting}
    step = 0
    while waiting or batch.rows:
        free = [row for row in range(SLOTS) if row not in batch.rows]
        for number in [n for n in waiting if texts[n][2] <= step][: len(free)]:
            waiting.remove(number)
            row = free.pop()
            row_of[row] = number
            blocks.conv[:, row], blocks.ssm[:, row] = 0, 0
            length, new, _, _, seed = texts[number]
            add(batch, engine, row, words(length), max_new_tokens=new, temperature=0.9, seed=seed)
        for row, piece in batch.step():
            number = row_of[row]
            written[number] += piece.ids
            if texts[number][3] and row in batch.rows:
                batch.cancel(row)
        step += 1
    for (length, new, _, cancelled, seed), ids in zip(texts, written.values(), strict=True):
        alone = engine.generate(words(length), max_new_tokens=new, temperature=0.9, seed=seed)
        assert ids == (alone.ids[:1] if cancelled else alone.ids)


def test_rows_without_a_text_stay_as_they_are(engine: Engine) -> None:
    blocks = empty(engine)
    blocks.conv[:], blocks.ssm[:] = 7, 7
    blocks.conv[:, 2], blocks.ssm[:, 2] = 0, 0
    batch = Batch(engine._network, blocks)
    add(batch, engine, 2, words(9), max_new_tokens=3)
    while batch.rows:
        batch.step()
    others = [0, 1, 3]
    assert (blocks.conv[:, others] == 7).all()
    assert (blocks.ssm[:, others] == 7).all()
    assert blocks.counts.tolist() == [0, 0, 11, 0]
    assert [blocks.logits[row] for row in others] == [None] * 3
    alone = engine.state()
    ids = engine.generate(words(9), max_new_tokens=3).ids
    engine.prefill(alone, words(9) + ids[:2])
    assert_same(blocks.ssm[:, [2]], alone.ssm_states)


def test_a_long_prompt_does_not_hold_up_others(engine: Engine) -> None:
    batch = Batch(engine._network, empty(engine))
    add(batch, engine, 0, words(5), max_new_tokens=50)
    assert [row for row, _ in batch.step()] == [0]
    add(batch, engine, 1, words(3 * LONG), max_new_tokens=2)
    steps = [[row for row, _ in batch.step()] for _ in range(5)]
    assert steps == [[0], [0], [0], [0, 1], [0, 1]]


def test_short_prompts_do_not_wait_for_long_ones(engine: Engine) -> None:
    """A step each at most, and the long one has every other step."""
    batch = Batch(engine._network, empty(engine), chunk_tokens=8)
    batch.add(0, np.arange(200) % 16, None)
    batch.step()
    for turn in range(1, 6):
        batch.add(1, np.arange(5), None)
        batch.add(2, np.arange(3), None)
        first = [row for row, _ in batch.step()]
        second = [row for row, _ in batch.step()]
        assert sorted(first + second) == [1, 2]
        assert batch.blocks.counts[0] == 8 * (turn + 1)
        batch.blocks.counts[1:3] = 0
    while batch.rows:
        before = int(batch.blocks.counts[0])
        batch.step()
        assert batch.blocks.counts[0] == min(200, before + 8)


def test_a_cancelled_row_is_free_at_once(engine: Engine) -> None:
    batch = Batch(engine._network, empty(engine, 1))
    add(batch, engine, 0, words(2 * LONG), max_new_tokens=5)
    batch.step()  # within its prompt
    with pytest.raises(InputError, match="row 0 writes a text already"):
        add(batch, engine, 0, words(5))
    batch.cancel(0)
    assert batch.step() == []
    add(batch, engine, 0, words(5), max_new_tokens=1)
    assert len(batch.step()) == 1


def test_what_cannot_be_written_is_refused(engine: Engine) -> None:
    batch = Batch(engine._network, empty(engine))
    with pytest.raises(InputError, match="row 4 is not there, expected a free one of 4"):
        add(batch, engine, 4, words(2))
    with pytest.raises(InputError, match="token 1000000, expected 0 to"):
        batch.add(0, np.array([10**6]), generator(engine, []))
    assert batch.rows == []


def test_two_rows_never_share_a_slot(engine: Engine) -> None:
    """The core refuses it, for they would write over each other."""
    blocks, ids = empty(engine), np.array([1])
    with pytest.raises(Exception, match="slot 1 is given to two rows"):
        engine._network.advance(blocks, [1, 1], [ids, ids])
    states = (blocks.conv, blocks.ssm, np.empty((1, engine._network.vocabulary), np.float32))
    for slot in (-1, 4):
        with pytest.raises(Exception, match=f"slot {slot} is not one of 4"):
            engine._network._model.step(ids, None, *states, slots=np.array([slot]))
    assert not blocks.ssm.any()
