"""Signals: what is raised in native code may come out as another error, in a finalizer not at all; it is a stop."""

import signal
import subprocess
import sys

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


IN_A_FINALIZER = """
import signal, time
from wake2vec import cli
from wake2vec.errors import Stopped

class Dropped:
    def __init__(self, act):
        self.act = act
    def __del__(self):
        self.act()

def stop():
    raise Stopped("SIGTERM")

def app(**_):
    Dropped(stop)
    Dropped(lambda: signal.raise_signal(signal.SIGTERM))
    time.sleep(60)

cli.app = app
cli.main()
"""


def test_a_signal_in_a_finalizer_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FINALIZER], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_other_errors_in_a_finalizer_are_still_told() -> None:
    code = IN_A_FINALIZER.replace("    Dropped(stop)", "    Dropped(lambda: 1 / 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 75
    assert "ZeroDivisionError" in done.stderr
    assert "KeyboardInterrupt" not in done.stderr
