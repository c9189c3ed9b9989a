"""From logits on the network's grid to a segmentation on the image's, slab by slab.

nnU-Net resamples all channels of a case in float64 before it takes the largest one, which for a CT with many classes is
the highest memory of all. Here a slab of the image's grid is resampled and decided at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from torch import Tensor
from torch.nn import functional

from lgssl_nnunet.data.preprocessing import has_usual_options
from lgssl_nnunet.inference.classes import ChosenClasses

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

SLAB_BYTES = 64 * 2**20
"""About what the resampled logits of a slab take."""

_RESAMPLING = "resample_data_or_seg_to_shape"
_ORDERS = {"is_seg": False, "order": 1, "order_z": 0}


def can_export_by_slabs(configuration_manager: ConfigurationManager) -> bool:
    """Return whether the plans resample probabilities as nnU-Net does by default: linear, nearest between slices."""
    planned = configuration_manager.configuration
    options = planned["resampling_fn_probabilities_kwargs"]
    return planned["resampling_fn_probabilities"] == _RESAMPLING and has_usual_options(options, _ORDERS)


def write_segmentation(
    logits: Tensor,
    properties: dict[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    label_manager: LabelManager,
    file: Path,
) -> None:
    """Resample logits to the image's grid, decide, undo cropping and transposition, and write.

    Args:
        logits: (C, X, Y, Z) on the network's grid, fp32.
        properties: of the image, from nnU-Net's preprocessor.
        configuration_manager: one for which `can_export_by_slabs`.
        plans_manager: of the model.
        label_manager: of the model.
        file: what to write.
    """
    cropped = segment(
        logits,
        properties["shape_after_cropping_and_before_resampling"],
        nearest_axis(properties, configuration_manager, plans_manager),
        label_manager,
    )
    whole = np.zeros(properties["shape_before_cropping"], dtype=cropped.dtype)
    whole = insert_crop_into_image(whole, cropped, properties["bbox_used_for_cropping"])
    writer = plans_manager.image_reader_writer_class()
    writer.write_seg(whole.transpose(plans_manager.transpose_backward), str(file), properties)


def nearest_axis(
    properties: dict[str, Any], configuration_manager: ConfigurationManager, plans_manager: PlansManager
) -> int | None:
    """Return the axis across which nnU-Net takes the nearest slice because voxels are long there; None for none."""
    image = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    planned = list(configuration_manager.spacing)
    network = planned if len(planned) == len(image) else [image[0], *planned]  # a 2D plan leaves the slices alone
    forced = configuration_manager.configuration["resampling_fn_probabilities_kwargs"]["force_separate_z"]
    return determine_do_sep_z_and_axis(forced, network, image)[1]


@torch.inference_mode()
def segment(logits: Tensor, shape: Sequence[int], nearest: int | None, label_manager: LabelManager) -> np.ndarray:
    """Return the segmentation on another grid, from logits interpolated linearly with equal borders.

    Args:
        logits: (C, X, Y, Z).
        shape: (X', Y', Z') of the segmentation.
        nearest: axis of the grid along which the nearest position is taken instead.
        label_manager: turns logits into labels.

    Returns:
        (X', Y', Z'), uint8, or uint16 for 255 classes and more.
    """
    labels = np.zeros(tuple(shape), dtype=np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16)
    slab = max(1, SLAB_BYTES // (4 * len(logits) * math.prod(shape[1:])))
    for start in range(0, shape[0], slab):
        stop = min(start + slab, shape[0])
        resampled = _resampled_slab(logits, shape, nearest, start, stop)
        labels[start:stop] = _decide(resampled, label_manager).numpy()
    return labels


def _decide(logits: Tensor, label_manager: LabelManager) -> Tensor:
    """Return labels (X, Y, Z) of logits (C, X, Y, Z)."""
    if label_manager.has_regions:
        return label_manager.convert_logits_to_segmentation(logits)
    largest, labels = logits[0].clone(), torch.zeros(logits.shape[1:], dtype=torch.int16)
    for channel in range(1, len(logits)):  # the first of equal ones wins, as in numpy
        higher = logits[channel] > largest
        labels.masked_fill_(higher, channel)
        torch.maximum(largest, logits[channel], out=largest)
    return label_manager.only_chosen(labels) if isinstance(label_manager, ChosenClasses) else labels


def _resampled_slab(logits: Tensor, shape: Sequence[int], nearest: int | None, start: int, stop: int) -> Tensor:
    """Return (C, stop - start, Y', Z'): rows `start` to `stop` along the first axis of the resampled logits."""
    below, above, share = _neighbours(logits.shape[1], shape[0], nearest == 0)
    below, above, share = below[start:stop], above[start:stop], share[start:stop]
    first, last = int(below.min()), int(above.max())
    plane = _resampled_planes(logits[:, first : last + 1], shape[1:], None if nearest is None else nearest - 1)
    lower = plane[:, below - first]
    if not bool(share.any()):
        return lower
    return torch.lerp(lower, plane[:, above - first], share[:, None, None])


def _resampled_planes(logits: Tensor, shape: Sequence[int], nearest: int | None) -> Tensor:
    """Return (C, X, Y', Z'); `nearest` is 0 or 1 for Y or Z, anything else for neither."""
    if nearest in (0, 1):
        indices = _neighbours(logits.shape[2 + nearest], shape[nearest], nearest=True)[0]
        logits = logits.index_select(2 + nearest, indices)
    if tuple(logits.shape[2:]) == tuple(shape):
        return logits
    return functional.interpolate(logits, tuple(shape), mode="bilinear", align_corners=False)


def _neighbours(size: int, new_size: int, nearest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return, per new position, the old ones below and above it and the share of the one above."""
    position = ((torch.arange(new_size, dtype=torch.float64) + 0.5) * size / new_size - 0.5).clamp(0, size - 1)
    if nearest:
        index = (position + 0.5).floor().long().clamp(max=size - 1)
        return index, index, torch.zeros(new_size)
    below = position.floor().long()
    return below, (below + 1).clamp(max=size - 1), (position - below).float()
