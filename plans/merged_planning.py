"""Which images of a merged dataset the plans are made for: those of its largest source.

nnU-Net plans for the median case. Where a few large scans are merged with many small ones, that is a small one, and
patches, spacing and depth of the network would not do for the large ones. To the small ones larger patches do no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from lgssl_nnunet.plans.cases import RawDataset

logger = logging.getLogger(__name__)

DIFFERENT_SIZE = 2.0
"""From this ratio of median numbers of voxels on, sources are not planned for their common median."""


def fingerprint_to_plan_for(dataset: RawDataset, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint with shapes and spacings of the images that decide patch, spacing and network.

    Args:
        dataset: the raw dataset; only one that lgssl_merge_datasets made has sources.
        fingerprint: of all its cases, in the order of `dataset.cases`.
    """
    rows = {source: found for source, found in _rows(dataset).items() if found}
    shapes = np.array(fingerprint["shapes_after_crop"])
    medians = {source: np.median(shapes[found], axis=0) for source, found in rows.items()}
    if not medians:
        return fingerprint
    voxels = {source: float(np.prod(shape)) for source, shape in medians.items()}
    largest = max(voxels, key=voxels.__getitem__)
    if voxels[largest] < DIFFERENT_SIZE * min(voxels.values()):
        return fingerprint
    sizes = ", ".join(f"{source} {' x '.join(f'{n:.0f}' for n in shape)}" for source, shape in medians.items())
    logger.warning(
        "The images of the merged datasets differ in size (median voxels: %s): spacing, patch and network are planned "
        "for %s, whose images are the largest. Choose another spacing with -overwrite_target_spacing.",
        sizes,
        largest,
    )
    return fingerprint | {
        key: [fingerprint[key][row] for row in rows[largest]] for key in ("shapes_after_crop", "spacings")
    }


def merged_from(dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the sources by whose names the cases of a merged dataset begin; none of another dataset.

    Args:
        dataset_json: content of its dataset.json.
    """
    merged = dataset_json.get("merged")
    sources = merged.get("cases") if isinstance(merged, dict) else None
    return list(sources) if isinstance(sources, dict) else []


def _rows(dataset: RawDataset) -> dict[str, list[int]]:
    """Return by source where its cases, which bear its name, are in the fingerprint's lists."""
    cases = list(enumerate(dataset.cases))
    sources = merged_from(dataset.dataset_json)
    return {source: [row for row, case in cases if case.startswith(f"{source}_")] for source in sources}
