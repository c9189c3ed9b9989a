"""Reading and preprocessing an image to predict, in a process that need not import torch: 1 s of its start, not 5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lgssl_nnunet.data.preprocessing import Recipe, preprocess
from lgssl_nnunet.dataset_conversion.volumes import require_intact
from lgssl_nnunet.errors import DatasetError


def read_preprocessed(files: Sequence[Path], recipe: Recipe) -> tuple[np.ndarray, dict]:
    """Return the preprocessed image (M, X, Y, Z), float32, and the properties that lead back to the file's grid.

    Args:
        files: of one case, one per channel.
        recipe: of the model's configuration.

    Raises:
        DatasetError: a file is damaged, or voxels are NaN or infinite, in a file or after preprocessing.
    """
    for file in files:
        require_intact(file)
    preprocessed = preprocess(files, None, recipe)
    return finite(preprocessed.image, files), preprocessed.properties


def finite(image: np.ndarray, files: Sequence[Path]) -> np.ndarray:
    """Return a preprocessed image as contiguous float32.

    Raises:
        DatasetError: voxels are NaN or infinite.
    """
    if not np.isfinite(image).all():
        raise DatasetError(f"{files[0]}: preprocessing gives NaN or infinite voxels; look for them in the image.")
    return np.ascontiguousarray(image, dtype=np.float32)
