"""What the benchmarks share: turns, ratios, tables, limits, peers."""

import time

import pytest
import torch
from common import peak, roofline, shapes, tables, timing
from contenders import anymamba_model, registry


def test_cases_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    cases = [timing.Case(name, lambda name=name: order.append(name)) for name in names]
    timing.interleave(cases, rounds=2)
    assert "".join(order) == "abc" + "abc" + "cba"  # a warm-up, then two rounds


def test_a_slow_case_takes_few_turns_spread_over_all() -> None:
    cases = [timing.Case("fast", lambda: None), timing.Case("slow", lambda: None, rounds=2)]
    timings = timing.interleave(cases, rounds=6)
    assert list(timings["fast"].seconds) == [0, 1, 2, 3, 4, 5]
    assert list(timings["slow"].seconds) == [0, 3]


def test_repeats_preparation_and_own_clock() -> None:
    calls: list[str] = []
    cases = [
        timing.Case(
            "sleeps",
            lambda: time.sleep(0.002),
            repeats=5,
            prepare=lambda: calls.append("prepared"),
            warm_up=lambda: calls.append("warm"),
        ),
        timing.Case("says", lambda: 42.0, own_clock=True),
    ]
    timings = timing.interleave(cases, rounds=1)
    assert calls == ["prepared", "warm", "prepared"]
    assert 0.002 <= timings["sleeps"].median < 0.01  # of one repeat, not of five
    assert timings["says"].median == 42.0


def test_speeds_are_compared_within_rounds() -> None:
    # The machine became ten times slower after the first round; the ratio is 2 all along.
    one = timing.Timing({0: 1.0, 1: 10.0, 2: 10.0})
    half_as_fast = timing.Timing({0: 2.0, 2: 20.0})
    assert half_as_fast.speed_beside(one) == 0.5
    assert one.times(3).seconds == {0: 3.0, 1: 30.0, 2: 30.0}


def test_a_table_drops_empty_columns_and_keeps_reasons() -> None:
    measured = tables.timed("ours", timing.Timing({0: 0.5}), tokens=10)
    table = tables.Table("A title", rows=[measured, tables.not_measured("theirs", "absent")])
    text = tables.markdown(table.as_json())
    assert "**A title**" in text
    assert "of the limit" not in text
    assert "| ours   | 500 | 500..500 |       20 |        |" in text
    assert "| theirs |     |          |          | absent |" in text


def test_an_absent_peer_says_how_to_install_it() -> None:
    peer = registry.Peer(("no_such_module_at_all",), "pip install something")
    assert peer.missing() == (
        "not measured: no_such_module_at_all not installed (pip install something)"
    )


def test_bytes_of_a_step_leave_out_an_embedding_that_is_no_head() -> None:
    """A step reads one row of it; of a tied one it reads all, as the head."""
    seen = {}
    for tied in (True, False):
        shape = shapes.Shape(
            vocab_size=1000, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=tied
        )
        seen[tied] = roofline.stored_bytes(anymamba_model.random_model(shape))
    assert seen[True] == seen[False] > 4 * 1000 * 32


def test_products_are_those_of_the_model() -> None:
    """The products of a forward pass, counted by PyTorch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model = anymamba_model.random_model(shapes.QUICK)
    rows, head_rows = 7, 3
    d, e = shapes.QUICK.hidden_size, shapes.QUICK.inner
    n, r = shapes.QUICK.state_size, shapes.QUICK.rank
    a_layer = d * 2 * e + e * (r + 2 * n) + r * e + e * d
    multiplied = rows * shapes.QUICK.num_hidden_layers * a_layer
    multiplied += head_rows * d * shapes.QUICK.vocab_size
    with FlopCounterMode(display=False) as counter:
        products = roofline.ModelProducts(model, rows, head_rows)
        products()
    assert counter.get_total_flops() == products.operations == 2 * multiplied


def test_the_peak_counts_what_was_freed() -> None:
    size = 64 << 20
    kept = torch.zeros(8)
    used = peak.peak_above(lambda: None, lambda: torch.ones(size // 4).sum())
    # The allocator may give back up to some pages of its own meanwhile.
    assert size - (1 << 20) <= used < 1.5 * size
    assert peak.peak_above(lambda: None, kept.sum) < size / 4


@pytest.mark.parametrize("quick", [True, False])
def test_shapes_are_those_of_the_config(quick: bool) -> None:
    shape = shapes.QUICK if quick else shapes.SMALL
    config = anymamba_model.random_model(shape).config
    assert (config.intermediate_size, config.time_step_rank) == (shape.inner, shape.rank)
