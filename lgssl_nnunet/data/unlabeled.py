"""Preprocessed cases without a segmentation, in the form that nnU-Net's own loader reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2


class UnlabeledDataset(nnUNetDatasetBlosc2):
    """Images of `<data_identifier>_unlabeled/`; the segmentation handed out is a constant that occupies no memory.

    There is no segmentation file in that folder, and nothing here would open one.

    Args:
        folder: `<data_identifier>_unlabeled/`.
        identifiers: the cases; None for all of the folder.
        labeled_folder: `<data_identifier>/`.
        labeled: cases there whose images are handed out as well.
    """

    def __init__(
        self,
        folder: str,
        identifiers: list[str] | None = None,
        labeled_folder: Path | None = None,
        labeled: Sequence[str] = (),
    ) -> None:
        found = self.get_identifiers(folder) if identifiers is None else identifiers
        super().__init__(folder, [*found, *labeled])
        self._folders = dict.fromkeys(labeled, labeled_folder)

    def load_case(self, identifier: str) -> tuple[Any, np.ndarray, None, dict]:
        """Return image (M, X, Y, Z) as a lazily read array, a constant -1 map (1, X, Y, Z), None and the properties."""
        folder = self._folders.get(identifier, Path(self.source_folder))
        image = self.opened(folder / f"{identifier}.b2nd")
        segmentation = np.broadcast_to(np.int8(-1), (1, *image.shape[1:]))
        properties = load_pickle(str(folder / f"{identifier}.pkl"))
        return image, segmentation, None, {**properties, "class_locations": None}

    def opened(self, file: Path) -> Any:
        """Return a stored array that is read lazily, in the way of nnU-Net's datasets."""
        return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, **self.mmap_kwargs)

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Return the case identifiers of a folder in alphabetical order."""
        return sorted(file.name.removesuffix(".b2nd") for file in Path(folder).glob("*.b2nd"))


class PseudoLabeledDataset(UnlabeledDataset):
    """The same images with label maps from another folder, and where in them the classes are.

    Args:
        folder: `<data_identifier>_unlabeled/`.
        identifiers: the cases.
        labels: holds `<case>.b2nd`, a label map (1, X, Y, Z), and `<case>.pkl` with `class_locations`.
    """

    def __init__(self, folder: str, identifiers: list[str], labels: Path) -> None:
        super().__init__(folder, identifiers)
        self.labels = labels

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """Return image (M, X, Y, Z) and label map (1, X, Y, Z) as lazily read arrays, None and the properties."""
        image, _, _, properties = super().load_case(identifier)
        labels = self.opened(self.labels / f"{identifier}.b2nd")
        return image, labels, None, {**properties, **load_pickle(str(self.labels / f"{identifier}.pkl"))}


def mark_outside(label: np.ndarray, masked_channels: np.ndarray) -> None:
    """Set background outside the body to -1 as nnU-Net does: its augmentation keeps masked channels at 0 there.

    Args:
        label: (X, Y, Z), changed.
        masked_channels: the channels (N, X, Y, Z) that are normalised inside the body only and 0 outside, as those of
            unlabelled cases are; of a resampled labelled case only part of the outside is 0.
    """
    if len(masked_channels):
        label[(masked_channels == 0).all(axis=0) & (label == 0)] = -1


class UnlabeledLoader(nnUNetDataLoader):
    """nnU-Net's loader for cases without annotation: uniformly random crops, unless pseudo-labels show foreground."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With an ignore label nnU-Net looks for annotated voxels in every case; here none is, or every voxel is.
        self.has_ignore = False
