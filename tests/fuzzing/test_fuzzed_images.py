"""Images and segmentations with damaged, contradictory or absurd bytes: in planning, prediction and evaluation."""

from __future__ import annotations

import gzip
import math
import sys
from pathlib import Path

import hypothesis.strategies as st
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.integrity import check_integrity

sys.path.insert(0, str(Path(__file__).parent))
from mutations import nifti, write
from watching import attempt, fuzz

SHAPE = (6, 7, 8)
CLASSES = {"liver": 1, "tumour": 2}
ITK_EPSILON = np.finfo(float).eps
"""A smaller slope counts as none."""


def nifti_bytes(folder: Path, array: np.ndarray) -> bytes:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.25, 1.5))
    image.SetOrigin((-12.5, 40.0, 7.0))
    sitk.WriteImage(image, str(folder / "x.nii"))
    return (folder / "x.nii").read_bytes()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return nifti_bytes(tmp_path_factory.mktemp("image"), array)


@pytest.fixture(scope="module")
def label(tmp_path_factory) -> bytes:
    array = np.zeros(SHAPE, np.uint8)
    array[2:4, 2:5, 2:5], array[4, 2:5, 2:5] = 1, 2
    return nifti_bytes(tmp_path_factory.mktemp("label"), array)


def by_another_library(file: Path) -> np.ndarray:
    """The voxels of a file, scaled as its header says."""
    stored = nibabel.load(file).dataobj
    slope = stored.slope if abs(stored.slope) > ITK_EPSILON else 1
    return np.squeeze(np.asarray(stored.get_unscaled(), dtype=float) * slope + stored.inter).transpose()


def test_an_image_is_refused_or_read_as_another_library_reads_it(raw_dataset, image, label, tmp_path):
    for old in [*raw_dataset.glob("images*/*"), *raw_dataset.glob("labels*/*")]:
        old.unlink()
    write(raw_dataset / "imagesTr/a_0000.nii.gz", gzip.compress(image))
    write(raw_dataset / "labelsTr/a.nii.gz", gzip.compress(label))
    file = raw_dataset / "imagesUn/b_0000.nii.gz"

    def check():
        return check_integrity(load_raw_dataset(901), progress=False)

    def try_one(content, tally):
        write(file, content)
        if attempt(check, tmp_path, tally) is None:
            return
        voxels, properties = SimpleITKIO().read_images((str(file),))
        assert np.allclose(np.squeeze(voxels), by_another_library(file), rtol=1e-5, atol=1e-6)
        assert np.isfinite(np.concatenate([properties["spacing"], *properties["sitk_stuff"].values()])).all()
        assert min(properties["spacing"]) > 0

    fuzz("images", nifti(image), try_one)


def test_a_segmentation_is_refused_or_measured_rightly(label, tmp_path):
    files = [tmp_path / name / "a.nii.gz" for name in ("reference", "prediction")]
    dataset_json = {"labels": {"background": 0, **CLASSES}, "file_ending": ".nii.gz"}

    def measure():
        return evaluate(*(file.parent for file in files), dataset_json=dataset_json, num_processes=0, progress=False)

    def try_one(example, tally):
        changed, content = example
        for number, file in enumerate(files):
            write(file, content if number == changed else gzip.compress(label, 1))
        found = attempt(measure, tmp_path, tally, may_write=lambda file: file.name.startswith("summary"))
        for case in found["cases"] if found else ():
            reference, prediction = (np.isclose(by_another_library(file), CLASSES[case.name]) for file in files)
            total = reference.sum() + prediction.sum()
            assert (case.n_reference, case.n_prediction) == (reference.sum(), prediction.sum())
            assert total == 0 or math.isclose(case.dice, 2 * (reference & prediction).sum() / total)
            assert case.status != "measured" or all(0 <= d < math.inf for d in (case.hd95, case.assd))

    fuzz("segmentations", st.tuples(st.sampled_from([0, 1]), nifti(label)), try_one)


def test_an_image_is_refused_or_segmented_whole(trained, image, tmp_path, predict_here):
    file, output = tmp_path / "images/a_0000.nii.gz", tmp_path / "out"

    def predict():
        return predict_here(file.parent, output, overwrite=True, disable_tta=True)

    def try_one(content, tally):
        write(file, content)
        made = attempt(predict, tmp_path, tally, may_write=lambda written: written.parent == output)
        assert (output / "a.nii.gz").exists() == (made is not None)
        if made is not None:
            segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(made[0])))
            assert segmentation.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(file))).shape
            assert set(np.unique(segmentation)) <= {0, 1, 2}
            made[0].unlink()

    fuzz("images to predict", nifti(image), try_one)
