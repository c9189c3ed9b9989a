"""Tests leave nothing behind for each other and need no network."""

from __future__ import annotations

import os
import socket

import pytest


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.mark.parametrize("time", ["first", "second"])
def test_environment_variables_are_those_of_the_session_in_every_test(time, before):
    assert {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} == before
    os.environ["LGSSL_LEFT_BEHIND"] = time
    os.environ.pop("nnUNet_n_proc_DA")
    os.environ["HOME"] = "elsewhere"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("function", ["connect", "connect_ex"])
def test_a_connection_to_another_machine_is_refused(function, family):
    with socket.socket(family) as connection, pytest.raises(RuntimeError, match="tests need no network"):
        getattr(connection, function)(("localhost", 9))


def test_processes_of_this_machine_may_talk_to_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen(1)
        client.connect("socket")
