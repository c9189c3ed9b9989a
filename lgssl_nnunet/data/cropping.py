"""nnU-Net's crop to the voxels that are not zero, with equal results, without filling holes in the whole image."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

Box = tuple[slice, ...]


def nonzero_box(image: np.ndarray) -> Box:
    """Return the smallest box around the voxels in which a channel is not zero; the whole image if there are none.

    Args:
        image: (C, X, Y, Z).
    """
    box = []
    for axis in range(1, image.ndim):
        others = tuple(other for other in range(image.ndim) if other != axis)
        (used,) = np.nonzero(image.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, image.shape[axis]))
    return tuple(box)


def outside(image: np.ndarray) -> np.ndarray:
    """Return where every channel is zero and that is no hole: zeros connect it with a face of the image.

    Holes stay the same if an image is cropped to its `nonzero_box` first.

    Args:
        image: (C, X, Y, Z).

    Returns:
        (X, Y, Z), bool.
    """
    zero = image[0] == 0
    for channel in image[1:]:
        zero &= channel == 0
    if not zero.any():
        return zero
    regions, number = ndimage.label(zero)
    reached = np.zeros(number + 1, dtype=bool)
    for axis in range(regions.ndim):
        for face in (0, -1):
            reached[regions.take(face, axis=axis)] = True
    reached[0] = False
    return reached[regions]
