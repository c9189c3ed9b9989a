"""Where the voxels of an image lie, and whether two images lie in the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

SPACING_TOLERANCE = 1e-3
"""Relative; headers round to a few digits."""
ORIGIN_TOLERANCE = 0.1
"""In voxels: less cannot move a label by a voxel."""
DIRECTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Geometry:
    """A grid of voxels in the world.

    Attributes:
        size: number of voxels along the axes.
        spacing: in mm along the axes.
        origin: position of the first voxel in mm; None where the format does not say.
        direction: direction cosines, row by row; None where the format does not say.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] | None = None
    direction: tuple[float, ...] | None = None

    @classmethod
    def of(cls, image: sitk.Image) -> Geometry:
        """Return the geometry of an image."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @property
    def is_default(self) -> bool:
        """Whether the header says nothing: spacing 1, axes of the array."""
        identity = np.eye(len(self.size)).ravel()
        return np.allclose(self.spacing, 1) and (self.direction is None or np.allclose(self.direction, identity))

    @property
    def fault(self) -> str | None:
        """What no grid can have, in words: a spacing that is no length, a position that is no number; None if none."""
        if not all(0 < length < np.inf for length in self.spacing):
            return f"has spacing {rounded(self.spacing)} mm"
        for name in ("origin", "direction"):
            numbers = getattr(self, name)
            if numbers is not None and not np.isfinite(numbers).all():
                return f"has {name} {rounded(numbers)}"
        return None

    def matches(self, other: Geometry) -> bool:
        """Whether both are the same grid within rounding."""
        return not self.differences(other, "")

    def differences(self, other: Geometry, whose: str) -> list[str]:
        """Return the differences beyond rounding, as `has spacing [2.0] mm and WHOSE has [1.0] mm`.

        Args:
            other: the geometry to compare with.
            whose: its file, for the message.
        """
        if self.size != other.size:
            return [f"has shape {list(self.size)} and {whose} has {list(other.size)}"]
        if not np.allclose(self.spacing, other.spacing, rtol=SPACING_TOLERANCE, atol=0):
            return [f"has spacing {rounded(self.spacing)} mm and {whose} has {rounded(other.spacing)} mm"]
        tolerances = {"origin": ORIGIN_TOLERANCE * min(other.spacing), "direction": DIRECTION_TOLERANCE}
        found = []
        for name, tolerance in tolerances.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and not np.allclose(mine, theirs, rtol=0, atol=tolerance):
                found.append(f"has {name} {rounded(mine)} and {whose} has {rounded(theirs)}")
        return found


def snap(label: sitk.Image, image: sitk.Image) -> sitk.Image:
    """Return the label with exactly the geometry of the image; sizes must be equal, voxels stay."""
    snapped = sitk.Image(label)
    snapped.CopyInformation(image)
    return snapped


def rounded(numbers: Sequence[float]) -> list[float]:
    """Return numbers for a message."""
    return [round(float(number), 4) for number in numbers]


def are_spatial_axes(value: Any) -> bool:
    """Whether a value read from a file lists axes of a volume, by their numbers and each once (true is no number)."""
    return (
        isinstance(value, (list, tuple))
        and all(isinstance(axis, int) and not isinstance(axis, bool) and 0 <= axis < 3 for axis in value)
        and len(set(value)) == len(value)
    )
