"""Signals that ask a run to stop."""

import multiprocessing
import os
import signal
import sys

import pytest

from minigpt4.runners.signals import StopRequest


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.should_stop()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_with_its_number(monkeypatch):
    seconds = [0.0]
    with StopRequest() as stop:
        monkeypatch.setattr("time.monotonic", lambda: seconds[0])
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's repetition
        assert stop.should_stop()
        seconds[0] = 10.0
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_signal_while_a_worker_starts_is_not_lost_in_the_fork(monkeypatch):
    signals, ignored = [signal.SIGTERM], []
    os.register_at_fork(after_in_parent=lambda: signals and signal.raise_signal(signals.pop()))  # as logging's hooks
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)

    def source():
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join()
        yield "a batch"

    with StopRequest() as stop:
        assert stop.next_batch(source()) == "a batch" and not signals and not ignored
        assert stop.should_stop()
