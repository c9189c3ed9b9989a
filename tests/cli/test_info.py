"""lgssl_info: complete, without torch and therefore quick."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lgssl_nnunet import __version__
from lgssl_nnunet.cli import info as command


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    for fold, checkpoint in (("0", "checkpoint_final.pth"), ("1", "checkpoint_latest.pth")):
        folder = tmp_path / "Dataset501_Tiny" / "LGSSLTrainer__LGSSLPlans__3d_fullres" / f"fold_{fold}"
        folder.mkdir(parents=True)
        (folder / checkpoint).touch()
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


def test_the_command_imports_neither_torch_nor_nnunet(results):
    code = (
        "import sys; from lgssl_nnunet.cli import info\n"
        "status = info.main(['--json'])\n"
        "print([name for name in ('torch', 'nnunetv2') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["versions"]["torch"] is not None


def test_json_holds_versions_folders_trainers_models_and_the_plugin(results, capsys):
    assert command.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["lgssl_nnunet"] == __version__
    assert found["folders"]["nnUNet_results"] == {"path": str(results), "source": "environment", "exists": True}
    assert "LGSSLTrainer" in found["trainers"]
    (model,) = found["models"]
    assert (model["folds"], model["finished_folds"]) == (["0", "1"], ["0"])
    assert (Path(found["ext_trainer_path"]) / "__init__.py").is_file()
    assert "device" not in found


def test_an_unset_folder_says_which_one_would_be_used_instead(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'nnUNet_raw'} (from: current directory" in output


def test_the_plugin_folder_alone_can_be_printed_for_the_shell(capsys):
    assert command.main(["--ext_trainer_path"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert Path(line).name == "nnunet_plugin"


def test_text_names_models_with_the_flags_that_choose_them(results, capsys):
    command.main([])
    output = capsys.readouterr().out
    assert (
        "-d Dataset501_Tiny -tr LGSSLTrainer -p LGSSLPlans -c 3d_fullres  (finished folds: 0; unfinished: 1)" in output
    )


def test_banks_are_described_and_a_damaged_one_is_said_to_be(tmp_path, monkeypatch):
    module = importlib.import_module("lgssl_nnunet.installation")
    folder = tmp_path / "text" / "bank"
    folder.mkdir(parents=True)
    np.savez(folder / "good.npz", prompts=np.array(["a", "b"]), embeddings=np.zeros((2, 3)), encoder=np.array("MiniLM"))
    (folder / "torn.npz").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(module, "_package_folder", lambda: tmp_path)
    good, torn = module.info()["banks"]
    assert (good["encoder"], good["prompts"]) == ("MiniLM", 2)
    assert torn["encoder"].startswith("unreadable")


def test_the_device_is_named_only_when_asked_for(capsys):
    assert command.main(["--json", "--device"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]
