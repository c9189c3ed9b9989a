"""With what a result was made: versions, commit, hardware, and how long its model trained."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from lgssl_nnunet.installation import installed_version
from lgssl_nnunet.paths import VARIABLES

PACKAGES = ("lgssl_nnunet", "nnunetv2", "torch", "batchgeneratorsv2", "numpy", "SimpleITK")


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the versions that decide a result, and the commit of this package if it is a checkout.

    Kept for the life of the process: what is changed on disk later is not what runs.
    """
    found = {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}}
    return found | {"commit": _commit()}


def hardware(device: str) -> dict[str, Any]:
    """Describe this machine without naming it.

    Args:
        device: the torch device in words, see `describe_device`.
    """
    return {"device": device, "processor": _processor(), "cores": os.cpu_count(), "system": platform.system()}


def without_own_folders(text: str) -> str:
    """Replace the paths of nnU-Net's three folders by the names of their variables: results are given to others."""
    folders = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    for name, folder in sorted(folders.items(), key=lambda item: -len(item[1])):
        text = text.replace(folder, f"${name}")
    return text


def training_seconds(checkpoint: Path) -> float | None:
    """Return how long the epochs of a model took, from its own log: interruptions do not count.

    Args:
        checkpoint: file written by nnU-Net or by this package.
    """
    from lgssl_nnunet.engine.checkpoints import read_checkpoint

    log = read_checkpoint(checkpoint).get("logging", {})
    starts, ends = log.get("epoch_start_timestamps", []), log.get("epoch_end_timestamps", [])
    if not starts or len(starts) != len(ends):
        return None
    return round(float(sum(end - start for start, end in zip(starts, ends, strict=True))), 1)


def _commit() -> str | None:
    """Return the checkout's commit, with "+changes" if files differ from it."""
    folder = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, encoding="utf-8", check=True).stdout
            for words in (["ls-files", Path(__file__).name], ["rev-parse", "--short", "HEAD"], ["status", "-suno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    if not run[0].strip():  # installed below somebody else's repository
        return None
    return run[1].strip() + ("+changes" if run[2].strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
