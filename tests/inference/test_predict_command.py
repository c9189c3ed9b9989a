"""lgssl_predict as typed: flags, exit status, messages without tracebacks."""

from __future__ import annotations

import re
import subprocess
import sys

from lgssl_nnunet.cli import predict as command

HERE = ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar"]


def test_the_command_predicts_and_names_the_model_on_screen(trained, images, tmp_path, capsys):
    status = command.main(["-i", str(images), "-o", str(tmp_path / "out"), "--disable_tta", *HERE])
    assert status == 0
    assert (tmp_path / "out" / "b.nii.gz").is_file()
    assert "Model: Dataset501_Tiny nnUNetTrainer" in capsys.readouterr().err


def test_every_flag_reaches_the_function(monkeypatch, tmp_path):
    import torch

    import lgssl_nnunet.inference.predict

    seen = {}
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(
        lgssl_nnunet.inference.predict, "predict", lambda *places, **options: seen.update(options, places=places)
    )
    expected = {
        "places": ("IMAGES", "OUT"),
        "dataset": "501",
        "configuration": "2d",
        "folds": ["0", "all"],
        "plans": "PLANS",
        "trainer": "TRAINER",
        "checkpoint": "checkpoint_best.pth",
        "model_folder": "MODEL",
        "precision": "fp32",
        "step_size": 0.25,
        "disable_tta": True,
        "classes": ["liver", "spleen"],
        "save_probabilities": True,
        "save_selection_maps": True,
        "continue_prediction": True,
        "overwrite": True,
        "num_processes_preprocessing": 4,
        "num_processes_segmentation_export": 5,
        "num_parts": 7,
        "part_id": 6,
        "device": torch.device("cpu"),
        "not_on_device": True,
        "trust_checkpoint": True,
        "prev_stage_predictions": "STAGE",
        "verbose": True,
        "progress": False,
    }
    words = (
        "-i IMAGES -o OUT -d 501 -c 2d -f 0 all -p PLANS -tr TRAINER -chk checkpoint_best.pth -m MODEL "
        "--precision fp32 -step_size 0.25 --disable_tta --save_probabilities --save_selection_maps "
        "--classes liver --classes spleen "
        "--continue_prediction --overwrite -npp 4 -nps 5 -num_parts 7 -part_id 6 -device cpu --not_on_device "
        "--trust_checkpoint -prev_stage_predictions STAGE --verbose --disable_progress_bar"
    )
    assert command.main(words.split()) == 0
    assert seen == expected


def test_a_wrong_call_ends_with_status_2_and_one_message(trained, images, tmp_path, capsys):
    status = command.main(["-i", str(images), "-o", str(tmp_path / "out"), "-d", "77", *HERE])
    error = capsys.readouterr().err
    assert status == 2
    assert "-d 77: no trained model" in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(trained, images, tmp_path, capsys):
    assert command.main(["-i", str(images), "-o", str(tmp_path / "out"), "-d", "77", "--debug", *HERE]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_results_flag_wins_over_the_variable(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nothing here"))
    call = ["-i", str(images / "a_0000.nii.gz"), "-o", str(tmp_path / "out"), "--disable_tta", *HERE]
    assert command.main(call) == 2
    assert command.main([*call, "--results", str(trained)]) == 0


def test_all_flags_of_nnunets_two_commands_are_there_with_their_letters():
    import inspect

    from nnunetv2.inference import predict_from_raw_data as nnunet

    theirs = set()
    for entry in (nnunet.predict_entry_point, nnunet.predict_entry_point_modelfolder):
        theirs |= set(re.findall(r"add_argument\('(--?\w+)'", inspect.getsource(entry)))
    ours = {flag for action in command.build_parser()._actions for flag in action.option_strings}
    assert len(theirs) > 15
    assert theirs - ours == set()


def test_help_needs_no_torch():
    code = (
        "import sys, contextlib; from lgssl_nnunet.cli import predict\n"
        "with contextlib.suppress(SystemExit): predict.main(['--help'])\n"
        "sys.exit('torch' in sys.modules or 'nnunetv2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    assert "examples:" in done.stdout
