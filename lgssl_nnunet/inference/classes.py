"""Segmentations that hold only some of a model's classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from lgssl_nnunet.data.partial_labels import foreground_classes
from lgssl_nnunet.errors import UsageError


def chosen_classes(
    asked: Sequence[str] | None, dataset_json: Mapping[str, Any], unseen: Collection[str] = ()
) -> tuple[str, ...] | None:
    """Return the classes to write, in the order of dataset.json; None for all.

    Args:
        asked: names of classes or regions; None for all.
        dataset_json: of the model.
        unseen: classes of which no case that trained the model had a voxel.

    Raises:
        UsageError: no name was given, or one that is no foreground class of the model, or an unseen one.
    """
    if asked is None:
        return None
    there = [name for name in foreground_classes(dataset_json["labels"]) if name not in unseen]
    unlearnt = [name for name in asked if name in unseen]
    unknown = [name for name in asked if name not in there and name not in unlearnt]
    problems = [f"the model has no class {', '.join(map(repr, unknown))}"] if unknown else []
    if unlearnt:
        problems.append(f"the model was never trained on {', '.join(map(repr, unlearnt))}, which no labelled case had")
    if problems or not asked:
        problem = " and ".join(problems) or "no class is named"
        raise UsageError(f"--classes: {problem}; choose among {', '.join(map(repr, there))}.")
    return tuple(name for name in there if name in asked)


class ChosenClasses(LabelManager):
    """nnU-Net's reading of the labels, by which a segmentation holds some classes and background.

    Classes compete as ever, and what the others win becomes background. Regions do not compete: those that are not
    chosen are not painted.

    Args:
        dataset_json: of the model.
        names: the classes or regions to write.
    """

    def __init__(self, dataset_json: Mapping[str, Any], names: Sequence[str]) -> None:
        super().__init__(dataset_json["labels"], dataset_json.get("regions_class_order"))
        self._is_chosen = [name in names for name in foreground_classes(self.label_dict)]
        self._values = [int(np.atleast_1d(self.label_dict[name])[0]) for name in names]

    @torch.inference_mode()
    def convert_probabilities_to_segmentation(
        self, predicted_probabilities: np.ndarray | Tensor
    ) -> np.ndarray | Tensor:
        """Return the labels (X, Y, Z) of probabilities or logits (C, X, Y, Z), which stay as they are."""
        if not self.has_regions:
            return self.only_chosen(super().convert_probabilities_to_segmentation(predicted_probabilities))
        make = np.array if isinstance(predicted_probabilities, np.ndarray) else torch.tensor
        painted = make(self._is_chosen).reshape(-1, *[1] * (predicted_probabilities.ndim - 1))
        return super().convert_probabilities_to_segmentation(predicted_probabilities * painted)

    def only_chosen(self, labels: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Return labels with all but the chosen classes replaced by background; not for regions."""
        if isinstance(labels, np.ndarray):
            return labels * np.isin(labels, self._values)
        return labels * torch.isin(labels, torch.tensor(self._values, dtype=labels.dtype))


class PlansForClasses(PlansManager):
    """Plans whose labels are read as `ChosenClasses`, also by nnU-Net's own export.

    Args:
        plans: of the model.
        names: the classes or regions to write.
    """

    def __init__(self, plans: dict[str, Any], names: Sequence[str]) -> None:
        super().__init__(plans)
        self._names = tuple(names)

    def get_label_manager(self, dataset_json: dict[str, Any], **options: Any) -> LabelManager:
        """Return the reading of the labels of dataset.json."""
        return ChosenClasses(dataset_json, self._names)
