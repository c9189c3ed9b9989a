"""How the label file of a partially annotated case is read: values of classes not annotated say nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

Classes = frozenset[int]


@dataclass(frozen=True)
class PartialLabel:
    """What the values in the label file of one partially annotated case stand for.

    Attributes:
        replaced: pairs of a value and what it is read as: 0 if it lies in no annotated class, else the least of the
            values that the annotated regions do not tell from it. So the annotated classes alone decide what is read.
        hidden: the classes that are not annotated, each as the set of its values.
    """

    replaced: tuple[tuple[int, int], ...]
    hidden: frozenset[Classes]

    @classmethod
    def of(cls, labels: Mapping[str, Any], annotated: Sequence[str]) -> PartialLabel:
        """Return the reading of a case in which only these classes are annotated.

        Args:
            labels: of dataset.json.
            annotated: names of the annotated classes or regions.
        """
        known = [class_values(labels[name]) for name in annotated]
        first: dict[tuple[bool, ...], int] = {(False,) * len(known): 0}
        names = foreground_classes(labels)
        values = sorted({value for name in names for value in class_values(labels[name])} - {0})
        read = {value: first.setdefault(tuple(value in members for members in known), value) for value in values}
        hidden = {class_values(labels[name]) for name in names}.difference(known)
        return cls(tuple((value, new) for value, new in read.items() if value != new), frozenset(hidden))

    def read(self, labels: np.ndarray) -> np.ndarray:
        """Return a label map of the file as it is to be read; the array itself is left alone."""
        read = labels.copy()
        for value, new in self.replaced:
            read[labels == value] = new
        return read

    def count_hidden(self, labels: np.ndarray) -> int:
        """Return how many voxels of the file hold a value that lies in no annotated class."""
        return sum(int(np.count_nonzero(labels == value)) for value, new in self.replaced if new == 0)

    def hides(self, key: int | Sequence[int]) -> bool:
        """Whether a label, or a region as the tuple of its labels, is not annotated."""
        return class_values(key) in self.hidden

    def known_channels(self, label_manager: LabelManager) -> tuple[bool, ...]:
        """Return for each output channel of a network whether it is annotated; background counts as such."""
        keys = label_manager.foreground_regions if label_manager.has_regions else [0, *label_manager.foreground_labels]
        return tuple(not self.hides(key) for key in keys)


def foreground_classes(labels: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes or regions of dataset.json that can be annotated, in its order."""
    return [name for name, value in labels.items() if name != "ignore" and class_values(value) != {0}]


def class_values(value: int | Sequence[int]) -> Classes:
    """Return the values of a label, or of a region."""
    return frozenset(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
