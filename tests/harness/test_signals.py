"""A signal ends a script even where its exception is lost; what deals with it is left alone."""
import os
import signal
import time

import pytest

from harness import signals
from harness.signals import ENDING, ended_by_signals


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tenth of a second until it comes again; afterwards the handlers are those of before."""
    monkeypatch.setattr(signals, "AGAIN", 0.1)
    numbers = [getattr(signal, name) for name in (*ENDING, "SIGALRM")]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_that_was_lost_comes_again(name):
    number, arrived = getattr(signal, name), False
    with pytest.raises(SystemExit) as end, ended_by_signals():
        try:
            os.kill(os.getpid(), number)
        except SystemExit:
            arrived = True  # and is lost
        for _ in range(1000):
            time.sleep(0.01)
    assert arrived and end.value.code == 128 + number


def test_what_deals_with_a_signal_is_not_interrupted():
    done = []
    with pytest.raises(SystemExit) as end, ended_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for _ in range(30):
                time.sleep(0.01)
            try:
                raise OSError("disk full")
            except OSError:
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.2)
                done.append("saved")
    assert end.value.code == 128 + signal.SIGTERM and done == ["saved"]


def test_under_nohup_the_terminal_may_close():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ended_by_signals():
        os.kill(os.getpid(), signal.SIGHUP)
