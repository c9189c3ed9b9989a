"""Which way round a segmentation lies on its CT: measured on the voxels, since headers of published labels mislead.

An organ shows soft tissue under its own mask. Under the mask of a mirrored segmentation there is a mixture of organs,
fat, gas and bone. `rank_flips` measures that for every mirrored version, `choose_flip` decides:

- Front/back and head/foot are measured. The version that the file format leads one to expect is kept if it fits best,
  even by little: a mask near the middle of the scan hardly moves when it is mirrored. Any other version changes data
  against the format and has to fit clearly better than each rival.
- Left/right is never measured. A pancreas that is mirrored from left to right lies across the body's middle again and
  looks nearly as plausible, so such versions are no rivals and are not chosen. Only if one fits clearly better than
  all the others is something wrong that a flip along y or z does not explain, and nothing is chosen.

The thresholds were tried on the one annotated CT at hand (3 mm, no contrast): pancreas 0.94 in soft tissue as it is,
0.79, 0.57 and 0.58 mirrored along z, y and both; spleen 1.00 against 0.76 at most; liver 1.00 against 0.86 at most;
a kidney, which lies as well in the muscles of the other side, 0.99 against 0.96 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

SOFT_TISSUE = (-50, 200)
"""HU of enhanced organs, noise and edges included (pancreas, portal venous: 0.5 to 99.5 percentile -30 to 172)."""
GAS, BONE = -200, 350
"""HU below which there is gas or lung, and above which there is bone or metal."""
ABDOMEN_FLIPS = ((), (1,), (0,), (0, 1), (2,), (1, 2), (0, 2), (0, 1, 2))
"""All mirrored versions, as axes of an array (Z, Y, X)."""

MIN_SHARE, MIN_LEAD = 0.8, 0.02
"""For the expected version. The share leaves room for fat between the lobes and for a loosely drawn outline; the lead
only rules out a tie."""
MIN_CHANGED_SHARE, MIN_CHANGED_LEAD = 0.9, 0.1
"""For any other version: wrong versions of organs reached 0.96, those of a pancreas 0.79 of soft tissue."""

_AXIS_NAMES = ("z", "y", "x")
_LEFT_RIGHT = 2


@dataclass(frozen=True)
class FlipScore:
    """What a CT shows under a mirrored mask.

    Attributes:
        axes: axes of the array (Z, Y, X) along which the mask is mirrored; empty for the mask as stored.
        share: share of the voxels within `SOFT_TISSUE`.
        mean: mean in HU.
        sd: standard deviation in HU.
        gas: share of the voxels below `GAS`.
        bone: share of the voxels above `BONE`.
    """

    axes: tuple[int, ...]
    share: float
    mean: float
    sd: float
    gas: float
    bone: float

    def __str__(self) -> str:
        return f"{flip_name(self.axes)} {self.share:.2f}"


def rank_flips(
    image: np.ndarray, mask: np.ndarray, flips: Sequence[tuple[int, ...]] = ABDOMEN_FLIPS
) -> list[FlipScore]:
    """Measure mirrored versions of a mask.

    Args:
        image: CT (Z, Y, X) in HU.
        mask: true where the organ is, of the same shape.
        flips: axes to mirror the mask along, per version.

    Returns:
        One score per version, the highest share in soft tissue first; of equal ones, the more homogeneous first.

    Raises:
        ValueError: the shapes differ or the mask is empty.
    """
    if image.shape != mask.shape:
        raise ValueError(f"image {image.shape} and mask {mask.shape} differ in shape")
    inside = np.nonzero(mask)
    if not len(inside[0]):
        raise ValueError("the mask is empty")
    scores = [_score(image, inside, flip) for flip in flips]
    return sorted(scores, key=lambda score: (-score.share, score.sd))


def choose_flip(scores: Sequence[FlipScore], expected: tuple[int, ...] | None = ()) -> FlipScore | None:
    """Decide which mirrored version is right.

    Args:
        scores: of the versions, best first.
        expected: the version that the file format leads one to expect; None if nothing is known, so that each version
            has to fit clearly better than the others.

    Returns:
        The right version; None if that is unclear or no version is plausible. Left/right is always as expected.
    """
    mirrored = _LEFT_RIGHT in (expected or ())
    candidates = [score for score in scores if (_LEFT_RIGHT in score.axes) == mirrored]
    others = [score for score in scores if (_LEFT_RIGHT in score.axes) != mirrored]
    if not candidates:
        return None
    best, rivals = candidates[0], candidates[1:]
    is_expected = expected is not None and best.axes == expected
    min_share, min_lead = (MIN_SHARE, MIN_LEAD) if is_expected else (MIN_CHANGED_SHARE, MIN_CHANGED_LEAD)
    is_plausible = best.share >= min_share
    leads = all(best.share - rival.share >= min_lead for rival in rivals)
    is_beaten = any(other.share - best.share >= MIN_CHANGED_LEAD for other in others)
    return best if is_plausible and leads and not is_beaten else None


def flip_name(axes: Sequence[int]) -> str:
    """Return a mirrored version in words, such as `as stored` or `flipped along y and z`."""
    names = sorted(_AXIS_NAMES[axis] for axis in axes)
    return f"flipped along {' and '.join(names)}" if names else "as stored"


def flipped(label: sitk.Image, axes: tuple[int, ...]) -> sitk.Image:
    """Return a segmentation with its voxels mirrored along axes of its array (Z, Y, X); the header stays."""
    if not axes:
        return label
    result = sitk.GetImageFromArray(np.ascontiguousarray(np.flip(sitk.GetArrayViewFromImage(label), axes)))
    result.CopyInformation(label)
    return result


def flip_by_header(label: sitk.Image, image: sitk.Image) -> tuple[int, ...] | None:
    """Return along which axes of the array (Z, Y, X) a label's header says that it is mirrored against an image.

    None if the axes of the two do not run along each other, so that no flip can bring them together.
    """
    directions = [np.reshape(each.GetDirection(), (3, 3)) for each in (image, label)]
    cosines = directions[0].T @ directions[1]
    if not np.allclose(np.abs(cosines), np.eye(3), atol=0.1):
        return None
    return tuple(2 - axis for axis in reversed(range(3)) if cosines[axis, axis] < 0)


def _score(image: np.ndarray, inside: tuple[np.ndarray, ...], flip: tuple[int, ...]) -> FlipScore:
    places = tuple(
        length - 1 - index if axis in flip else index
        for axis, (length, index) in enumerate(zip(image.shape, inside, strict=True))
    )
    values = image[places].astype(np.float64)
    low, high = SOFT_TISSUE
    return FlipScore(
        axes=tuple(sorted(flip)),
        share=float(np.mean((values >= low) & (values <= high))),
        mean=float(values.mean()),
        sd=float(values.std()),
        gas=float(np.mean(values < GAS)),
        bone=float(np.mean(values > BONE)),
    )
