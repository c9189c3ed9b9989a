from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn import functional

from lgssl_nnunet.losses.weighted import weighted_cross_entropy, weighted_dice, weighted_dice_and_cross_entropy


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def classes(shape=(2, 5, 6), number=3):
    return functional.one_hot(torch.randint(0, number, shape), number).movedim(-1, 1).float()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_with_equal_weights_it_is_nnunets_loss_but_for_the_constant_one(batch_dice):
    logits, target = torch.randn(2, 3, 5, 6), classes()
    target[0, 0], target[0, 1:] = 1, 0  # a class that one sample lacks tells the two forms of Dice apart
    settings = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(settings, {}, dice_class=MemoryEfficientSoftDiceLoss)
    expected = stock(logits, target.argmax(dim=1, keepdim=True)) + 1
    found = weighted_dice_and_cross_entropy(logits, target, torch.ones(2, 1, 5, 6), False, batch_dice)
    torch.testing.assert_close(found, expected)


def test_regions_with_equal_weights_are_nnunets_loss_but_for_the_constant_one():
    logits, target = torch.randn(2, 3, 5, 6), torch.randint(0, 2, (2, 3, 5, 6)).float()
    settings = {"batch_dice": False, "smooth": 1e-5, "do_bg": True, "ddp": False}
    stock = DC_and_BCE_loss({}, settings, dice_class=MemoryEfficientSoftDiceLoss)
    found = weighted_dice_and_cross_entropy(logits, target, torch.ones(2, 1, 5, 6), True)
    torch.testing.assert_close(found, stock(logits, target) + 1)


def test_a_mask_is_nnunets_ignore_label():
    logits, target = torch.randn(2, 3, 5, 6), classes()
    mask = torch.rand(2, 1, 5, 6) > 0.3
    settings = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(settings, {}, ignore_label=9, dice_class=MemoryEfficientSoftDiceLoss)
    ignored = torch.where(mask, target.argmax(dim=1, keepdim=True), 9)
    found = weighted_dice_and_cross_entropy(logits, target, mask, False)
    torch.testing.assert_close(found, stock(logits, ignored) + 1)


def test_weights_times_a_constant_change_nothing():
    logits, target, weight = torch.randn(2, 3, 5, 6), classes(), torch.rand(2, 1, 5, 6)
    once, thrice = (weighted_cross_entropy(logits, target, factor * weight, False) for factor in (1, 3))
    torch.testing.assert_close(once, thrice)
    once, thrice = (weighted_dice(logits.softmax(1), target, factor * weight, False) for factor in (1, 3))
    torch.testing.assert_close(once, thrice, rtol=1e-4, atol=1e-5)


def test_voxels_of_weight_zero_get_no_gradient():
    logits, target = torch.randn(2, 3, 5, 6, requires_grad=True), classes()
    weight = torch.zeros(2, 1, 5, 6)
    weight[:, :, 2] = 1
    weighted_dice_and_cross_entropy(logits, target, weight, False).backward()
    per_row = logits.grad.abs().sum(dim=(0, 1, 3))
    assert per_row[2] > 0
    assert per_row.sum() == per_row[2]


@pytest.mark.parametrize("has_regions", [False, True])
def test_no_weight_at_all_is_a_loss_of_zero_without_gradient(has_regions):
    logits = torch.randn(2, 3, 5, 6, requires_grad=True)
    loss = weighted_dice_and_cross_entropy(logits, classes(), torch.zeros(2, 1, 5, 6), has_regions)
    loss.backward()
    assert loss.item() == pytest.approx(0)
    assert logits.grad.abs().max() == 0
