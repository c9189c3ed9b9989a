"""What is installed here and what it finds: the function behind `lgssl_info`. Imports neither torch nor nnU-Net."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from lgssl_nnunet.inference.models import TrainedModel, find_models
from lgssl_nnunet.paths import data_folders
from lgssl_nnunet.registry import trainer_names

PACKAGES = (
    "lgssl_nnunet",
    "nnunetv2",
    "torch",
    "batchgeneratorsv2",
    "dynamic_network_architectures",
    "open_clip_torch",
    "numpy",
    "SimpleITK",
)


def info(device: bool = False) -> dict[str, Any]:
    """Describe the installation: versions, folders, trainers, models, prompts.

    Args:
        device: also name the device that would be used; this alone imports torch (a few seconds).

    Returns:
        `python` and `versions`; `folders` (path, source and existence of nnU-Net's three folders); `trainers`;
        `models` (one entry per model folder in nnUNet_results); `banks` (file, encoder, number of prompts);
        `ext_trainer_path` (the folder for nnU-Net's variable nnUNet_extTrainer); `device` only if asked for.
    """
    folders = data_folders()
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: installed_version(name) for name in PACKAGES},
        "folders": {
            name: {"path": str(folder.path), "source": folder.source, "exists": folder.path.is_dir()}
            for name, folder in folders.items()
        },
        "trainers": trainer_names(),
        "models": [_model(model) for model in find_models(folders["nnUNet_results"].path)],
        "banks": [_bank(file) for file in sorted((_package_folder() / "text" / "bank").glob("*.npz"))],
        "ext_trainer_path": str(ext_trainer_path()),
    }
    if device:
        found["device"] = _device()
    return found


def ext_trainer_path() -> Path:
    """Return the folder that makes stock `nnUNetv2_*` commands find our trainers, for nnUNet_extTrainer."""
    return _package_folder() / "nnunet_plugin"


def format_info(found: dict[str, Any]) -> str:
    """Return what `info` found as lines of text."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in found["versions"].items())
    lines = [f"Python      {found['python']} on {found['platform']}", f"Versions    {versions}"]
    if "device" in found:
        lines.append(f"Device      {found['device']}")
    lines += ["", "Folders"]
    for name, folder in found["folders"].items():
        missing = "" if folder["exists"] else ", does not exist yet"
        lines.append(f"  {name:<20}{folder['path']} (from: {folder['source']}{missing})")
    lines += ["", f"Trainers    {', '.join(found['trainers']) or 'none'}", "", "Trained models"]
    lines += [f"  {_model_line(model)}" for model in found["models"]] or ["  none"]
    lines += ["", "Prompt banks"]
    lines += [f"  {bank['file']}: {bank['prompts']} prompts by {bank['encoder']}" for bank in found["banks"]] or [
        "  none"
    ]
    lines += ["", f"For nnU-Net's own commands: nnUNet_extTrainer={found['ext_trainer_path']}"]
    return "\n".join(lines)


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package_folder() -> Path:
    return Path(find_spec("lgssl_nnunet").origin).parent


def _model(model: TrainedModel) -> dict[str, Any]:
    return {
        "dataset": model.dataset,
        "trainer": model.trainer,
        "plans": model.plans,
        "configuration": model.configuration,
        "folder": str(model.folder),
        "folds": list(model.folds),
        "finished_folds": list(model.finished_folds),
    }


def _model_line(model: dict[str, Any]) -> str:
    finished = " ".join(model["finished_folds"]) or "none"
    unfinished = " ".join(fold for fold in model["folds"] if fold not in model["finished_folds"])
    state = f"finished folds: {finished}" + (f"; unfinished: {unfinished}" if unfinished else "")
    return f"-d {model['dataset']} -tr {model['trainer']} -p {model['plans']} -c {model['configuration']}  ({state})"


def _bank(file: Path) -> dict[str, Any]:
    """Describe a bank; its vectors stay unread."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as bank:
            return {"file": str(file), "encoder": str(bank["encoder"]), "prompts": len(bank["prompts"])}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        return {"file": str(file), "encoder": f"unreadable ({error})", "prompts": 0}


def _device() -> str:
    from lgssl_nnunet.inference.device import choose_device, describe_device

    return describe_device(choose_device(None))
