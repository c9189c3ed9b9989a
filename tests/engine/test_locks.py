"""Two commands on one folder: the second is refused in a sentence, and a lock ends with its process."""

from __future__ import annotations

import errno
import os

import pytest
from filelock import FileLock

from lgssl_nnunet import locks
from lgssl_nnunet.cli.common import run_command
from lgssl_nnunet.locks import FolderBusyError, hold_lock, lock_beside


def test_a_lock_held_by_another_process_refuses_and_ends_with_it(tmp_path, held_elsewhere):
    folder = tmp_path / "Dataset501_Liver"
    file = lock_beside(folder, "planning")
    assert file.parent == tmp_path
    assert file.name.startswith(".")
    with (
        held_elsewhere(file),
        pytest.raises(FolderBusyError, match=r"Dataset501_Liver: another process .*; wait until"),
    ):
        hold_lock(file, folder).__enter__()
    with hold_lock(file, folder):  # that process was killed and its lock file is still there
        assert file.exists()


def test_who_holds_a_lock_can_take_it_again_and_nobody_else(tmp_path):
    file = tmp_path / ".x.lock"
    with hold_lock(file, tmp_path, wait=True), hold_lock(file, tmp_path):
        pass
    FileLock(file).acquire(blocking=False)


def test_a_file_system_without_locks_is_told_and_worked_on(tmp_path, monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    done = []
    with hold_lock(tmp_path / ".x.lock", tmp_path):
        done.append(True)
    assert done
    assert "the file system has no locks" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path, capsys):
    tmp_path.chmod(0o555)
    try:
        assert run_command(lambda: hold_lock(tmp_path / ".x.lock", tmp_path).__enter__(), use_folders=False) == 1
    finally:
        tmp_path.chmod(0o755)
    assert "Permission denied; give a folder that you may write to" in capsys.readouterr().err
