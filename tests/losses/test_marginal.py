"""The marginal loss under nnU-Net's own: what it asks of a class that a patch does not annotate, which is nothing."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor

from lgssl_nnunet.losses.language import class_map_loss
from lgssl_nnunet.losses.marginal import certain_labels, marginal_logits

SHAPE = (3, 4, 5)
# Patch 0 annotates class 1 only, patch 1 everything, patch 2 class 2 only.
KNOWN = torch.tensor([[True, True, False, False], [True] * 4, [True, False, True, False]])
BATCH_DICE = pytest.mark.parametrize("batch_dice", [False, True])


def stock_loss(batch_dice: bool = False, ignore: int | None = None, dice: float = 1) -> DC_and_CE_loss:
    options = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(options, {}, weight_dice=dice, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


def stock_region_loss(batch_dice: bool, ignore: bool) -> DC_and_BCE_loss:
    options = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": True, "ddp": False}
    return DC_and_BCE_loss({}, options, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


def some_logits(scale: float = 2.0, channels: int = 4) -> Tensor:
    return (scale * torch.randn(3, channels, *SHAPE, generator=torch.Generator().manual_seed(1))).requires_grad_()


def some_target(known: Tensor = KNOWN) -> Tensor:
    """A label map without classes that a patch does not annotate."""
    target = torch.randint(0, 4, (3, 1, *SHAPE), generator=torch.Generator().manual_seed(2))
    for patch, row in zip(target, known, strict=True):
        for label in range(1, 4):
            if not row[label]:
                patch[patch == label] = 0
    return target.float()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# -------------------------------------------------------------------------------------- classes that exclude each other


@BATCH_DICE
@pytest.mark.parametrize("ignore", [None, 4])
@pytest.mark.parametrize("scale", [2.0, 60.0])
def test_no_gradient_moves_probability_between_background_and_a_class_not_annotated(batch_dice, ignore, scale):
    logits, target, loss = some_logits(scale), some_target(), stock_loss(batch_dice, ignore)
    if ignore:
        target[:, :, 0] = ignore
    found = gradient(loss(marginal_logits(logits, KNOWN, True), target), logits)
    p = torch.softmax(logits.detach().double(), dim=1)
    assert bool(torch.isfinite(found).all())
    for patch, label in ((0, 2), (0, 3), (2, 1), (2, 3)):
        background, other = found[patch, 0].double(), found[patch, label].double()
        # The direction in which background loses what the class gains, for which nothing is left.
        moved = p[patch, label] * background - p[patch, 0] * other
        assert float(moved.abs().max()) <= 1e-6 * float(found[patch].abs().max())


@BATCH_DICE
def test_background_and_a_class_not_annotated_change_places_and_the_loss_is_the_same_to_the_bit(batch_dice):
    logits, target, loss = some_logits().detach(), some_target(), stock_loss(batch_dice)
    exchanged = logits.clone()
    exchanged[0, [0, 2]] = logits[0, [2, 0]]
    before, after = (loss(marginal_logits(z, KNOWN, True), target) for z in (logits, exchanged))
    assert torch.equal(before, after)
    assert not torch.equal(loss(logits, target), loss(exchanged, target))


def test_it_is_nnunets_loss_of_the_classes_merged_by_hand():
    logits = some_logits(channels=3)
    known = torch.tensor([[True, True, False]] * 3)
    target = some_target(torch.tensor([[True, True, False, False]] * 3))
    by_hand = torch.stack([torch.logsumexp(logits[:, [0, 2]], dim=1), logits[:, 1]], dim=1)
    marginal = marginal_logits(logits, known, True)
    cross_entropy = [stock_loss(dice=0)(z, target) for z in (marginal, by_hand)]
    torch.testing.assert_close(*cross_entropy)
    torch.testing.assert_close(*(gradient(loss, logits) for loss in cross_entropy))
    # nnU-Net's Dice is the mean over the foreground classes, and that of a class which is never there is 1.
    whole = [stock_loss()(z, target) for z in (marginal, by_hand)]
    dice = [loss - part for loss, part in zip(whole, cross_entropy, strict=True)]
    torch.testing.assert_close(dice[0], (dice[1] - 1) / 2)


def test_complete_patches_are_left_alone_to_the_bit():
    logits, target, loss = some_logits(), some_target(), stock_loss()
    merged = marginal_logits(logits, KNOWN, True)
    assert torch.equal(merged[1], logits[1])
    assert torch.equal(marginal_logits(logits, torch.ones_like(KNOWN), True), logits)
    assert torch.equal(gradient(loss(merged, target), logits)[1], gradient(loss(logits, target), logits)[1])


@BATCH_DICE
def test_what_is_annotated_is_learnt(batch_dice):
    logits, target, loss = some_logits(), some_target(), stock_loss(batch_dice)
    found = gradient(loss(marginal_logits(logits, KNOWN, True), target), logits)
    liver = target[0, 0] == 1
    assert float(found[0, 1][liver].max()) < 0 < float(found[0, 1][~liver].min())
    for label in (0, 2, 3):  # which are not the liver, whatever they are
        assert float(found[0, label][~liver].max()) < 0 < float(found[0, label][liver].min())


def test_a_patch_that_does_not_annotate_a_class_counts_nothing_in_the_dice_of_the_batch():
    logits, target = some_logits(), some_target()
    loss = stock_loss(batch_dice=True)
    for label, patches in ((1, [0, 1]), (2, [1, 2]), (3, [1])):
        p = torch.softmax(marginal_logits(logits, KNOWN, True), dim=1)[:, label]
        where = target[:, 0] == label
        expected = (2 * p[patches][where[patches]].sum() + 1e-5) / (p[patches].sum() + where[patches].sum() + 1e-5)
        one = torch.zeros_like(KNOWN, dtype=torch.float)
        one[:, label] = 1
        options = {"batch_dice": True, "smooth": 1e-5, "do_bg": True, "ddp": False}
        found = MemoryEfficientSoftDiceLoss(**options)(p[:, None], where[:, None].float())
        torch.testing.assert_close(-found, expected)
    assert math.isfinite(float(loss(marginal_logits(logits, KNOWN, True), target).detach()))


# ------------------------------------------------------------------------------------------------------------- regions


@BATCH_DICE
@pytest.mark.parametrize("ignore", [False, True])
def test_regions_that_a_patch_does_not_annotate_get_no_gradient_at_all(batch_dice, ignore):
    logits, loss = some_logits(), stock_region_loss(batch_dice, ignore)
    known = KNOWN.clone()
    known[0, 0] = False  # no channel is background here
    target = torch.rand(3, 4 + ignore, *SHAPE, generator=torch.Generator().manual_seed(3)).round()
    target[:, :4] *= known[..., None, None, None]
    found = gradient(loss(marginal_logits(logits, known, False), target), logits)
    complete = gradient(loss(logits, target), logits)
    assert float(found[~known].abs().max()) == 0
    assert bool(torch.isfinite(found).all())
    assert float(complete[~known].abs().max()) > 0
    if not batch_dice:
        assert torch.equal(found[known], complete[known])


# ----------------------------------------------------------------------------------------------------- ties to words


@pytest.mark.parametrize("exclusive", [True, False])
def test_class_maps_are_merged_in_the_same_way(exclusive):
    logits, target = some_logits(), some_target()
    labels = torch.zeros(3, 4, *SHAPE).scatter_(1, target.long(), 1.0)
    labels *= 1 if exclusive else KNOWN[..., None, None, None]
    everywhere = torch.ones(3, 1, *SHAPE, dtype=torch.bool)
    found = class_map_loss([logits], labels, everywhere, exclusive, KNOWN)
    complete = class_map_loss([logits[1:2]], labels[1:2], everywhere[1:2], exclusive)
    alone = class_map_loss([logits[1:2]], labels[1:2], everywhere[1:2], exclusive, KNOWN[1:2])
    assert torch.equal(complete, alone)
    slope = gradient(found, logits)
    if exclusive:
        p = torch.softmax(logits.detach(), dim=1)
        moved = p[0, 2] * slope[0, 0] - p[0, 0] * slope[0, 2]
        assert float(moved.abs().max()) <= 1e-6 * float(slope.abs().max())
    else:
        assert float(slope[~KNOWN].abs().max()) == 0


def test_the_background_of_partly_annotated_patches_is_uncertain():
    labels = torch.zeros(3, 4, *SHAPE).scatter_(1, some_target().long(), 1.0)
    certain = certain_labels(labels, KNOWN, True)
    assert float(certain[[0, 2], 0].abs().max()) == 0
    assert torch.equal(certain[1], labels[1])
    assert torch.equal(certain[:, 1:], labels[:, 1:])
    assert certain_labels(labels, None, True) is labels
    assert certain_labels(labels, KNOWN, False) is labels
