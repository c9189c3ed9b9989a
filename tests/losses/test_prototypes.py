from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.losses.prototypes import class_prototypes, prototype_consistency

SHAPES = [(6, 6, 6), (8, 6)]


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def random_mask(shape, samples=2, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return one_hot(torch.randint(0, classes, (samples, *shape), generator=generator), classes)


def line(*rows: list[float]) -> torch.Tensor:
    """(B, 1, 1, V): one row per sample."""
    return torch.tensor(rows)[:, None, None]


# Two samples of four voxels, one feature, two classes; the second sample has one voxel of class 1.
FEATURE = line([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 20.0])
LABELS = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])[:, None]
MASK = one_hot(LABELS, 2)


# ----------------------------------------------------------------------------------------------------------- prototypes


def test_sample_prototypes_are_means_over_the_class_averaged_over_samples():
    found, present = class_prototypes(FEATURE, MASK, "sample", 1)
    # Class 0: means 2 and 4; class 1: means 6 and 20.
    assert found.flatten().tolist() == pytest.approx([3.0, 13.0])
    assert found.shape == (1, 2, 1)
    assert present.tolist() == [[True, True]]


def test_batch_prototypes_are_sums_over_the_size_of_the_class_in_the_batch():
    found, present = class_prototypes(FEATURE, MASK, "batch", 1)
    # Class 0 has 5 voxels, class 1 has 3.
    assert found[..., 0].tolist() == [pytest.approx([4 / 5, 12 / 3]), pytest.approx([12 / 5, 20 / 3])]
    assert present.all()
    # Over samples they add up to the class mean over the batch.
    assert found.sum(dim=0).flatten().tolist() == pytest.approx([16 / 5, 32 / 3])


def test_soft_masks_weigh_voxels():
    found, _ = class_prototypes(line([1.0, 5.0]), line([1.0, 0.25]), "sample", 1)
    assert found.item() == pytest.approx((1 + 0.25 * 5) / 1.25)


def test_samples_without_a_class_do_not_count():
    found, present = class_prototypes(FEATURE, MASK, "sample", 2)
    assert found.flatten().tolist() == pytest.approx([3.0, 6.0])
    assert present.all()
    assert class_prototypes(FEATURE, MASK, "sample", 3)[1].tolist() == [[True, False]]
    assert class_prototypes(FEATURE, MASK, "batch", 2)[1].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_feature_is_the_prototype_of_every_class(shape):
    constant = torch.tensor([2.0, -1.0]).view(1, 2, *[1] * len(shape)).expand(2, 2, *shape)
    soft = torch.softmax(torch.randn(2, 3, *shape), dim=1)
    for mask in (random_mask(shape), soft):
        found, present = class_prototypes(constant, mask, "sample", 1)
        assert present.all()
        torch.testing.assert_close(found, torch.tensor([2.0, -1.0]).expand(1, 3, 2))
    assert prototype_consistency([torch.cat([constant] * 2)], random_mask(shape), soft).item() < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_a_doubled_batch_keeps_sample_prototypes_and_halves_batch_prototypes(shape):
    feature, mask = torch.randn(2, 4, *shape), random_mask(shape)
    twice = torch.cat([feature, feature]), torch.cat([mask, mask])
    torch.testing.assert_close(
        class_prototypes(*twice, "sample", 1)[0], class_prototypes(feature, mask, "sample", 1)[0]
    )
    torch.testing.assert_close(
        class_prototypes(*twice, "batch", 1)[0][:2], class_prototypes(feature, mask, "batch", 1)[0] / 2
    )


# ---------------------------------------------------------------------------------------------------------- consistency


def test_the_consistency_is_the_mean_squared_difference_over_classes_and_channels():
    feature = torch.cat([torch.cat([FEATURE, FEATURE + 1]), torch.cat([FEATURE, FEATURE - 2])], dim=1)
    # Both prototypes move by 1 in the first channel and by 2 in the second.
    assert prototype_consistency([feature], MASK, MASK).item() == pytest.approx((1 + 4) / 2)


def test_the_published_form_compares_samples_in_pairs():
    ours, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    labels, probabilities = random_mask((4, 4)), torch.softmax(torch.randn(2, 3, 4, 4), dim=1)
    expected = 0.0
    for sample in range(2):
        for c in range(3):
            for channel in range(3):
                left, right = (
                    (f[sample, channel] * m[sample, c]).sum() / m[:, c].sum()
                    for f, m in ((ours, labels), (theirs, probabilities))
                )
                expected += float((left - right) ** 2) / 18
    found = prototype_consistency([torch.cat([ours, theirs])], labels, probabilities, "batch", min_voxels=0)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_class_that_one_side_lacks_does_not_count_unless_its_prototype_is_to_be_zero():
    without = MASK.clone()
    without[:, 1] = 0
    feature = torch.cat([FEATURE, FEATURE + 1])
    for masks in ((MASK, without), (without, MASK)):
        assert prototype_consistency([feature], *masks).item() == pytest.approx(1)
    # As published: class 1 of the other side is at 13, or at 14.
    assert prototype_consistency([feature], MASK, without, min_voxels=0).item() == pytest.approx((1 + 13**2) / 2)
    assert prototype_consistency([feature], without, MASK, min_voxels=0).item() == pytest.approx((1 + 14**2) / 2)


def test_without_a_common_class_the_term_and_its_gradient_are_zero():
    feature = torch.randn(4, 2, 4, 4, requires_grad=True)
    loss = prototype_consistency([feature], torch.zeros(2, 3, 4, 4), random_mask((4, 4)))
    loss.backward()
    assert loss == 0
    assert (feature.grad == 0).all()


def test_a_copied_batch_with_perfect_predictions_costs_nothing():
    mask = random_mask((6, 6, 6))
    features = [torch.randn(2, 4, 6, 6, 6), torch.randn(2, 8, 3, 3, 3)]
    both = [torch.cat([f, f]) for f in features]
    for denominator in ("sample", "batch"):
        assert prototype_consistency(both, mask, mask, denominator) == 0
        assert prototype_consistency(both, mask, mask.roll(1, 1), denominator) > 0


def test_numbers_of_labelled_and_unlabelled_samples_may_differ():
    feature = torch.cat([FEATURE, FEATURE[:1], FEATURE])
    repeated = torch.cat([MASK[:1], MASK])
    expected = (((2 + 2 + 4) / 3 - 3) ** 2 + ((6 + 6 + 20) / 3 - 13) ** 2) / 2
    assert prototype_consistency([feature], MASK, repeated).item() == pytest.approx(expected, rel=1e-5)


def test_scales_are_summed_with_masks_at_their_resolution():
    mask, coarse = random_mask((6, 6, 6)), random_mask((3, 6, 3), seed=1)
    fine = torch.randn(4, 4, 6, 6, 6)
    low = torch.randn(4, 8, 3, 6, 3)
    single = [prototype_consistency([feature], mask, mask).item() for feature in (fine, low)]
    assert prototype_consistency([fine, low], mask, mask).item() == pytest.approx(sum(single), rel=1e-5)
    # The nearest voxels along the axes with stride 2: the second of each pair.
    nearest = mask[:, :, 1::2, :, 1::2]
    assert single[1] == pytest.approx(prototype_consistency([low], nearest, nearest).item(), rel=1e-6)
    assert single[1] != pytest.approx(prototype_consistency([low], coarse, coarse).item(), rel=1e-3)


def test_area_keeps_a_thin_structure_that_the_nearest_voxel_misses():
    thin = torch.zeros(1, 1, 8, 8)
    thin[:, :, 2] = 1
    low = torch.arange(16.0).view(1, 1, 4, 4)
    feature = torch.cat([low, low + 3])
    assert prototype_consistency([feature], thin, thin, resize="nearest") == 0
    assert prototype_consistency([feature], thin, thin, resize="area").item() == pytest.approx(9)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_labelled_features_get_a_gradient_only_on_request(stop_gradient):
    feature = torch.randn(4, 3, 4, 4, requires_grad=True)
    probabilities = torch.softmax(torch.randn(2, 3, 4, 4), dim=1).requires_grad_()
    prototype_consistency([feature], random_mask((4, 4)), probabilities, stop_gradient=stop_gradient).backward()
    assert (feature.grad[:2] == 0).all() == stop_gradient
    assert feature.grad[2:].abs().max() > 0
    assert probabilities.grad.abs().max() > 0


@pytest.mark.parametrize("resize", ["nearest", "area"])
def test_the_predicted_mask_gets_a_gradient_through_its_resizing(resize):
    probabilities = torch.softmax(torch.randn(2, 3, 8, 8), dim=1).requires_grad_()
    prototype_consistency([torch.randn(4, 3, 4, 4)], random_mask((8, 8)), probabilities, resize=resize).backward()
    assert probabilities.grad.abs().max() > 0


def test_it_is_computed_in_fp32_within_autocast():
    feature = torch.randn(4, 3, 6, 6)
    exact = prototype_consistency([feature], random_mask((6, 6)), random_mask((6, 6), seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototype_consistency([feature], random_mask((6, 6)), random_mask((6, 6), seed=1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
