"""--val and --val_best: which checkpoints must be there."""

from __future__ import annotations

import pytest

from lgssl_nnunet.errors import CheckpointError
from lgssl_nnunet.training import _check_run

VALIDATION = {"continue_training": False, "only_validate": True}


def test_validation_alone_needs_the_final_checkpoint(tmp_path):
    (tmp_path / "checkpoint_latest.pth").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint_final\.pth: train first"):
        _check_run(tmp_path, validate_best=False, **VALIDATION)


def test_validation_of_the_best_checkpoint_needs_it(tmp_path):
    (tmp_path / "checkpoint_final.pth").touch()
    _check_run(tmp_path, validate_best=False, **VALIDATION)
    with pytest.raises(CheckpointError, match=r"no checkpoint_best\.pth: leave out --val_best"):
        _check_run(tmp_path, validate_best=True, **VALIDATION)
    (tmp_path / "checkpoint_best.pth").touch()
    _check_run(tmp_path, validate_best=True, **VALIDATION)
