"""Signals end a run after its step."""

import signal

import pytest

from anymamba.training.lifecycle import StopSignals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGBREAK"])
def test_a_signal_is_noted_and_the_handler_comes_back(name):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"{name} is Windows'")
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received is number
    assert signal.getsignal(number) is before


def test_the_first_signal_counts_and_a_second_ctrl_c_ends_at_once():
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signals.received is signal.SIGTERM
