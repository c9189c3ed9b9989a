from __future__ import annotations

import subprocess
import sys

import pytest

from lgssl_nnunet.cli.plan_and_preprocess import build_parser, main

QUICK = ["-pl", "LGSSLPlannerCPU", "-npfp", "0", "-np", "0", "--no_pbar", "-c", "3d_fullres"]


def test_the_command_prints_the_plans_file(raw_dataset, capsys):
    raw_dataset(labeled=3)
    assert main(["-d", "901", "--labeled", "2", "--no_pp", *QUICK]) == 0
    assert capsys.readouterr().out.strip().endswith("LGSSLCPUPlans_labeled2.json")


def test_an_error_is_one_sentence_and_exit_status_2(raw_dataset, capsys):
    raw_dataset(labeled=3)
    assert main(["-d", "901", "--labeled", "9", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "only 3 labelled cases" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-fpe", "Mine"], "-fpe is not supported"),
        (["--no_verify", "--verify_dataset_integrity"], "exclude each other"),
        (["-pl", "LGSSLPlaner"], "did you mean LGSSLPlanner"),
    ],
)
def test_flags_that_do_not_fit_are_refused(raw_dataset, capsys, flags, message):
    raw_dataset(labeled=3)
    assert main(["-d", "901", *QUICK, *flags]) == 2
    assert message in capsys.readouterr().err


def test_every_flag_of_nnunets_command_is_there():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert flags >= {
        "-d", "-fpe", "-npfp", "--verify_dataset_integrity", "--no_pp", "--clean", "-pl", "-gpu_memory_target",
        "-preprocessor_name", "-overwrite_target_spacing", "-overwrite_plans_name", "-c", "-np", "--verbose",
        "--no_pbar",
    }  # fmt: skip


def test_every_flag_is_explained_with_its_default():
    for action in build_parser()._actions:
        if action.option_strings and action.dest not in ("help", "debug", "raw", "preprocessed", "results"):
            assert action.required or "default" in (action.help or ""), action.option_strings


def test_help_needs_neither_torch_nor_nnunet():
    code = (
        "import sys; from lgssl_nnunet.cli.plan_and_preprocess import build_parser; build_parser().format_help(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'nnunetv2', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
