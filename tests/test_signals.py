"""Signals: what is raised in the middle of native code may come out as another error, and is a stop all the same."""

import signal

import pytest

from wake2vec.errors import Stopped
from wake2vec.signals import StopSignal


def native_code(number: signal.Signals) -> None:
    """Make another error of the one that a signal's handler raises."""
    try:
        signal.raise_signal(number)
    except Stopped:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_became_another_error_is_a_stop(number: signal.Signals) -> None:
    with StopSignal() as stop, pytest.raises(Stopped, match=number.name), stop.interruptible():
        native_code(number)


def test_an_error_without_a_signal_stays_itself() -> None:
    with StopSignal() as stop, pytest.raises(ValueError, match="shape"), stop.interruptible():
        raise ValueError("could not determine the shape")


def test_a_signal_elsewhere_is_remembered() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("entered")
