"""plans.json, dataset.json and the fingerprint as they leave the house: what prediction needs, and no case's name.

Case names can be those of patients. What is kept is listed, so that a new entry stays here until somebody adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_OUR_BLOCK = (
    "schema_version",
    "protocol",
    "schedule",
    "draw_seed",
    "mirroring_axes",
    "left_right",
    "text",
    "training",
    "unseen_classes",
)
_OF_DATASET_JSON = (
    "name",
    "description",
    "reference",
    "licence",
    "license",
    "release",
    "channel_names",
    "modality",
    "labels",
    "regions_class_order",
    "prompts",
    "numTraining",
    "file_ending",
    "overwrite_image_reader_writer",
)
_OF_FINGERPRINT = (
    "spacings",
    "shapes_after_crop",
    "foreground_intensity_properties_per_channel",
    "median_relative_size_after_cropping",
)


def shareable_plans(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return plans with nnU-Net's part whole, and of ours what builds the network or describes the training.

    The split becomes the number of cases of each kind (`num_cases`); twins, annotated slices and annotated classes,
    which are lists of cases, are left out.
    """
    if "lgssl" not in plans:
        return dict(plans)
    ours = plans["lgssl"]
    kept = {name: ours[name] for name in _OF_OUR_BLOCK if name in ours}
    if "split" in ours:
        kept["num_cases"] = {kind: len(cases) for kind, cases in ours["split"].items()}
    elif "num_cases" in ours:  # exported before
        kept["num_cases"] = ours["num_cases"]
    if "text_encoder" in kept.get("training", {}).get("hyperparameters", {}):
        kept["training"] = _without_folder(kept["training"], ours["text"]["encoder"])
    return {**plans, "lgssl": kept}


def shareable_dataset_json(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return dataset.json without lists of cases and records of where they came from."""
    return {name: dataset_json[name] for name in _OF_DATASET_JSON if name in dataset_json}


def shareable_fingerprint(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return nnU-Net's part of a fingerprint, which names no case."""
    return {name: fingerprint[name] for name in _OF_FINGERPRINT if name in fingerprint}


def _without_folder(training: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """Name the text encoder as the plans record it: as an option it may be the path of a file."""
    return {**training, "hyperparameters": {**training["hyperparameters"], "text_encoder": encoder}}
