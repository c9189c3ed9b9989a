"""lgssl_export_model as typed: flags, exit status, messages without tracebacks."""

from __future__ import annotations

import inspect
import re

import pytest

from lgssl_nnunet.cli import export_model as command
from lgssl_nnunet.cli import predict as predict_command


@pytest.fixture
def exported(monkeypatch, tmp_path) -> list[tuple]:
    """What reaches the function, which does nothing."""
    import lgssl_nnunet.inference.export_model

    calls: list[tuple] = []
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(
        lgssl_nnunet.inference.export_model, "export_model", lambda *places, **options: calls.append((places, options))
    )
    return calls


def test_every_flag_reaches_the_function(exported):
    words = (
        "-o FILE -d 501 -c 2d -f 0 all -p PLANS -tr TRAINER -chk checkpoint_best.pth checkpoint_final.pth -m MODEL "
        "--stock --overwrite --trust_checkpoint"
    )
    assert command.main(words.split()) == 0
    expected = {
        "dataset": "501",
        "configuration": "2d",
        "folds": ["0", "all"],
        "plans": "PLANS",
        "trainer": "TRAINER",
        "checkpoints": ["checkpoint_best.pth", "checkpoint_final.pth"],
        "model_folder": "MODEL",
        "stock": True,
        "overwrite": True,
        "trust_checkpoint": True,
    }
    assert exported == [(("FILE",), expected)]


def test_without_flags_the_final_checkpoint_of_the_chosen_model_becomes_a_bundle(exported):
    assert command.main(["-o", "FILE"]) == 0
    ((_, options),) = exported
    assert options.pop("checkpoints") == ["checkpoint_final.pth"]
    assert not any(options.values())


def test_a_wrong_call_ends_with_status_2_and_one_message(monkeypatch, tmp_path, capsys):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert command.main(["-o", str(tmp_path / "model.zip")]) == 2
    error = capsys.readouterr().err
    assert "There is no trained model in nnUNet_results" in error
    assert "Traceback" not in error


def test_nnunets_flags_are_there_with_their_letters_but_those_that_hand_on_cases():
    from nnunetv2.model_sharing import entry_points

    source = inspect.getsource(entry_points.export_pretrained_model_entry)
    theirs = set(re.findall(r"add_argument\('(--?\w+)'", source))
    ours = {flag for action in command.build_parser()._actions for flag in action.option_strings}
    assert len(theirs) > 6
    assert theirs - ours == {"--exp_cv_preds", "--not_strict"}


def test_a_model_is_named_by_the_same_flags_as_for_prediction():
    flags = [
        {flag for action in module.build_parser()._actions for flag in action.option_strings}
        for module in (command, predict_command)
    ]
    assert {"-d", "-p", "-tr", "-c", "-f", "-m", "-chk", "--trust_checkpoint"} <= flags[0] & flags[1]
