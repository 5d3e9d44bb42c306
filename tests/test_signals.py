"""Which signals a run notes instead of ending."""

import os
import signal

import pytest

from megarec.signals import Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # background jobs and nohup ignore it
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert (interruption.signum, interruption.name) == (number, number.name)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)
