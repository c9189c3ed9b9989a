"""The phantom: what the demo and the other tests stand on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.phantom import GALLBLADDER, IGNORE, LIVER, SPACING, PhantomSpec, draw_case, write_phantom_dataset
from lgssl_nnunet.text.bank import EmbeddingBank
from lgssl_nnunet.text.prompts import build_prompts

TINY = PhantomSpec(num_labeled=2, num_unlabeled=1, num_test=1, shape=(24, 28, 24))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_phantom_dataset(tmp_path_factory.mktemp("raw"), TINY)


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def test_layout_is_that_of_a_raw_nnunet_dataset_with_unlabeled_images(tiny):
    assert tiny.name == "Dataset999_Phantom"
    assert files(tiny / "imagesTr") == ["labeled_000_0000.nii.gz", "labeled_001_0000.nii.gz"]
    assert files(tiny / "labelsTr") == ["labeled_000.nii.gz", "labeled_001.nii.gz"]
    assert files(tiny / "imagesUn") == ["unlabeled_000_0000.nii.gz"]
    assert files(tiny / "imagesTs") == ["test_000_0000.nii.gz"]
    assert files(tiny / "labelsTs") == ["test_000.nii.gz"]
    assert files(tiny) == ["dataset.json", "imagesTr", "imagesTs", "imagesUn", "labelsTr", "labelsTs"]


def test_dataset_json_names_channels_labels_and_a_prompt_for_each_class(tiny):
    description = json.loads((tiny / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "MRI"}
    assert description["labels"] == {"background": 0, "liver": 1, "gallbladder": 2}
    assert set(description["prompts"]) == {"liver", "gallbladder"}
    assert description["numTraining"] == 2
    assert description["file_ending"] == ".nii.gz"


def test_prompts_of_the_phantom_are_in_the_shipped_bank(tiny):
    prompts = build_prompts(json.loads((tiny / "dataset.json").read_text()))
    bank = EmbeddingBank.load()
    assert [bank.lookup(prompt) is not None for prompt in prompts] == [True] * 3


def test_images_and_segmentations_share_a_geometry_that_is_not_the_default(tiny):
    for case in ("labeled_000", "labeled_001"):
        image = sitk.ReadImage(str(tiny / "imagesTr" / f"{case}_0000.nii.gz"))
        segmentation = sitk.ReadImage(str(tiny / "labelsTr" / f"{case}.nii.gz"))
        assert image.GetSize() == segmentation.GetSize() == (24, 28, 24)
        np.testing.assert_allclose(image.GetSpacing(), SPACING, rtol=1e-5)
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(image, get)(), getattr(segmentation, get)(), rtol=1e-6)
        assert np.abs(image.GetOrigin()).min() > 0.1
        assert not np.allclose(image.GetDirection(), np.eye(3).ravel(), atol=1e-3)


def test_every_case_shows_both_organs_and_they_touch():
    for seed in range(3):
        for kind in ("labeled", "unlabeled", "test"):
            for index in range(4):
                segmentation = draw_case(PhantomSpec(shape=TINY.shape, seed=seed), kind, index).segmentation
                assert min((segmentation == LIVER).sum(), (segmentation == GALLBLADDER).sum()) > 20
                around_liver = ndimage.binary_dilation(segmentation == LIVER)
                assert (around_liver & (segmentation == GALLBLADDER)).any()


def test_the_same_seed_draws_the_same_case_and_another_seed_another():
    first, again = draw_case(TINY, "labeled", 0), draw_case(TINY, "labeled", 0)
    other = draw_case(PhantomSpec(shape=TINY.shape, seed=1), "labeled", 0)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.segmentation, again.segmentation)
    assert (first.segmentation != other.segmentation).any()


def test_cases_of_different_kind_and_number_differ():
    cases = [draw_case(TINY, kind, index).segmentation for kind in ("labeled", "unlabeled", "test") for index in (0, 1)]
    for i, first in enumerate(cases):
        assert all((first != second).any() for second in cases[:i])


def test_a_written_case_does_not_depend_on_how_many_there_are(tiny, tmp_path):
    more = write_phantom_dataset(tmp_path, PhantomSpec(num_labeled=3, num_unlabeled=0, num_test=0, shape=TINY.shape))
    for file in ("imagesTr/labeled_001_0000.nii.gz", "labelsTr/labeled_001.nii.gz"):
        first, second = sitk.ReadImage(str(tiny / file)), sitk.ReadImage(str(more / file))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
        assert first.GetOrigin() == second.GetOrigin()
    assert not (more / "imagesUn").exists()


def test_contrast_between_the_organs_varies_in_sign():
    signs = set()
    for index in range(12):
        case = draw_case(TINY, "unlabeled", index)
        signs.add(np.sign(case.image[0][case.segmentation == 1].mean() - case.image[0][case.segmentation == 2].mean()))
    assert signs == {-1.0, 1.0}


def test_two_channels_show_one_anatomy_with_two_contrasts(tmp_path):
    spec = PhantomSpec(num_labeled=1, num_unlabeled=0, num_test=0, shape=TINY.shape, num_channels=2)
    dataset = write_phantom_dataset(tmp_path, spec)
    assert files(dataset / "imagesTr") == ["labeled_000_0000.nii.gz", "labeled_000_0001.nii.gz"]
    assert len(json.loads((dataset / "dataset.json").read_text())["channel_names"]) == 2
    image = draw_case(spec, "labeled", 0).image
    assert image.shape == (2, *TINY.shape)
    assert np.corrcoef(image[0].ravel(), image[1].ravel())[0, 1] > 0.5
    assert (image[0] != image[1]).any()


def test_a_two_dimensional_phantom_is_written_as_two_dimensional_images(tmp_path):
    spec = PhantomSpec(num_labeled=1, num_unlabeled=1, num_test=0, shape=(48, 56), dataset_id=7)
    dataset = write_phantom_dataset(tmp_path, spec)
    image = sitk.ReadImage(str(dataset / "imagesTr" / "labeled_000_0000.nii.gz"))
    assert dataset.name == "Dataset007_Phantom"
    assert image.GetSize() == (56, 48)
    np.testing.assert_allclose(image.GetSpacing(), SPACING[:2], rtol=1e-5)


def test_regions_overlap_and_bring_an_order(tmp_path):
    spec = PhantomSpec(num_labeled=1, num_unlabeled=0, num_test=0, shape=TINY.shape, regions=True)
    description = json.loads((write_phantom_dataset(tmp_path, spec) / "dataset.json").read_text())
    assert description["labels"]["liver"] == [1, 2]
    assert description["labels"]["gallbladder"] == [2]
    assert description["regions_class_order"] == [1, 2]


def test_the_ignore_label_is_the_highest_and_covers_slices_of_labeled_cases_only(tmp_path):
    spec = PhantomSpec(num_labeled=1, num_unlabeled=0, num_test=1, shape=TINY.shape, ignore=True)
    dataset = write_phantom_dataset(tmp_path, spec)
    labeled = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "labelsTr" / "labeled_000.nii.gz")))
    test = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "labelsTs" / "test_000.nii.gz")))
    assert json.loads((dataset / "dataset.json").read_text())["labels"]["ignore"] == IGNORE
    assert set(np.unique(labeled)) == {0, LIVER, GALLBLADDER, IGNORE}
    assert (labeled == IGNORE).mean() == pytest.approx(0.25)
    assert IGNORE not in test


@pytest.mark.parametrize("wrong", [{"shape": (8, 40, 40)}, {"shape": (40,)}, {"num_labeled": -1}, {"num_channels": 0}])
def test_a_phantom_that_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(UsageError, match="phantom"):
        PhantomSpec(**wrong)
