"""Left and right: which mirroring would turn one class into another.

nnU-Net mirrors patches along every axis, in training and in prediction. A left kidney then looks like a right one, and
a prompt that says "left" is wrong. Where dataset.json has both sides of a structure, mirroring along the left-right
axis is switched off; which array axis that is comes from the direction stored in the images.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.problems import first_of

logger = logging.getLogger(__name__)

_MOST_NAMED = 3

_OPPOSITE = {"left": "right", "l": "r", "lh": "rh", "lt": "rt"}
_OPPOSITE |= {right: left for left, right in _OPPOSITE.items()}
_READERS_WITH_DIRECTION = ("SimpleITKIO", "NibabelIO")
_READERS_THAT_REORIENT = ("SimpleITKIOWithReorient", "NibabelIOWithReorient")
_MIN_COSINE = 0.75
"""A left-right axis must lie within about 40 degrees of one array axis; mirroring is meaningless otherwise."""


class LeftRight(NamedTuple):
    """How an array lies in the patient.

    Attributes:
        axis: array axis (0, 1, 2 as nnU-Net's reader orders them) that runs from left to right.
        sign: 1 or -1: two images with the same axis and other signs show the patient's left on opposite sides.
    """

    axis: int
    sign: int


class Sides(NamedTuple):
    """What the sides of classes ask of training and prediction.

    Attributes:
        axes: along which mirroring is allowed, in transposed array order; None if no structure has two sides
            (nnU-Net's default applies).
        lying: how all images lie, None where there is no pair of sides or the images differ or do not tell. Prediction
            refuses images that lie otherwise: left would come out as right.
    """

    axes: list[int] | None
    lying: LeftRight | None


def sided_pairs(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of texts that differ only in the side, such as ("left kidney", "right kidney").

    Args:
        texts: class names or prompts. "left atrium" alone makes no pair.
    """
    by_words = {_words(text): text for text in texts}
    pairs = []
    for words, text in by_words.items():
        other = tuple(_OPPOSITE.get(word, word) for word in words)
        if other != words and other in by_words and words < other:
            pairs.append((text, by_words[other]))
    return pairs


def names_both_sides(texts: Iterable[str]) -> bool:
    """Return whether the words of the texts tell a side and also the opposite one."""
    words = {word for text in texts for word in _words(text)}
    return any(word in words and other in words for word, other in _OPPOSITE.items())


def left_right(image: Path, reader: str) -> LeftRight | None:
    """Return the array axis that runs from left to right in the patient, and which way.

    Only the header is read. None: the format stores no direction, or no axis is close to left-right.
    """
    if reader in _READERS_THAT_REORIENT:
        return LeftRight(2, 1)
    if reader not in _READERS_WITH_DIRECTION:
        return None
    header = sitk.ImageFileReader()
    header.SetFileName(str(image))
    try:
        header.ReadImageInformation()
    except RuntimeError:
        return None
    dimension = header.GetDimension()
    if dimension < 3:
        return None
    cosines = np.reshape(header.GetDirection(), (dimension, dimension))[0, :3]
    index_axis = int(np.argmax(np.abs(cosines)))
    if abs(cosines[index_axis]) < _MIN_COSINE:
        return None
    return LeftRight(2 - index_axis, int(np.sign(cosines[index_axis])))  # indices are x, y, z, arrays z, y, x


def find_sides(
    texts: Sequence[Sequence[str]], images: Mapping[str, Path], reader: str, transpose_forward: Sequence[int]
) -> Sides:
    """Return the axes along which mirroring is allowed and how the images lie, and say why.

    Args:
        texts: lists of texts to look for sides in, each for itself (class names, prompts).
        images: one image per case; all must agree.
        reader: name of nnU-Net's reader class.
        transpose_forward: axis order of the plans.
    """
    pairs = [pair for group in texts for pair in sided_pairs(group)]
    if not pairs:
        if any(map(names_both_sides, texts)):
            logger.warning(
                "Classes or prompts name a left and a right side, but no two differ in the side alone, so mirroring "
                "stays on along all axes. If two classes are mirror images of each other, name them alike, for example "
                "'left kidney' and 'right kidney'."
            )
        return Sides(None, None)
    example = " and ".join(f"'{text}'" for text in pairs[0])
    lying = {name: left_right(path, reader) for name, path in images.items()}
    found = {name: None if how is None else how.axis for name, how in lying.items()}
    axes = sorted(set(found.values()), key=str)
    if len(axes) != 1:
        by_axis = "; ".join(_describe(axis, found) for axis in axes)
        logger.warning(
            "Classes have sides (%s), but the left-right axis differs between images (%s): mirroring is switched off "
            "along all axes. Bring the images to one orientation to get it back.",
            example,
            by_axis,
        )
        return Sides([], None)
    if axes[0] is None:
        logger.warning(
            "Classes have sides (%s), but the images do not say which axis is left-right: mirroring is switched off "
            "along all axes.",
            example,
        )
        return Sides([], None)
    _warn_of_opposite(example, {name: how.sign for name, how in lying.items()})
    common = set(lying.values())
    blocked = list(transpose_forward).index(axes[0])
    logger.info("Classes have sides (%s): no mirroring along the left-right axis (axis %d).", example, blocked)
    return Sides([axis for axis in range(3) if axis != blocked], common.pop() if len(common) == 1 else None)


def _warn_of_opposite(example: str, signs: Mapping[str, int]) -> None:
    """Warn of images whose arrays show the patient's left on the other side than most."""
    rarer = min(set(signs.values()), key=list(signs.values()).count)
    if len(set(signs.values())) > 1:
        logger.warning(
            "Classes have sides (%s), but the images are not stored in one left-right direction: in %s the patient's "
            "left lies on the other side than in the rest. Bring them to one orientation, or plan with a reader that "
            'does ("overwrite_image_reader_writer": "SimpleITKIOWithReorient" in dataset.json).',
            example,
            first_of(sorted(name for name, sign in signs.items() if sign == rarer), _MOST_NAMED),
        )


def _describe(axis: int | None, found: Mapping[str, int | None]) -> str:
    cases = first_of(sorted(name for name, value in found.items() if value == axis), _MOST_NAMED)
    return f"{'unknown' if axis is None else f'array axis {axis}'} in {cases}"


def _words(text: str) -> tuple[str, ...]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return tuple(re.findall(r"[a-z0-9]+", spaced.lower()))
