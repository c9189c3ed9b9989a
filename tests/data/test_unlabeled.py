"""The unlabelled stream: images without a segmentation in nnU-Net's own loader."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lgssl_nnunet.data.unlabeled import UnlabeledDataset, UnlabeledLoader

CASES = [f"unlabeled_{number:03d}" for number in range(4)]


@pytest.fixture
def dataset(tiny_dataset):
    plans = tiny_dataset().plans()
    identifier = plans["configurations"]["3d_fullres"]["data_identifier"]
    return UnlabeledDataset(str(tiny_dataset().preprocessed / f"{identifier}_unlabeled"))


@pytest.fixture
def loader(dataset, tiny_dataset):
    def make(variant: str = "standard", patch: tuple[int, ...] = (16, 16, 16), batch_size: int = 3) -> UnlabeledLoader:
        labels = PlansManager(tiny_dataset().plans()).get_label_manager(tiny_dataset(variant).dataset_json())
        return UnlabeledLoader(dataset, batch_size, patch, patch, labels)

    return make


def test_it_finds_every_case_in_alphabetical_order(dataset):
    assert dataset.identifiers == CASES


def test_a_case_is_an_image_with_a_constant_segmentation_that_takes_no_memory(dataset):
    image, segmentation, previous, properties = dataset.load_case(CASES[0])
    assert image.shape == (1, 20, 24, 24)
    assert segmentation.shape == image.shape
    assert set(np.unique(segmentation)) == {-1}
    assert not any(segmentation.strides)
    assert previous is None
    assert properties["class_locations"] is None
    assert "spacing" in properties


def test_no_segmentation_file_is_needed(dataset):
    from pathlib import Path

    assert not list(Path(dataset.source_folder).glob("*_seg*"))
    for case in CASES:
        dataset.load_case(case)


def test_a_batch_comes_without_foreground_oversampling(loader):
    made = loader()
    assert not any(made.get_do_oversample(index) for index in range(made.batch_size))
    batch = made.generate_train_batch()
    assert batch["data"].shape == (3, 1, 16, 16, 16)
    assert set(batch["keys"]) <= set(CASES)


def test_an_ignore_label_of_the_dataset_does_not_matter(loader):
    made = loader("ignore")
    assert made.has_ignore is False
    assert made.generate_train_batch()["data"].shape == (3, 1, 16, 16, 16)


def test_a_patch_may_be_two_dimensional(loader):
    assert loader(patch=(16, 16)).generate_train_batch()["data"].shape == (3, 1, 16, 16)


def test_crops_are_spread_over_the_whole_image(loader):
    made = loader(patch=(8, 8, 8))
    np.random.seed(0)
    corners = np.array([made.get_bbox(np.array((20, 24, 24)), False, None)[0] for _ in range(300)])
    assert corners.min(0).tolist() == [0, 0, 0]
    assert corners.max(0).tolist() == [12, 16, 16]


def test_a_patch_larger_than_the_image_is_padded(loader):
    assert loader(patch=(32, 32, 32)).generate_train_batch()["data"].shape == (3, 1, 32, 32, 32)
