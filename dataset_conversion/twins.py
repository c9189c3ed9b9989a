"""Twins: two cases of one dataset whose images or labels are equal or nearly equal, mostly one scan under two names.

A twin in training tells the network what its other half in the test or validation set looks like, so the two may never
be on both sides of a split. Cases are compared by a print of a few kilobytes each, so that no two images are ever in
memory together. What is found:

- *equal images*: the same voxels, whatever the file format, the data type and the spacing;
- *equal labels*: the same foreground. Where it lies in the image does not matter, so that two copies which were cropped
  differently are found by their labels; only a foreground that is its own mirror image, such as a box or a ball around
  a landmark, has to lie in the same place of an equally large image, because such shapes are drawn many times alike;
- *nearly equal images*: images of one shape whose voxels correlate with `MIN_CORRELATION` or more, such as a copy with
  other intensities, with noise, or saved with loss.

Not found: two images without equal labels of which one is shifted, flipped, resampled or cropped. Not counted, since
they are equal for trivial reasons: constant images, and labels of fewer than `MIN_FOREGROUND` voxels.

How `MIN_CORRELATION` was chosen: the highest correlation between different people, and the lowest between a case and
its copy with other intensities (1.3 x + 20) and either noise (in standard deviations of the image, white or blurred
with a sigma of 4 voxels), a power of 1.2, or 8 bits. Images were cropped around their centres to one shape, since
hardly two have the same (of 7 pairs in the Hippocampus dataset that do, the highest is 0.64). "Masked" are the same
under one ellipsoid with a contrast of 0.3 over the zeros outside: skull-stripped brains in a common space.

    dataset                           strangers   noise 0.12   blurred 0.12   noise 0.25   power   8 bits
    left atrium, 30 cases                 0.613        0.992          0.992        0.967   0.997    0.999
    Hippocampus, 140 cases                0.798        0.992          0.992        0.968   0.998    0.998
    left atrium, masked                   0.685        0.953          0.958        0.838   0.999    0.999
    Hippocampus, masked                   0.838        0.978          0.981        0.917   0.999    0.999

The twins of the left atrium challenge (0RZDK210BSMWAA6467LU, CMPXO4J23G58J53Q98SZ) are said to correlate with 0.993.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lgssl_nnunet.errors import SplitError

logger = logging.getLogger(__name__)

MIN_CORRELATION = 0.95
"""Of nearly equal images."""
MIN_FOREGROUND = 100
"""Voxels that a label must have for its equality to another one to mean anything."""
SAMPLE_SIZE = 2048
"""Voxels of an image that its print keeps."""
MAX_LISTED = 50

_MIN_COMMON = 64
"""Voxels outside the background that two samples must share to be compared."""
_BACKGROUND_SHARE = 0.1
"""A value that so large a part of the voxels has is background."""
_MIN_VARIANCE = 1e-4
"""Of the voxels outside the background, in units of the variance of all: less is a binary image or rounding."""
_PRESELECTION = 0.9
"""Correlation with the background included, which is cheaper to compute; twins are far above."""
_CHUNK = 1024


@dataclass(frozen=True)
class ImagePrint:
    """What is kept of a case to find its twins.

    Attributes:
        image: hash of voxels and shape; None for a constant image.
        label: hash of the foreground; None without a label or where its foreground means nothing.
        shape: shape of the image without channels.
        spacing: spacing of the voxels, in the order of the axes.
        sample: standardised intensities of `SAMPLE_SIZE` voxels at places that depend on the shape alone, the mean
            over channels; empty for a constant image.
    """

    image: str | None
    label: str | None
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    sample: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return the print as JSON content."""
        return {
            "image": self.image,
            "label": self.label,
            "shape": list(self.shape),
            "spacing": list(self.spacing),
            "sample": base64.b64encode(self.sample.astype("<f2").tobytes()).decode("ascii"),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ImagePrint:
        """Return the print that `to_json` wrote."""
        return cls(
            image=content["image"],
            label=content["label"],
            shape=tuple(content["shape"]),
            spacing=tuple(content["spacing"]),
            sample=np.frombuffer(base64.b64decode(content["sample"]), dtype="<f2"),
        )


@dataclass(frozen=True, order=True)
class Twins:
    """Two cases that are one.

    Attributes:
        first: one of them, the smaller name.
        second: the other one.
        reason: what they share.
    """

    first: str
    second: str
    reason: str

    def __str__(self) -> str:
        return f"{self.first} and {self.second} ({self.reason})"


def print_of(image: np.ndarray, spacing: Sequence[float], label: np.ndarray | None = None) -> ImagePrint:
    """Return the print of a case.

    Args:
        image: voxels (C, X, Y, Z), (X, Y, Z) or (X, Y), of any data type.
        spacing: spacing of the axes after the channels.
        label: segmentation on the same grid, with or without a leading axis of one channel; None if there is none.
    """
    channels = image if image.ndim == 4 else image[np.newaxis]
    shape = channels.shape[1:]
    sample = _sample(channels)
    return ImagePrint(
        image=_image_hash(channels) if sample.size or _varies(channels) else None,
        label=None if label is None else _foreground_hash(label.reshape(shape)),
        shape=shape,
        spacing=tuple(float(length) for length in spacing),
        sample=sample,
    )


def find_twins(prints: Mapping[str, ImagePrint]) -> list[Twins]:
    """Return all pairs of equal or nearly equal cases, sorted by name; each pair once, with its strongest reason."""
    found: dict[tuple[str, str], str] = {}
    for first, second in _equal(prints, "image"):
        same_spacing = np.allclose(prints[first].spacing, prints[second].spacing, rtol=1e-3)
        found[first, second] = "equal images" if same_spacing else "equal images with different spacing"
    for pair in _equal(prints, "label"):
        found.setdefault(pair, "equal labels")
    for *pair, correlation in _nearly_equal(prints):
        found.setdefault(tuple(pair), f"nearly equal images, correlation {correlation:.3f}")
    return sorted(Twins(*pair, reason) for pair, reason in found.items())


def report(twins: Collection[Twins]) -> list[str]:
    """Return one sentence per pair for the log, at most `MAX_LISTED`, and one that counts the rest."""
    sentences = [f"{pair} are probably the same scan." for pair in itertools.islice(twins, MAX_LISTED)]
    left = len(twins) - MAX_LISTED
    return [*sentences, f"There are {left} more pairs of twins."] if left > 0 else sentences


def without_twins(training: Sequence[str], validation: Iterable[str], twins: Iterable[Sequence[str]]) -> list[str]:
    """Return the training cases that have no twin among the validation cases, and log those that are left out.

    Args:
        training: cases to train on.
        validation: cases to validate on.
        twins: pairs of cases.

    Raises:
        SplitError: no training case would be left.
    """
    validated = set(validation)
    both_ways = [pair for first, second in twins for pair in ((first, second), (second, first))]
    partners = {case: partner for case, partner in both_ways if partner in validated}
    kept = [case for case in training if case not in partners]
    for case in sorted(set(training) - set(kept)):
        logger.info("%s is not trained on: its twin %s is in the validation part of this fold.", case, partners[case])
    if training and not kept:
        raise SplitError(
            "Every training case of this fold has a twin among its validation cases; remove the copies from the "
            "dataset and plan again, or train with -f all."
        )
    return kept


def _image_hash(channels: np.ndarray) -> str:
    return _hash(np.add(channels, 0, dtype=np.float32))  # 0 is added because -0.0 is equal to 0.0 and has other bytes


def _hash(array: np.ndarray) -> str:
    """Return a hash of shape and values of an array."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _varies(array: np.ndarray) -> bool:
    return bool(array.size) and bool((array != array.flat[0]).any())


def _foreground_hash(label: np.ndarray) -> str | None:
    """Return a hash of the box around the foreground, None for a foreground that is too small to mean anything."""
    foreground = label != 0
    if np.count_nonzero(foreground) < MIN_FOREGROUND:
        return None
    box = _box(foreground)
    cropped = label[box]
    small = cropped.min() >= 0 and cropped.max() < 256
    hashed = _hash(cropped.astype(np.uint8 if small else np.int32))
    return hashed + _place(label, box) if _mirrored(cropped) else hashed


def _box(foreground: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(foreground.ndim):
        others = tuple(other for other in range(foreground.ndim) if other != axis)
        (present,) = np.nonzero(foreground.any(axis=others))
        box.append(slice(int(present[0]), int(present[-1]) + 1))
    return tuple(box)


def _mirrored(array: np.ndarray) -> bool:
    """Whether an array is its own mirror image along an axis; nothing drawn by hand is."""
    return any(np.array_equal(array, np.flip(array, axis)) for axis in range(array.ndim) if array.shape[axis] > 1)


def _place(label: np.ndarray, box: Sequence[slice]) -> str:
    return f" at {[side.start for side in box]} in {list(label.shape)}"


def _sample(channels: np.ndarray) -> np.ndarray:
    """Return the standardised intensities at the places of `_places`, empty if they are all the same."""
    values = channels[(slice(None), *_places(channels.shape[1:]))].astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    mean = _standardised(np.mean([_standardised(channel) for channel in values], axis=0))
    return mean.astype(np.float16) if mean.any() else np.zeros(0, np.float16)


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    deviation = centred.std()
    # A constant channel leaves rounding errors of its mean, which must not be blown up to a pattern.
    return centred / deviation if deviation > 1e-6 * np.abs(values).max(initial=0) else np.zeros_like(values)


def _places(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return indices of `SAMPLE_SIZE` voxels that fill the image evenly: a Kronecker sequence, the same on any machine.

    Numpy's random numbers may change between its versions, and prints are compared with older ones.
    """
    ratio = 2.0
    for _ in range(64):  # the generalised golden ratio: the root of x^(d+1) = x + 1
        ratio = (1 + ratio) ** (1 / (len(shape) + 1))
    steps = np.arange(1, SAMPLE_SIZE + 1)
    return tuple((steps * ratio ** -(axis + 1) % 1 * length).astype(np.intp) for axis, length in enumerate(shape))


def _equal(prints: Mapping[str, ImagePrint], attribute: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs of cases that share a hash."""
    groups: dict[str, list[str]] = {}
    for name in sorted(prints):
        value = getattr(prints[name], attribute)
        if value is not None:
            groups.setdefault(value, []).append(name)
    for names in groups.values():
        yield from itertools.combinations(names, 2)


def _nearly_equal(prints: Mapping[str, ImagePrint]) -> Iterator[tuple[str, str, float]]:
    """Yield pairs of images of one shape and their correlation, if it is high enough."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(prints):
        if prints[name].sample.size:
            groups.setdefault(prints[name].shape, []).append(name)
    for names in groups.values():
        if len(names) > 1:
            samples = np.stack([prints[name].sample for name in names]).astype(np.float32)
            for first, second, correlation in _correlated_rows(samples):
                yield names[first], names[second], correlation


def _correlated_rows(samples: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield the pairs of rows that correlate outside their backgrounds, comparing a chunk with a chunk at a time."""
    masks = np.stack([_outside_background(row) for row in samples])
    starts = range(0, len(samples), _CHUNK)
    for one, other in itertools.combinations_with_replacement(starts, 2):
        rows, columns = slice(one, one + _CHUNK), slice(other, other + _CHUNK)
        likely = samples[rows] @ samples[columns].T >= _PRESELECTION * samples.shape[1]
        if one == other:
            likely = np.triu(likely, 1)
        if likely.any():
            correlation = _masked_correlation(samples[rows], masks[rows], samples[columns], masks[columns])
            for row, column in np.argwhere(likely & (correlation >= MIN_CORRELATION)):
                yield one + int(row), other + int(column), float(correlation[row, column])


def _outside_background(row: np.ndarray) -> np.ndarray:
    """Return 1 where a sample is outside the background, else 0.

    Brains without skull in a common space, or discs of CT, share the outline of a constant background; with it, images
    of different people correlate with up to 0.98.
    """
    _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
    return (counts < _BACKGROUND_SHARE * row.size)[inverse].astype(np.float32)


def _masked_correlation(
    first: np.ndarray, first_mask: np.ndarray, second: np.ndarray, second_mask: np.ndarray
) -> np.ndarray:
    """Return the correlation of each row of `first` with each of `second` where both masks are 1.

    It is 0 where too few voxels are left or hardly vary. Sums over the common voxels of a pair are matrix products,
    since a masked value is 0.
    """
    first, second = first * first_mask, second * second_mask
    count = first_mask @ second_mask.T
    sum_first, sum_second = first @ second_mask.T, first_mask @ second.T
    variance_first = count * (np.square(first) @ second_mask.T) - np.square(sum_first)
    variance_second = count * (first_mask @ np.square(second).T) - np.square(sum_second)
    covariance = count * (first @ second.T) - sum_first * sum_second
    least = _MIN_VARIANCE * np.square(count)
    usable = (count >= _MIN_COMMON) & (variance_first > least) & (variance_second > least)
    scale = np.sqrt(np.where(usable, variance_first * variance_second, 1))
    return np.where(usable, covariance / scale, 0)
