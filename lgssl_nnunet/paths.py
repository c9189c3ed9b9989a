"""Where raw data, preprocessed data and results lie: nnU-Net's three variables, with a stated fallback."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

FINAL_CHECKPOINT, LATEST_CHECKPOINT, BEST_CHECKPOINT = (
    f"checkpoint_{which}.pth" for which in ("final", "latest", "best")
)
CHECKPOINTS = (FINAL_CHECKPOINT, LATEST_CHECKPOINT, BEST_CHECKPOINT)
"""nnU-Net's names for the checkpoints in a fold folder."""


_PLAIN_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]+")
"""Without control characters, and without surrogates but for those by which Python names files in another coding."""
_DATASET_NAME = re.compile(r"Dataset(\d{3,})_.+")


def dataset_number(name: str) -> int | None:
    """Return 7 for Dataset007_Name, None for a name of another form."""
    match = _DATASET_NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_dataset(name: str, wanted: int | str) -> bool:
    """Whether a folder's name is the wanted one; Dataset007_Name is also dataset 7, 07 and 007."""
    return name == str(wanted) or (str(wanted).isdecimal() and dataset_number(name) == int(wanted))


def is_plain_name(name: Any, longest: int = 255) -> bool:
    """Whether a value can name a file or folder in the folder where it is looked for, and nothing elsewhere.

    Args:
        name: the value.
        longest: number of characters that it may have.
    """
    return (
        isinstance(name, str)
        and len(name) <= longest
        and _PLAIN_NAME.fullmatch(name) is not None
        and name.strip(" .") != ""
    )


@dataclass(frozen=True)
class DataFolder:
    """One of nnU-Net's three folders and where its path was taken from."""

    variable: str
    path: Path
    source: str


def data_folders() -> dict[str, DataFolder]:
    """Return the three folders by variable name, without changing anything."""
    folders = {}
    for variable in VARIABLES:
        value = os.environ.get(variable)
        if value:
            folders[variable] = DataFolder(variable, Path(value), "environment")
        else:
            folders[variable] = DataFolder(variable, Path.cwd() / variable, "current directory (variable not set)")
    return folders


def use_data_folders() -> dict[str, DataFolder]:
    """Set every unset variable to a folder under the current directory and say so.

    Returns:
        The three folders by variable name.
    """
    folders = data_folders()
    for variable, folder in folders.items():
        if not os.environ.get(variable):
            os.environ[variable] = str(folder.path)
            logger.warning("%s is not set: using %s", variable, folder.path)
    return folders
