"""Signals are obeyed where nothing can be left behind."""

import os
import signal
import time

import pytest

from project.shop.interruption import NUMBERS, Interrupted, heeding_signals, rest


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_next_rest(number):
    with heeding_signals():
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted):
            rest(60)


def test_a_second_signal_interrupts_at_once():
    with heeding_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_without_a_signal_a_rest_is_as_long_as_asked_for():
    began_at = time.monotonic()
    rest(0.12)
    assert time.monotonic() - began_at >= 0.12


def test_afterwards_signals_mean_what_they_meant():
    former = [signal.getsignal(number) for number in NUMBERS]
    with heeding_signals():
        os.kill(os.getpid(), signal.SIGHUP)
    rest(0)
    assert [signal.getsignal(number) for number in NUMBERS] == former
