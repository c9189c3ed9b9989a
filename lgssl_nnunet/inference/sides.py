"""Left and right in images to segment: a model of sided classes takes those that lie as its training images do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.inference.cases import ImageRules
from lgssl_nnunet.plans.sidedness import LeftRight, left_right


def require_same_sides(images: Sequence[Path], rules: ImageRules) -> None:
    """Refuse images in whose arrays the patient's left lies elsewhere than in those that a model was planned on.

    Such a model knows a left kidney from a right one by its place in the array. Images that do not tell pass, and so do
    all images for a model without sided classes, or whose own images differed.

    Args:
        images: one image per case.
        rules: what the model expects of images.

    Raises:
        DatasetError: all such images.
    """
    expected = rules.left_right
    if expected is None:
        return
    found = {image: left_right(image, rules.reader.__name__) for image in images}
    problems = [f"{image}: {_difference(how, expected)}" for image, how in found.items() if how not in (None, expected)]
    if problems:
        raise DatasetError(
            "The model tells left from right by how its training images are stored, and these are stored otherwise, so "
            "that left and right would be mistaken. Bring them to the orientation of the training images, for example "
            "with SimpleITK.DICOMOrient:\n" + "\n".join(f"  {problem}" for problem in problems)
        )


def _difference(how: LeftRight, expected: LeftRight) -> str:
    if how.axis == expected.axis:
        return "the patient's left is on the other side"
    return f"left to right is array axis {how.axis}, not {expected.axis}"
