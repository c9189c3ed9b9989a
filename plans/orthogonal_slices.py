"""The two orthogonal slices of a labelled case: which they are, their labels, and what propagation makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.files import read_json
from lgssl_nnunet.plans.propagation import Registration, propagate
from lgssl_nnunet.problems import Problem, raise_if_any

AXES = "zyx"
"""Names of the array axes in the order in which nnU-Net's readers give them."""

_EXAMPLE = '{"z": 40, "y": 112}'
_SAMPLED_LOCATIONS = 10_000  # per class, as in nnU-Net's preprocessing


@dataclass(frozen=True)
class TrueSlice:
    """A labelled slice on the grid of the preprocessed image.

    Attributes:
        axis: axis on which the slice has one index.
        index: that index.
        label: (H, W), the other two axes in their order.
    """

    axis: int
    index: int
    label: np.ndarray

    def put_into(self, volume: np.ndarray, values: np.ndarray | int) -> None:
        """Overwrite this slice of a volume (X, Y, Z)."""
        np.moveaxis(volume, self.axis, 0)[self.index] = values


def middle_slices(labeled_folder: Path, cases: Iterable[str], transpose: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return the middle slices of each cropped image along its first two axes, a rule that knows no label.

    Args:
        labeled_folder: of the preprocessed labelled cases, whose properties tell the crop.
        cases: their identifiers.
        transpose: the plans' `transpose_forward`; the first axis then is the one of the largest spacing.

    Returns:
        By case, axis of the image file ("x", "y", "z") to index, counted from 0.
    """
    return {
        case: {
            axis: (low + high) // 2 for axis, (low, high) in list(_extent(labeled_folder, case, transpose).items())[:2]
        }
        for case in sorted(cases)
    }


def annotated_slices(
    file: Path, labeled_folder: Path, cases: Iterable[str], transpose: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Return the slices that an annotator's file names; other arguments and result as in `middle_slices`.

    Raises:
        DatasetError: the file is unreadable, or cases lack two slices inside the cropped image; all are listed.
    """
    given = read_json(file)
    if not isinstance(given, dict):
        raise DatasetError(f'{file}: the file names no cases; write {{"CASE": {_EXAMPLE}, ...}}.')
    problems = []
    for case in sorted(cases):
        problem = _problem_with(given.get(case), _extent(labeled_folder, case, transpose))
        if problem is not None:
            problems.append(Problem(f"{file}, case {case}", problem, "correct the file"))
    raise_if_any(problems, file.name)
    return {case: given[case] for case in sorted(cases)}


def _extent(labeled_folder: Path, case: str, transpose: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return first and last-but-one index of the cropped image by axis name, in the order of the array's axes."""
    box = load_pickle(str(labeled_folder / f"{case}.pkl"))["bbox_used_for_cropping"]
    return {AXES[transpose[axis]]: (int(low), int(high)) for axis, (low, high) in enumerate(box)}


def _problem_with(slices: Any, extent: Mapping[str, tuple[int, int]]) -> str | None:
    if slices is None:
        return f"the file does not name this case; two slices are needed, as in {_EXAMPLE}"
    if not isinstance(slices, dict) or len(slices) != 2 or not slices.keys() <= extent.keys():
        return f"two slices are needed, as in {_EXAMPLE}"
    for axis, index in slices.items():
        low, high = extent[axis]
        if type(index) is not int or not low <= index < high:
            return f"slice {index!r} along {axis} is not inside the image, whose content spans {low} to {high - 1}"
    return None


def read_slices(
    label_file: Path,
    slices: Mapping[str, int],
    properties: Mapping[str, Any],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    shape: Sequence[int],
) -> list[TrueSlice]:
    """Return the labels of two slices as preprocessing would give them if there were no others.

    Each slice is cropped and resampled by itself: in a label that is resampled as a whole, its neighbours would show.

    Args:
        label_file: a label as in labelsTr.
        slices: axis name to index in that file.
        properties: what preprocessing noted of the case.
        plans_manager: of the plans.
        configuration_manager: of the configuration.
        shape: of the preprocessed image, (X, Y, Z).
    """
    transpose, box = plans_manager.transpose_forward, properties["bbox_used_for_cropping"]
    label = plans_manager.image_reader_writer_class().read_seg(str(label_file))[0][0].transpose(transpose)
    spacing = [properties["spacing"][axis] for axis in transpose]
    found = []
    for name, raw_index in slices.items():
        axis = transpose.index(AXES.index(name))
        low, high = box[axis]
        crop = [slice(*bounds) for bounds in box]
        crop[axis] = slice(raw_index, raw_index + 1)
        flat = [1 if i == axis else size for i, size in enumerate(shape)]
        resampled = configuration_manager.resampling_fn_seg(
            label[tuple(crop)][None], flat, spacing, configuration_manager.spacing
        )
        index = int((raw_index - low + 0.5) * shape[axis] / (high - low))
        found.append(TrueSlice(axis, index, resampled[0].squeeze(axis).astype(np.int16)))
    return found


def annotated_volume(
    image: np.ndarray, true_slices: Sequence[TrueSlice], spacing: Sequence[float], register: Registration
) -> np.ndarray:
    """Propagate both slices and return the channels that `lgssl_nnunet.data.sparse` describes.

    Args:
        image: (X, Y, Z).
        true_slices: the two slices; the first one belongs to the network that predicts.
        spacing: of the image, in mm.
        register: a value of `lgssl_nnunet.plans.propagation.REGISTRATIONS`.

    Returns:
        (4, X, Y, Z), int16; each true slice overwrites the label map that the other one was propagated to.
    """
    annotation = np.empty((4, *image.shape), np.int16)
    labels, steps = annotation[:2], annotation[2:]
    for direction, (own, other) in enumerate([tuple(true_slices), tuple(reversed(true_slices))]):
        labels[direction] = propagate(image, own.label, own.axis, own.index, spacing, register)
        other.put_into(labels[direction], other.label)
        distances = np.abs(np.arange(image.shape[own.axis]) - own.index)
        steps[direction] = 1 + distances.reshape([-1 if axis == own.axis else 1 for axis in range(image.ndim)])
        other.put_into(steps[direction], 1)
    return annotation


def class_locations(true_slices: Sequence[TrueSlice], shape: Sequence[int]) -> dict[int, np.ndarray]:
    """Return indices (N, 4), channel first, of voxels of every foreground class on the slices of a volume (X, Y, Z)."""
    shown = np.zeros(shape, np.int16)
    for true_slice in true_slices:
        true_slice.put_into(shown, true_slice.label)
    generator = np.random.default_rng(0)
    locations = {}
    for value in np.unique(shown[shown > 0]):
        found = np.argwhere(shown == value)
        chosen = np.sort(generator.permutation(len(found))[:_SAMPLED_LOCATIONS])
        locations[int(value)] = np.insert(found[chosen], 0, 0, axis=1)
    return locations
