"""One case from its files to what the network sees: nnU-Net's default preprocessing, in less time and memory.

Training cases and images to predict pass through the same function. The steps, their order and what they leave in the
properties are nnU-Net's; resampling and cropping are `lgssl_nnunet.data.resampling` and `lgssl_nnunet.data.cropping`.
Plans that ask for anything but nnU-Net's default steps get no `Recipe`, and nnU-Net's preprocessor does the work.

A `Recipe` is made where the plans are read, which imports torch; a worker process that gets one does without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
)
from threadpoolctl import threadpool_limits

from lgssl_nnunet.data.cropping import nonzero_box, outside
from lgssl_nnunet.data.partial_labels import PartialLabel
from lgssl_nnunet.data.resampling import nearest_axis, new_shape, resample_image, resample_labels
from lgssl_nnunet.errors import DatasetError

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

OUTSIDE = -1
"""Label of background where all channels are zero, which is no part of the body."""

_PREPROCESSOR = "DefaultPreprocessor"
_RESAMPLING = "resample_data_or_seg_to_shape"
_IMAGE_ORDERS = {"is_seg": False, "order": 3, "order_z": 0}
_LABEL_ORDERS = {"is_seg": True, "order": 1, "order_z": 0}
_SCHEMES = {
    scheme.__name__: scheme
    for scheme in (
        CTNormalization,
        ZScoreNormalization,
        NoNormalization,
        RescaleTo01Normalization,
        RGBTo01Normalization,
    )
}
_LOCATIONS_SEED = 1234
_MIN_LOCATIONS = 10_000
_MIN_SHARE_OF_LOCATIONS = 0.01


@dataclass(frozen=True)
class Recipe:
    """How the cases of one configuration are preprocessed.

    Attributes:
        reader: nnU-Net's reader class.
        transpose_forward: order of the axes.
        spacing: target spacing in that order; two numbers leave the first axis as it is.
        schemes: names of normalisation classes, one per channel.
        masked: per channel, whether only the body is normalised.
        intensities: foreground intensities per channel, from the fingerprint.
        force_separate_z: per kind, image and label, what the plans say about thick slices.
        classes: labels, or tuples of labels, whose places are noted for oversampling.
    """

    reader: type[BaseReaderWriter]
    transpose_forward: tuple[int, ...]
    spacing: tuple[float, ...]
    schemes: tuple[str, ...]
    masked: tuple[bool, ...]
    intensities: Mapping[str, Mapping[str, float]]
    force_separate_z: tuple[bool | None, bool | None]
    classes: tuple[int | tuple[int, ...], ...]


@dataclass(frozen=True)
class PreprocessedCase:
    """A case as nnU-Net's preprocessor returns it.

    Attributes:
        image: (C, X, Y, Z), float32.
        label: (1, X, Y, Z), int16; None without a label file.
        properties: what is needed to go back to the grid of the file, and `class_locations` with a label.
    """

    image: np.ndarray
    label: np.ndarray | None
    properties: dict[str, Any]


def recipe_of(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, dataset_json: Mapping[str, Any]
) -> Recipe | None:
    """Return the recipe of a configuration, None if its plans ask for other steps than nnU-Net's default ones."""
    planned = configuration_manager.configuration
    image_options, label_options = (planned.get(f"resampling_fn_{kind}_kwargs") or {} for kind in ("data", "seg"))
    usual = (
        planned["preprocessor_name"] == _PREPROCESSOR
        and {planned["resampling_fn_data"], planned["resampling_fn_seg"]} == {_RESAMPLING}
        and has_usual_options(image_options, _IMAGE_ORDERS)
        and has_usual_options(label_options, _LABEL_ORDERS)
        and _SCHEMES.keys() >= set(planned["normalization_schemes"])
    )
    if not usual:
        return None
    labels = plans_manager.get_label_manager(dataset_json)
    classes = list(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
    if labels.has_ignore_label:
        classes.append([OUTSIDE, *labels.all_labels])
    return Recipe(
        reader=plans_manager.image_reader_writer_class,
        transpose_forward=tuple(plans_manager.transpose_forward),
        spacing=tuple(configuration_manager.spacing),
        schemes=tuple(planned["normalization_schemes"]),
        masked=tuple(planned["use_mask_for_norm"]),
        intensities=plans_manager.foreground_intensity_properties_per_channel,
        force_separate_z=(image_options["force_separate_z"], label_options["force_separate_z"]),
        classes=tuple(tuple(map(int, key)) if isinstance(key, (tuple, list)) else int(key) for key in classes),
    )


def has_usual_options(options: Mapping[str, Any], orders: Mapping[str, Any]) -> bool:
    """Whether the options of nnU-Net's resampling are these orders and `force_separate_z`, no more and no less."""
    return set(options) == {*orders, "force_separate_z"} and options | orders == options


def preprocess(
    images: Sequence[Path | str],
    label: Path | str | None,
    recipe: Recipe,
    partial: PartialLabel | None = None,
    clear: bool = False,
) -> PreprocessedCase:
    """Read and preprocess one case.

    Args:
        images: image files, one per channel.
        label: segmentation file, None for a case without one.
        recipe: of the configuration.
        partial: how the label is read if it is annotated in part only.
        clear: do what `clear_outside` does.

    Raises:
        ValueError: image and label differ in shape.
        DatasetError: the image is so thin that resampling leaves no voxel.
    """
    image, labels, properties = _read(images, label, recipe)
    labels = labels if partial is None else partial.read(labels)
    spacing = [float(properties["spacing"][axis]) for axis in recipe.transpose_forward]

    box = nonzero_box(image)
    properties["shape_before_cropping"] = image.shape[1:]
    properties["bbox_used_for_cropping"] = [[side.start, side.stop] for side in box]
    image = image[(slice(None), *box)]
    properties["shape_after_cropping_and_before_resampling"] = image.shape[1:]
    labels = None if labels is None else labels[box]
    mask = outside(image) if labels is not None or any(recipe.masked) else None
    if labels is not None:
        labels[mask & (labels == 0)] = OUTSIDE
        mask = labels < 0
    _normalise(image, None if mask is None else ~mask, recipe)

    target = recipe.spacing if len(recipe.spacing) == len(spacing) else (spacing[0], *recipe.spacing)
    shape = new_shape(image.shape[1:], spacing, target)
    _require_voxels(shape, image.shape[1:], spacing, target, images[0])
    nearest = [nearest_axis(spacing, target, forced) for forced in recipe.force_separate_z]
    image = _resampled(image, shape, nearest[0])
    if labels is not None:
        labels = resample_labels(labels, shape, nearest[1])[None]
        properties["class_locations"] = class_locations(labels, recipe.classes)
    if clear and any(recipe.masked):
        body = resample_labels(OUTSIDE * mask.astype(np.int8), shape, nearest[1]) if labels is None else labels[0]
        clear_outside(image, body, recipe.masked)
    if partial is not None:
        hide_locations(properties, partial)
    return PreprocessedCase(image, labels, properties)


def clear_outside(image: np.ndarray, label: np.ndarray, masked: Sequence[bool]) -> None:
    """Set masked channels to exactly 0 outside of the body, where a spline leaves waves around it.

    nnU-Net's augmentation does so with labelled patches, by the label `OUTSIDE`; patches of the unlabelled stream have
    none.

    Args:
        image: (C, X, Y, Z), changed.
        label: (X, Y, Z), negative outside of the body.
        masked: per channel, whether only the body is normalised.
    """
    for channel in np.flatnonzero(masked):
        image[channel][label < 0] = 0


def _require_voxels(
    shape: Sequence[int], old_shape: Sequence[int], spacing: Sequence[float], target: Sequence[float], file: Path | str
) -> None:
    for axis, length in enumerate(shape):
        if length < 1:
            raise DatasetError(
                f"{file}: the scan is {old_shape[axis] * spacing[axis]:g} mm thick within its border of zeros, and a "
                f"voxel of the plans {target[axis]:g} mm, so resampling would leave nothing; leave it out."
            )


def hide_locations(properties: dict[str, Any], partial: PartialLabel) -> None:
    """Take the places of classes that are not annotated, which lie in annotated regions, out of the properties."""
    locations = properties["class_locations"]
    properties["class_locations"] = {key: [] if partial.hides(key) else locations[key] for key in locations}


def _read(
    images: Sequence[Path | str], label: Path | str | None, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Return image (C, X, Y, Z), labels (X, Y, Z), both with the axes in planned order, and the reader's properties."""
    reader = recipe.reader()
    image, properties = reader.read_images([str(path) for path in images])
    image = image.astype(np.float32, copy=False)
    labels = None if label is None else reader.read_seg(str(label))[0].astype(np.int16)
    if labels is not None and labels.shape[1:] != image.shape[1:]:
        raise ValueError(f"the image has the shape {image.shape[1:]}, its label {labels.shape[1:]}")
    order = recipe.transpose_forward
    image = image.transpose(0, *(axis + 1 for axis in order))
    return image, None if labels is None else labels[0].transpose(order), properties


def _normalise(image: np.ndarray, body: np.ndarray | None, recipe: Recipe) -> None:
    """Normalise an image (C, X, Y, Z) in place; `body` is where, for channels that are masked."""
    mask = None if body is None else body.view(np.int8) - np.int8(1)  # nnU-Net's classes take 0 inside, -1 outside
    for channel, (scheme, masked) in enumerate(zip(recipe.schemes, recipe.masked, strict=True)):
        normaliser = _SCHEMES[scheme](masked, recipe.intensities[str(channel)])
        image[channel] = normaliser.run(image[channel], mask)


def _resampled(image: np.ndarray, shape: tuple[int, ...], nearest: int | None) -> np.ndarray:
    if image.shape[1:] == shape:
        return image
    resampled = np.empty((len(image), *shape), dtype=np.float32)
    with threadpool_limits(1, user_api="blas"):  # the products are small, and other cases have the other cores
        for channel, values in enumerate(image):
            resample_image(values, shape, nearest, out=resampled[channel])
    return resampled


def class_locations(
    labels: np.ndarray, classes: Sequence[int | tuple[int, ...]]
) -> dict[int | tuple[int, ...], np.ndarray | list]:
    """Return places of every class by its label or labels, drawn as nnU-Net draws them.

    Args:
        labels: (1, X, Y, Z).
        classes: labels, or tuples of labels of regions.

    Returns:
        Indices (N, 4), at least 10,000 where there are so many and at least 1 % of the class; an empty list for a class
        that is not there.
    """
    random = np.random.RandomState(_LOCATIONS_SEED)
    locations: dict[int | tuple[int, ...], np.ndarray | list] = {}
    for key in classes:
        members = key if isinstance(key, tuple) else (key,)
        places = np.concatenate([np.flatnonzero(labels == label) for label in members])
        number = max(min(_MIN_LOCATIONS, len(places)), math.ceil(len(places) * _MIN_SHARE_OF_LOCATIONS))
        chosen = places[random.choice(len(places), number, replace=False)] if number else []
        locations[key] = np.stack(np.unravel_index(chosen, labels.shape), axis=1) if number else []
    return locations
