"""A merged dataset is planned for the images of its largest source."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import SimpleITK as sitk

from lgssl_nnunet.plans.cases import Case, RawDataset
from lgssl_nnunet.plans.merged_planning import fingerprint_to_plan_for
from lgssl_nnunet.plans.planner import LGSSLPlannerCPU, make_plans

LARGE, SMALL = ("Dataset001_Large", (88, 155, 200), 1.25), ("Dataset002_Small", (36, 51, 35), 1.0)


def merged(*sources, number=3):
    """Return a merged dataset and its fingerprint; there is one more case of each source than of the one before."""
    counts = {source: number + more for more, source in enumerate(sources)}
    cases = {
        f"{source[0]}_{n}": Case(f"{source[0]}_{n}", (Path(f"{source[0]}_{n}_0000.nii.gz"),))
        for source in sources
        for n in range(counts[source])
    }
    described = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "atrium": 1},
        "file_ending": ".nii.gz",
        "merged": {"cases": {source[0]: {} for source in sources}},
    }
    dataset = RawDataset(Path("Dataset600_Merged"), "Dataset600_Merged", described, {}, dict(sorted(cases.items())))
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
    of_case = {name: source for source in sources for name in cases if name.startswith(source[0])}
    fingerprint = {
        "shapes_after_crop": [list(of_case[name][1]) for name in dataset.cases],
        "spacings": [[of_case[name][2]] * 3 for name in dataset.cases],
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }
    return dataset, fingerprint


@pytest.mark.parametrize("order", [(LARGE, SMALL), (SMALL, LARGE)])
def test_plans_are_those_of_the_largest_source_alone(order, caplog):
    caplog.set_level(logging.WARNING)
    dataset, fingerprint = merged(*order)
    planned = fingerprint_to_plan_for(dataset, fingerprint)
    assert {tuple(shape) for shape in planned["shapes_after_crop"]} == {LARGE[1]}
    assert {tuple(spacing) for spacing in planned["spacings"]} == {(1.25, 1.25, 1.25)}
    assert (
        planned["foreground_intensity_properties_per_channel"]
        == fingerprint["foreground_intensity_properties_per_channel"]
    )
    assert "Dataset001_Large 88 x 155 x 200, Dataset002_Small 36 x 51 x 35" in caplog.text or order[0] is SMALL
    assert "planned for Dataset001_Large" in caplog.text


def test_the_patch_fits_the_largest_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nnU-Net opens the first image to choose its reader
    sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkFloat32), "Dataset001_Large_0_0000.nii.gz")
    together, alone = merged(LARGE, SMALL, number=10), merged(LARGE, number=10)
    patches = [
        make_plans(*case, LGSSLPlannerCPU, "Name")["configurations"]["3d_fullres"]["patch_size"]
        for case in (together, alone)
    ]
    assert patches[0] == patches[1] == [48, 80, 96]


def test_sources_of_like_size_are_planned_together(caplog):
    dataset, fingerprint = merged(LARGE, ("Dataset003_Other", (100, 150, 150), 1.0))
    assert fingerprint_to_plan_for(dataset, fingerprint) is fingerprint
    assert not caplog.text


@pytest.mark.parametrize("entry", [None, True, [], {}, {"cases": 3}])
def test_other_datasets_are_planned_as_they_are(entry):
    dataset, fingerprint = merged(LARGE, SMALL)
    dataset.dataset_json["merged"] = entry
    assert fingerprint_to_plan_for(dataset, fingerprint) is fingerprint
