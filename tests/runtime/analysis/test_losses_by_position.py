"""Loss by position, against windows that are scored one by one in plain Python."""

import statistics

import numpy as np
import pytest

import anymamba
from anymamba.errors import InputError
from anymamba.runtime.analysis.losses_by_position import helpful_context, loss_by_position
from anymamba.runtime.engine import Engine
from tests.support.reference import words


def loss_of(engine: Engine, context: list[int], token: int) -> float:
    logits_v = engine.logits(context)[-1].astype(np.float64)
    return float(np.log(np.exp(logits_v).sum()) - logits_v[token])


@pytest.mark.parametrize("before", [[], [5], [5, 6]])
def test_windows_side_by_side(before: list[int], engine: Engine) -> None:
    ids = words(29)  # three windows of 8, and 5 tokens that are left over
    found = loss_by_position(engine, ids, 8, before=before)
    assert [(part.first, part.last) for part in found[-3:]] == [(1, 1), (2, 3), (4, 7)]
    assert len(found) == (4 if before else 3)
    for part in found:
        means = [
            statistics.mean(
                loss_of(engine, before + ids[start : start + at], ids[start + at])
                for at in range(part.first, part.last + 1)
            )
            for start in (0, 8, 16)
        ]
        # float32 logits of size 1, in different batches.
        assert part.nats_per_token == pytest.approx(statistics.mean(means), abs=1e-4)
        assert part.error == pytest.approx(statistics.stdev(means) / 3**0.5, abs=1e-4)
        assert part.tokens == 3 * (part.last - part.first + 1)


def test_overlapping_windows_predict_the_same_tokens_with_each_context(engine: Engine) -> None:
    ids = words(43)
    found = loss_by_position(engine, ids, 8, stride=2)
    assert [(part.first, part.last) for part in found] == [(1, 1), (2, 3), (4, 7)]
    for part in found[1:]:
        # Parts 8 to 39 of the text; of each token's contexts those with an even beginning.
        losses = [
            loss_of(engine, ids[at - context : at], ids[at])
            for at in range(8, 40)
            for context in range(part.first, part.last + 1)
            if (at - context) % 2 == 0
        ]
        assert part.tokens == len(losses)
        assert part.nats_per_token == pytest.approx(statistics.mean(losses), abs=1e-4)
    assert found[1].tokens == 32
    assert found[2].gain == pytest.approx(found[1].nats_per_token - found[2].nats_per_token)


def test_context_helps_the_bundled_model() -> None:
    engine = anymamba.load()
    text = "ROMEO:\nWhat is thy name, good lady?\n" * 16
    found = loss_by_position(engine, engine.tokenize(text), 64, stride=16)
    assert helpful_context(found) == 63  # a text that repeats itself is known by then
    assert found[0].gain is None
    assert found[-1].nats_per_token < found[0].nats_per_token


def test_one_window_has_no_error(engine: Engine) -> None:
    (part,) = loss_by_position(engine, words(2), 2)
    assert (part.error, part.gain, part.gain_error) == (None, None, None)
    assert helpful_context([part]) == 0


@pytest.mark.parametrize(
    ("length", "window", "stride", "reason"),
    [(9, 10, None, "need 10"), (19, 10, 5, "need 20"), (99, 10, 3, "stride"), (9, 1, None, "least"),
     (9, 0, None, "least"), (9, 4, 8, "stride")],
)  # fmt: skip
def test_windows_that_do_not_fit(
    length: int, window: int, stride: int | None, reason: str, engine: Engine
) -> None:
    with pytest.raises(InputError, match=reason):
        loss_by_position(engine, words(length), window, stride)


def test_progress_ends_at_the_last_window(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    loss_by_position(engine, words(24), 8, progress=lambda *count: told.append(count))
    assert told == [(1, 3), (2, 3), (3, 3)]
