"""The dataset fingerprint of one plans file.

As nnU-Net's, with the same keys, except for who contributes: intensities come from the labelled cases of the budget,
shapes and spacings from all training images. Nothing here opens a segmentation outside the budget.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from lgssl_nnunet.data.cropping import nonzero_box
from lgssl_nnunet.data.partial_labels import PartialLabel
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.files import content_hash, file_signature, read_json_if_valid, write_json
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.plans.cases import RawDataset, find_reader
from lgssl_nnunet.plans.partial_labels import label_readings
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

TOTAL_SAMPLES = 100_000_000
"""Foreground intensities sampled over all labelled cases, as in nnU-Net."""
MAX_SAMPLES_PER_CASE = 1_000_000
"""Limit per case: with few labelled cases nnU-Net's total would draw every voxel many times over."""
PERCENTILES = (0.5, 50.0, 99.5)
_SEED = 1234


def dataset_fingerprint(
    dataset: RawDataset, file: Path, *, clean: bool = False, num_processes: int = 0, progress: bool = True
) -> tuple[dict[str, Any], set[int]]:
    """Return the fingerprint of a dataset and its budget, from `file` if nothing has changed since it was written.

    With it come the foreground values that the labels of the budget hold, each read as far as its case is annotated.

    Args:
        dataset: the raw dataset with the budget applied.
        file: `dataset_fingerprint_<plans>.json`; what it was made from, and the values, are noted beside it in
            `*.manifest.json`.
        clean: make it again in any case.
        num_processes: worker processes; 0 for none.
        progress: show a progress bar.

    Raises:
        DatasetError: an image or label cannot be read, or no labelled voxel is foreground.
    """
    manifest = file.with_name(f"{file.stem}.manifest.json")
    key = _key(dataset)
    old, noted = read_json_if_valid(file), read_json_if_valid(manifest)
    if not clean and isinstance(old, dict) and isinstance(noted, dict) and noted.get("key") == key:
        values = noted.get("label_values")
        if isinstance(values, list):
            logger.info("Fingerprint: nothing has changed, taken from %s.", file.name)
            return old, set(values)
    fingerprint, values = extract_fingerprint(dataset, num_processes=num_processes, progress=progress)
    manifest.unlink(missing_ok=True)
    write_json(fingerprint, file)
    write_json({"key": key, "label_values": sorted(values)}, manifest)
    return fingerprint, values


def extract_fingerprint(
    dataset: RawDataset, *, num_processes: int = 0, progress: bool = True
) -> tuple[dict[str, Any], set[int]]:
    """Read all training images and the labels of the budget; return nnU-Net's fingerprint and the labels' values.

    Raises:
        DatasetError: an image or label cannot be read, or no labelled voxel is foreground.
    """
    cases = dataset.cases
    reader = find_reader(dataset.dataset_json, next(iter(cases.values())).images[0])
    samples = min(TOTAL_SAMPLES // len(dataset.labeled), MAX_SAMPLES_PER_CASE)
    readings = label_readings(dataset)
    tasks = {
        name: (
            [str(path) for path in case.images],
            str(case.label) if case.label else None,
            reader,
            samples,
            readings.get(name),
        )
        for name, case in cases.items()
    }
    outcome = dict(
        run_cases(analyze_case, tasks, num_processes=num_processes, description="Fingerprint", progress=progress)
    )
    failures = {name: result for name, result in outcome.items() if isinstance(result, CaseFailure)}
    raise_if_any(
        [Problem(name, failures[name].reason, "repair or remove the case") for name in sorted(failures)], dataset.name
    )
    ordered = [outcome[name] for name in cases]
    fingerprint = {
        "spacings": [result["spacing"] for result in ordered],
        "shapes_after_crop": [result["shape"] for result in ordered],
        "foreground_intensity_properties_per_channel": _intensity_statistics(
            [outcome[name]["intensities"] for name in dataset.labeled], dataset
        ),
        "median_relative_size_after_cropping": float(np.median([result["relative_size"] for result in ordered])),
    }
    return fingerprint, {value for name in dataset.labeled for value in outcome[name]["label_values"]}


def analyze_case(
    images: list[str], label: str | None, reader: type, num_samples: int, reading: PartialLabel | None = None
) -> dict[str, Any]:
    """Return what one case contributes to the fingerprint.

    Args:
        images: image files, one per channel.
        label: segmentation file of a labelled case, None for an unlabelled one.
        reader: nnU-Net's reader class.
        num_samples: foreground intensities to sample per channel.
        reading: how the label is read if it is annotated in part only.

    Returns:
        `shape` (X, Y, Z) after cropping to the non-zero region, `spacing` in mm, `relative_size` after cropping, and
        for labelled cases `intensities`, per channel a float array (num_samples,), and the foreground `label_values`.
    """
    data, properties = reader().read_images(images)
    box = nonzero_box(data)
    cropped = data[(slice(None), *box)]
    intensities, values = None, []
    if label is not None:
        labels = reader().read_seg(label)[0][0][box]
        labels = reading.read(labels) if reading else labels
        foreground = labels > 0
        intensities = _sample(cropped, foreground, num_samples)
        values = [int(value) for value in np.unique(labels[foreground]) if np.isfinite(value)]
    return {
        "shape": list(cropped.shape[1:]),
        "spacing": [float(length) for length in properties["spacing"]],
        "relative_size": float(np.prod(cropped.shape[1:]) / np.prod(data.shape[1:])),
        "intensities": intensities,
        "label_values": values,
    }


def _sample(image: np.ndarray, foreground: np.ndarray, number: int) -> list[np.ndarray]:
    """Return `number` intensities of the foreground per channel, with repetitions, drawn as nnU-Net draws them."""
    random = np.random.RandomState(_SEED)
    values = (channel[foreground] for channel in image)
    return [random.choice(found, number, replace=True) if len(found) else found for found in values]


def _intensity_statistics(intensities: list[list[np.ndarray]], dataset: RawDataset) -> dict[str, dict[str, float]]:
    statistics = {}
    for channel in range(dataset.num_channels):
        values = np.concatenate([np.asarray(case[channel], dtype=np.float32) for case in intensities])
        if not len(values):
            raise DatasetError(
                f"{dataset.name}: none of the {len(intensities)} labelled cases has a foreground voxel; "
                "choose other cases with --labeled_list or another --seed."
            )
        low, median, high = np.percentile(values, PERCENTILES)
        statistics[str(channel)] = {
            "mean": float(np.mean(values)),
            "median": float(median),
            "std": float(np.std(values)),
            "min": float(np.min(values)),
            "max": float(np.max(values)),
            "percentile_99_5": float(high),
            "percentile_00_5": float(low),
        }
    return statistics


def _key(dataset: RawDataset) -> str:
    """Return a hash of everything the fingerprint depends on; labels outside the budget are not even looked at."""
    files = {
        name: [file_signature(path) for path in (*case.images, *([case.label] if case.label else []))]
        for name, case in dataset.cases.items()
    }
    settings = [TOTAL_SAMPLES, MAX_SAMPLES_PER_CASE, dataset.num_channels, dataset.dataset_json.get("file_ending")]
    reader = dataset.dataset_json.get("overwrite_image_reader_writer")
    readings = {name: reading.replaced for name, reading in label_readings(dataset).items()}
    return content_hash([files, sorted(dataset.labeled), settings, reader, *([readings] if readings else [])])
