"""What every command shares: exit status, messages, folder flags, the device."""

from __future__ import annotations

import argparse
import errno
import logging
import os

import pytest
import torch

from lgssl_nnunet.cli import common
from lgssl_nnunet.errors import TrainingError, UsageError


@pytest.fixture(autouse=True)
def _quiet_again():
    package = logging.getLogger("lgssl_nnunet")
    handlers, level = list(package.handlers), package.level
    yield
    package.handlers[:], package.level = handlers, level


def raising(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status"), [(UsageError("wrong word"), 2), (TrainingError("loss is NaN"), 1), (KeyboardInterrupt(), 130)]
)
def test_errors_for_users_become_a_message_and_an_exit_status(error, status, capsys):
    assert common.run_command(raising(error), use_folders=False) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert str(error) in output.err
    assert "Traceback" not in output.err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        common.run_command(lambda: 1 // 0, use_folders=False)


def test_a_function_may_return_its_own_exit_status():
    assert common.run_command(lambda: None, use_folders=False) == 0
    assert common.run_command(lambda: 3, use_folders=False) == 3


def test_messages_go_to_stderr_once_and_warnings_say_so(capsys):
    def function():
        logging.getLogger("lgssl_nnunet.anything").info("hello")
        logging.getLogger("lgssl_nnunet.anything").warning("careful")

    common.run_command(function, use_folders=False)
    capsys.readouterr()
    common.run_command(function, use_folders=False)
    assert capsys.readouterr().err.splitlines() == ["hello", "WARNING: careful"]


def test_folder_flags_win_over_variables_and_unset_ones_are_said(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_raw", "elsewhere")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "r"))
    monkeypatch.setenv("nnUNet_preprocessed", "")
    parser = argparse.ArgumentParser()
    common.add_common_arguments(parser)
    arguments = parser.parse_args(["--raw", "mine"])
    assert common.run_command(lambda: None, arguments) == 0
    assert os.environ["nnUNet_raw"] == str(tmp_path / "mine")
    assert os.environ["nnUNet_results"] == str(tmp_path / "r")
    error = capsys.readouterr().err
    assert f"nnUNet_preprocessed is not set: using {tmp_path / 'nnUNet_preprocessed'}" in error
    assert "nnUNet_results" not in error


def test_the_device_is_chosen_and_said(caplog):
    with caplog.at_level("INFO"):
        device = common.choose_device(None)
    assert device.type in ("cpu", "cuda", "mps")
    assert "chosen automatically" in caplog.text
    assert common.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=f"-device {name}"):
        common.choose_device(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "error: /data/x: Permission denied; give"),
        (OSError(errno.EROFS, "Read-only file system", "/cd/x"), "error: /cd/x: Read-only file system; give a folder"),
    ],
)
def test_what_the_system_refuses_is_a_sentence_and_status_1(error, message, capsys):
    def fail():
        raise error

    assert common.run_command(fail, use_folders=False) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_other_system_errors_are_bugs():
    def fail():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        common.run_command(fail, use_folders=False)
