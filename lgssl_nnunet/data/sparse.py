"""Cases of which two orthogonal slices are labelled: what is stored of each, and how nnU-Net's loader reads it.

Beside the folder of the labelled cases lies `<data_identifier>_orthogonal/` with a file per case: an int16 array
(4, X, Y, Z), and in its metadata how it came about and where the classes lie on the two slices. Channels 0 and 1 are
label maps, each propagated from one slice and overwritten with the true label on the other; channels 2 and 3 are one
plus the number of slices between a voxel and the slice that its label comes from. Padding becomes 0 there, so it cannot
be taken for a true label.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from lgssl_nnunet.data.unlabeled import UnlabeledDataset
from lgssl_nnunet.files import write_atomically

_ORIGIN, _LOCATIONS = "origin", "class_locations"


def annotation_file(labeled_folder: Path | str, identifier: str) -> Path:
    """Return the file of a case; `labeled_folder` holds the preprocessed labelled cases."""
    return Path(f"{labeled_folder}_orthogonal") / f"{identifier}.b2nd"


def write_annotation(
    file: Path, annotation: np.ndarray, origin: str, locations: Mapping[int, np.ndarray], patch_size: tuple[int, ...]
) -> None:
    """Write a case's annotation, whole or not at all.

    Args:
        file: from `annotation_file`.
        annotation: (4, X, Y, Z), int16.
        origin: hash of everything that the annotation depends on.
        locations: indices (N, 4) of voxels by class, as nnU-Net keeps them.
        patch_size: for which the file is laid out.
    """
    blocks, chunks = comp_blosc2_params(annotation.shape, patch_size, annotation.itemsize)

    def write(temporary: Path) -> None:
        stored = blosc2.asarray(
            np.ascontiguousarray(annotation),
            urlpath=str(temporary),
            mode="w",
            chunks=chunks,
            blocks=blocks,
            cparams={"nthreads": 1},
        )
        stored.schunk.vlmeta[_ORIGIN] = origin
        stored.schunk.vlmeta[_LOCATIONS] = [
            [int(label), np.ascontiguousarray(where, np.int32).tobytes()] for label, where in sorted(locations.items())
        ]

    write_atomically(file, write)


def stored_origin(file: Path) -> str | None:
    """Return the hash with which a file was written; None if there is no whole file."""
    try:
        stored = blosc2.open(urlpath=str(file), mode="r")
        return stored.schunk.vlmeta[_ORIGIN]
    except (OSError, RuntimeError, KeyError):
        return None


def stored_locations(file: Path) -> dict[int, np.ndarray]:
    """Return indices (N, 4) of voxels of every foreground class on the two slices of a case."""
    stored = blosc2.open(urlpath=str(file), mode="r")
    locations = stored.schunk.vlmeta[_LOCATIONS]
    return {label: np.frombuffer(where, np.int32).reshape(-1, 4) for label, where in locations}


class OrthogonalDataset(UnlabeledDataset):
    """Images of the labelled cases with the annotation in place of their segmentation, which nothing here opens.

    Args:
        folder: of the preprocessed labelled cases.
        identifiers: of the cases.
    """

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict]:
        """Return image (M, X, Y, Z), annotation (4, X, Y, Z), both read lazily, None and the properties."""
        image, _, _, properties = super().load_case(identifier)
        file = annotation_file(self.source_folder, identifier)
        return image, self.opened(file), None, {**properties, "class_locations": stored_locations(file)}


def follow_nearest(pipeline: ComposeTransforms) -> ComposeTransforms:
    """Let the geometric steps take every channel of the segmentation from the nearest voxel.

    nnU-Net interpolates each label of a channel and takes the largest, channel by channel: a voxel could get its label
    from one place and its distance from another, and a channel of distances has a hundred labels.
    """
    for transform in pipeline.transforms:
        if isinstance(transform, SpatialTransform):
            transform.mode_seg = "nearest"
    return pipeline
