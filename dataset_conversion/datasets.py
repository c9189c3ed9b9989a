"""The datasets that can be converted, by name: the function behind `lgssl_convert_dataset`."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from lgssl_nnunet.errors import UsageError

if TYPE_CHECKING:
    from lgssl_nnunet.dataset_conversion.dataset import ConvertibleDataset

DATASETS = {"LA": "left_atrium", "Pancreas": "pancreas_ct", "BTCV": "btcv", "LiTS": "lits"}


def convert_dataset(
    dataset: str,
    download: Path | str,
    *,
    output: Path | str | None = None,
    dataset_id: int | None = None,
    unlabeled: Path | str | None = None,
    link: bool = False,
    keep_spacing: bool = False,
    num_processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Convert the download of a published dataset into a raw nnU-Net dataset.

    The layout of the download is recognised. Cases that are converted already are not read again, so an interrupted
    conversion continues. A case that cannot be used is named at the end; the others are kept.

    Args:
        dataset: a name of `DATASETS`.
        download: folder of the download.
        output: root of raw datasets; None for nnUNet_raw.
        dataset_id: number of the raw dataset; None for the dataset's own (501 to 504).
        unlabeled: folder with further images, which go into imagesUn.
        link: link files of which no voxel changes, instead of copying them.
        keep_spacing: believe the headers of a layout that is known to have lost its spacing.
        num_processes: worker processes; 0 for none, None for at most 8, one per core.
        progress: show a progress bar.

    Returns:
        The folder of the raw dataset.

    Raises:
        UsageError: the dataset is unknown, a folder does not exist, or the target holds something else.
        DatasetError: the download is not as expected; every problem is listed.
        LGSSLError: there is not enough space on the disk.
    """
    from lgssl_nnunet.dataset_conversion.convert import convert

    return convert(
        find_dataset(dataset),
        download,
        output=output,
        dataset_id=dataset_id,
        unlabeled=unlabeled,
        link=link,
        keep_spacing=keep_spacing,
        num_processes=num_processes,
        progress=progress,
    )


def find_dataset(name: str) -> ConvertibleDataset:
    """Return a dataset by its name.

    Raises:
        UsageError: there is no converter of this name.
    """
    names = {key.lower(): key for key in DATASETS}
    key = names.get(name.lower())
    if key is None:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f" Did you mean {names[near[0]]}?" if near else ""
        raise UsageError(f"There is no converter for {name}; there are {', '.join(DATASETS)}.{hint}")
    return importlib.import_module(f"lgssl_nnunet.dataset_conversion.{DATASETS[key]}").DATASET
