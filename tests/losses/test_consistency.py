from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.losses.consistency import agreement, difference_agreement, distill, masked_mean, probabilities

SHAPES = [(2, 3, 2, 3, 4), (2, 1, 3, 4)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def predictions(shape, count):
    return [probabilities(torch.randn(shape), has_regions=shape[1] == 1) for _ in range(count)]


def slow_mean_square(a, b):
    pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return sum((left - right) ** 2 for left, right in pairs) / len(pairs)


def test_probabilities_are_softmax_for_classes_and_sigmoid_for_regions():
    logits = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(probabilities(logits, False).sum(1), torch.ones(2, 4, 4))
    torch.testing.assert_close(probabilities(logits, True), 1 / (1 + torch.exp(-logits)))


def test_everything_is_computed_in_fp32():
    half = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert probabilities(half, False).dtype == torch.float32
    assert probabilities(half, True).dtype == torch.float32
    assert agreement(half, half).dtype == torch.float32
    assert difference_agreement(half, half, half, half).dtype == torch.float32
    assert distill(half, half).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distill(half, half).dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_agreement_is_the_mean_squared_difference(shape):
    q1, q2 = predictions(shape, 2)
    assert agreement(q1, q2).item() == pytest.approx(slow_mean_square(q1, q2), rel=1e-5)
    assert agreement(q1, q1) == 0


def test_agreement_sends_gradient_to_both_sides():
    q1, q2 = (q.requires_grad_() for q in predictions(SHAPES[0], 2))
    agreement(q1, q2).backward()
    torch.testing.assert_close(q1.grad, -q2.grad)
    torch.testing.assert_close(q1.grad, 2 * (q1 - q2).detach() / q1.numel())


def test_a_mask_selects_entries_and_counts_every_channel():
    q1, q2 = predictions(SHAPES[0], 2)
    mask = (torch.rand(2, 1, 2, 3, 4) > 0.5).float()
    chosen = mask.expand_as(q1).bool()
    assert agreement(q1, q2, mask).item() == pytest.approx(slow_mean_square(q1[chosen], q2[chosen]), rel=1e-5)
    torch.testing.assert_close(agreement(q1, q2, torch.ones_like(mask)), agreement(q1, q2))


def test_an_empty_mask_gives_zero_and_a_zero_gradient():
    q1, q2 = (q.requires_grad_() for q in predictions(SHAPES[0], 2))
    loss = agreement(q1, q2, torch.zeros(2, 1, 2, 3, 4))
    loss.backward()
    assert loss == 0
    assert (q1.grad == 0).all()


def test_values_outside_the_mask_do_not_matter_even_if_infinite():
    values, mask = torch.tensor([1.0, 3.0, math.inf, math.nan]), torch.tensor([True, True, False, False])
    assert masked_mean(values, mask) == 2
    assert masked_mean(torch.tensor([4.0, 8.0]), torch.tensor([0.5, 1.0])).item() == pytest.approx(10 / 1.5)
    assert masked_mean(torch.tensor([4.0, 8.0]), torch.tensor([0.25, 0.0])) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_difference_term_is_what_it_says_and_obeys_its_identity(shape):
    p1, q1, p2, q2 = predictions(shape, 4)
    loss = difference_agreement(p1, q1, p2, q2).item()
    assert loss == pytest.approx(slow_mean_square(p1 - q1, p2 - q2), rel=1e-5)
    on_labelled, on_unlabelled = p1 - p2, q1 - q2
    identity = on_labelled.square().mean() + on_unlabelled.square().mean() - 2 * (on_labelled * on_unlabelled).mean()
    assert loss == pytest.approx(identity.item(), rel=1e-5)


def test_the_difference_term_is_agreement_when_labelled_predictions_agree():
    p, q1, q2 = predictions(SHAPES[0], 3)
    torch.testing.assert_close(difference_agreement(p, q1, p, q2), agreement(q1, q2))
    assert difference_agreement(p, q1, p, q1) == 0


@pytest.mark.parametrize("detach_labeled", [True, False])
def test_labelled_predictions_get_gradient_only_on_request(detach_labeled):
    p1, q1, p2, q2 = (prediction.requires_grad_() for prediction in predictions(SHAPES[0], 4))
    difference_agreement(p1, q1, p2, q2, detach_labeled=detach_labeled).backward()
    assert q1.grad.abs().max() > 0
    assert q2.grad.abs().max() > 0
    assert (p1.grad is None) == detach_labeled
    assert (p2.grad is None) == detach_labeled


def test_unpaired_batches_and_shapes_are_refused():
    p, q = torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="pairs labelled"):
        difference_agreement(p, q, p, q)
    with pytest.raises(ValueError, match="differ in shape"):
        agreement(p, q)
    with pytest.raises(ValueError, match="differ in shape"):
        distill(p, q)


def test_distill_of_zero_logits_is_four_ln_2():
    zero = torch.zeros(2, 3, 4, 4)
    assert distill(zero, zero).item() == pytest.approx(4 * math.log(2), rel=1e-6)
    assert distill(zero, zero).item() == pytest.approx(2.77259, abs=1e-5)


def test_distill_is_the_slow_formula():
    u1, u2, temperature = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), 2.0
    total = 0.0
    for left, right in zip(u1.flatten().tolist(), u2.flatten().tolist(), strict=True):
        a, b = (1 / (1 + math.exp(-value / temperature)) for value in (left, right))
        total += -(b * math.log(a) + (1 - b) * math.log(1 - a)) / 2 - (a * math.log(b) + (1 - a) * math.log(1 - b)) / 2
    assert distill(u1, u2, temperature).item() == pytest.approx(temperature**2 * total / u1.numel(), rel=1e-5)


def test_distill_is_symmetric_and_still_at_equality():
    u1, u2 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(distill(u1, u2), distill(u2, u1))
    left, right = u1.clone().requires_grad_(), u1.clone().requires_grad_()
    distill(left, right).backward()
    torch.testing.assert_close(left.grad, torch.zeros_like(left), rtol=0, atol=1e-7)
    torch.testing.assert_close(right.grad, torch.zeros_like(right), rtol=0, atol=1e-7)


def test_distill_pulls_both_sides_together():
    u1, u2 = torch.full((1, 1, 2, 2), 3.0).requires_grad_(), torch.full((1, 1, 2, 2), -3.0).requires_grad_()
    distill(u1, u2).backward()
    assert (u1.grad > 0).all()
    assert (u2.grad < 0).all()
