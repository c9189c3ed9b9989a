"""What asks a run to end, and that nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lgssl_nnunet.engine.interruption import StopRequest

KINDS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of the test run, put back whatever happens."""
    found = {kind: signal.getsignal(kind) for kind in KINDS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which test processes may have switched off
    yield {kind: signal.getsignal(kind) for kind in KINDS}
    for kind, handler in found.items():
        signal.signal(kind, handler)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_signal_is_remembered_by_name(kind, tmp_path, handlers):
    with StopRequest(tmp_path) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), kind)
        assert stop.reason == kind.name
        assert not stop.is_file(stop.reason)
    assert {kind: signal.getsignal(kind) for kind in KINDS} == handlers


def test_the_second_ctrl_c_interrupts_at_once(tmp_path):
    with StopRequest(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_a_cluster_sends_twice_still_lets_the_step_be_finished(tmp_path):
    with StopRequest(tmp_path) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_of_several_processes_none_is_interrupted_by_the_launcher_that_passes_ctrl_c_on(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with StopRequest(tmp_path) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"


def test_handlers_are_given_back_when_the_block_fails(tmp_path, handlers):
    with pytest.raises(ZeroDivisionError), StopRequest(tmp_path):
        raise ZeroDivisionError
    assert {kind: signal.getsignal(kind) for kind in KINDS} == handlers


def test_a_file_named_stop_asks_too(tmp_path):
    stop = StopRequest(tmp_path)
    (tmp_path / "STOP").touch()
    assert stop.reason == f"the file {tmp_path / 'STOP'}"
    assert stop.is_file(stop.reason)


def test_outside_the_main_thread_only_the_file_counts(tmp_path, handlers):
    seen = []

    def run() -> None:
        with StopRequest(tmp_path) as stop:
            (tmp_path / "STOP").touch()
            seen.append((stop.is_file(stop.reason), {kind: signal.getsignal(kind) for kind in KINDS}))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(True, handlers)]
