from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine.labels import annotated, one_hot


@pytest.fixture
def label_manager(tiny_dataset):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    def get(variant):
        dataset = tiny_dataset(variant)
        return PlansManager(dataset.plans()).get_label_manager(dataset.dataset_json())

    return get


def test_a_label_map_becomes_one_channel_per_class(label_manager):
    target = torch.tensor([0, 1, 2]).view(1, 1, 1, 3)
    assert torch.equal(one_hot(target, label_manager("standard"))[0, :, 0], torch.eye(3))
    assert annotated(target, label_manager("standard")).all()


def test_the_ignore_label_is_in_no_channel_and_not_annotated(label_manager):
    manager = label_manager("ignore")
    target = torch.tensor([0, 1, manager.ignore_label]).view(1, 1, 1, 3)
    spread = one_hot(target, manager)
    assert spread.shape[1] == manager.num_segmentation_heads
    assert spread.sum(dim=1).flatten().tolist() == [1, 1, 0]
    assert annotated(target, manager).flatten().tolist() == [True, True, False]


def test_regions_stay_as_they_are(label_manager):
    manager = label_manager("regions")
    target = torch.tensor([[1, 0], [1, 1]]).view(1, 2, 1, 2)
    assert torch.equal(one_hot(target, manager), target.float())
    assert annotated(target, manager).all()


def test_the_last_channel_of_regions_with_an_ignore_label_says_what_to_ignore(label_manager):
    manager = label_manager("regions_and_ignore")
    target = torch.tensor([[1, 1], [1, 0], [0, 1]]).view(1, 3, 1, 2)
    assert one_hot(target, manager)[0, :, 0].tolist() == [[1, 0], [1, 0]]
    assert annotated(target, manager).flatten().tolist() == [True, False]
