"""A method is found by its file: nothing else names it."""

from __future__ import annotations

import importlib
import sys

import pytest

import lgssl_nnunet.trainers
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.registry import find_trainer, trainer_modules, trainer_names

METHOD = """
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


class _HiddenTrainer(SemiSupervisedTrainer):
    pass


class NotesOfATraining:
    pass


class FreshTrainer(SemiSupervisedTrainer):
    pass
"""


@pytest.fixture
def new_method(tmp_path, monkeypatch):
    """A file with a method in a second folder of `trainers`."""
    (tmp_path / "fresh_method.py").write_text(METHOD)
    folders = [*lgssl_nnunet.trainers.__path__, str(tmp_path)]
    monkeypatch.setattr(lgssl_nnunet.trainers, "__path__", folders)
    monkeypatch.setattr(lgssl_nnunet.trainers.__spec__, "submodule_search_locations", folders)
    importlib.invalidate_caches()
    yield "lgssl_nnunet.trainers.fresh_method"
    sys.modules.pop("lgssl_nnunet.trainers.fresh_method", None)
    vars(lgssl_nnunet.trainers).pop("fresh_method", None)


def test_a_new_file_is_found_by_the_name_of_its_class(new_method):
    assert trainer_modules()["FreshTrainer"] == new_method
    assert find_trainer("FreshTrainer").__module__ == new_method


def test_private_and_other_classes_of_the_file_are_no_trainers(new_method):
    assert {name for name, module in trainer_modules().items() if module == new_method} == {"FreshTrainer"}


def test_a_new_file_is_listed_for_every_command_without_being_imported(new_method):
    assert "FreshTrainer" in trainer_names()
    assert new_method not in sys.modules
    with pytest.raises(UsageError, match="did you mean FreshTrainer"):
        find_trainer("FrshTrainer")


def test_a_name_in_the_wrong_case_is_recognised():
    with pytest.raises(UsageError, match=r"'uamttrainer': did you mean UAMTTrainer or"):
        find_trainer("uamttrainer")


def test_a_new_file_reaches_nnunets_commands_through_the_plugin(new_method):
    from lgssl_nnunet.nnunet_plugin import lgssl_trainers

    try:
        assert importlib.reload(lgssl_trainers).FreshTrainer is find_trainer("FreshTrainer")
    finally:
        vars(lgssl_trainers).pop("FreshTrainer", None)


def test_without_the_file_there_is_no_such_trainer():
    with pytest.raises(UsageError, match="no trainer called 'FreshTrainer'"):
        find_trainer("FreshTrainer")
