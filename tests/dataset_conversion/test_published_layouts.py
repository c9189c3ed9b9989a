"""Downloads in their official layouts, made by the benchmark's code: converted, planned, and checked by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.datasets import convert_dataset
from lgssl_nnunet.plans.plan import plan_and_preprocess

SIZES = [(56, 48, 36), (64, 48, 40), (72, 52, 44)]
SPACINGS = [(1.0, 1.0, 1.8), (1.0, 1.0, 2.0), (1.0, 1.0, 2.4)]
# By hand. Spacing: the median of the three, as the ratio of 2 is below nnU-Net's limit of 3 for anisotropic images.
# Their shapes at 2 mm along z are 36 x 1.8 / 2 = 32, 40 and 44 x 2.4 / 2 = 53; the median case is 40 x 48 x 64.
SPACING = [2.0, 1.0, 1.0]
MEDIAN_SHAPE = [40, 48, 64]
# Patch: all of it, 122,880 of the 400,000 voxels that LGSSLPlannerCPU allows. Pooling halves z from the second time on
# (2 mm against 1 mm) and no axis below 4: z 40-20-10-5, y 48-24-12-6, x 64-32-16-8-4, so 40, 48 and 64 stay.
PATCH = [40, 48, 64]
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 1, 2]]


@pytest.fixture(scope="module")
def layouts():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "published_layouts.py"
    spec = importlib.util.spec_from_file_location("published_layouts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def volumes(layouts):
    published = zip(SIZES, SPACINGS, strict=True)
    return [layouts.made_up_abdomen(size, spacing, seed) for seed, (size, spacing) in enumerate(published)]


@pytest.mark.parametrize(
    ("dataset", "first", "organ"),
    [("Pancreas", "pancreas_0001", "pancreas"), ("BTCV", "btcv_0001", "liver"), ("LiTS", "liver_001", "liver")],
)
def test_an_official_download_converts_and_plans_as_calculated(
    layouts, volumes, dataset, first, organ, tmp_path, monkeypatch
):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    layouts.write_download(dataset, tmp_path / "download", volumes)
    target = convert_dataset(dataset, tmp_path / "download", num_processes=0, progress=False)
    image, masks = volumes[0]
    stored = sitk.ReadImage(str(target / "imagesTr" / f"{first}_0000.nii.gz"))
    label = sitk.ReadImage(str(target / "labelsTr" / f"{first}.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(stored), sitk.GetArrayFromImage(image))
    value = json.loads((target / "dataset.json").read_text())["labels"][organ]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label) == value, masks[organ])
    assert stored.GetSpacing() == pytest.approx(image.GetSpacing())

    (file,) = plan_and_preprocess(
        [target.name],
        planner="LGSSLPlannerCPU",
        preprocess=False,
        num_processes_fingerprint=0,
        progress=False,
    )
    plans = json.loads(file.read_text())
    planned = plans["configurations"]["3d_fullres"]
    assert planned["spacing"] == pytest.approx(SPACING)
    assert planned["median_image_size_in_voxels"] == MEDIAN_SHAPE
    assert planned["patch_size"] == PATCH
    assert planned["architecture"]["arch_kwargs"]["strides"] == STRIDES
    assert planned["normalization_schemes"] == ["CTNormalization"]
    voxels = np.concatenate([of_classes(layouts, dataset, *volume) for volume in volumes])
    statistics = plans["foreground_intensity_properties_per_channel"]["0"]
    assert statistics["mean"] == pytest.approx(voxels.mean(), abs=1)
    assert statistics["percentile_00_5"] == pytest.approx(np.percentile(voxels, 0.5), abs=3)
    assert statistics["percentile_99_5"] == pytest.approx(np.percentile(voxels, 99.5), abs=3)


def of_classes(layouts, dataset, image, masks):
    """Return the HU of a dataset's classes in one volume, repeated to a fixed number: nnU-Net weights cases equally."""
    names = {"Pancreas": ["pancreas"], "BTCV": list(layouts.BTCV_VALUES), "LiTS": ["liver", "tumour"]}[dataset]
    return np.resize(sitk.GetArrayFromImage(image)[np.any([masks[name] for name in names], axis=0)], 200_000)
