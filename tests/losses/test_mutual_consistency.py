from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.losses.consistency import mutual_consistency, probabilities
from lgssl_nnunet.losses.pseudo_labels import sharpened


def logits_of(*p: float, shape: tuple[int, ...] = (2, 2, 2)) -> torch.Tensor:
    """Logits (1, C, *shape) whose softmax is `p` in every voxel."""
    return torch.log(torch.tensor(p)).view(1, -1, *[1] * len(shape)).expand(1, len(p), *shape).clone()


def region_logits_of(p: float) -> torch.Tensor:
    return torch.logit(torch.full((1, 1, 2, 2), p))


def test_agreement_at_0_6_costs_what_the_sharpening_changes():
    # methods.md section 4: 6 pairs, each (0.982954 - 0.6)^2 in both channels.
    assert mutual_consistency([logits_of(0.6, 0.4)] * 3, 0.1, False).item() == pytest.approx(0.879923, abs=1e-5)
    assert mutual_consistency([logits_of(0.6, 0.4)] * 2, 0.1, False).item() == pytest.approx(0.293308, abs=1e-5)
    assert mutual_consistency([region_logits_of(0.6)] * 3, 0.1, True).item() == pytest.approx(0.879923, abs=1e-5)


@pytest.mark.parametrize("agreed", [(0.5, 0.5), (1.0, 0.0)])
def test_agreement_on_one_half_or_on_certainty_costs_nothing(agreed):
    logits = torch.log(torch.tensor(agreed) + 1e-30).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert mutual_consistency([logits] * 3, 0.1, False).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2), (2, 3, 4, 3)])
def test_it_is_the_sum_over_ordered_pairs(shape, has_regions):
    torch.manual_seed(0)
    logits, expected = [torch.randn(shape) for _ in range(3)], 0.0
    for i in range(3):
        for j in range(3):
            if i == j:
                continue
            p = probabilities(logits[i], has_regions).flatten().tolist()
            s = sharpened(logits[j], 0.3, has_regions).flatten().tolist()
            expected += sum((a - b) ** 2 for a, b in zip(p, s, strict=True)) / len(p)
    assert mutual_consistency(logits, 0.3, has_regions).item() == pytest.approx(expected, rel=1e-5)


def test_two_classes_are_sharpened_as_in_the_released_code():
    p = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    released = p**10 / (p**10 + (1 - p) ** 10)
    ours = sharpened(torch.log(torch.cat([p, 1 - p], dim=1)), 0.1, False)
    torch.testing.assert_close(ours[:, :1], released)


def push(p: float, stop_gradient: bool) -> float:
    """The direction in which gradient descent moves the logit of predictions that agree at `p`."""
    logits = region_logits_of(p).requires_grad_()
    mutual_consistency([logits] * 3, 0.1, True, stop_gradient=stop_gradient).backward()
    return -float(logits.grad.sum())


def test_sharpened_targets_drive_away_from_one_half():
    for p in (0.55, 0.65, 0.9):
        assert push(p, stop_gradient=True) > 0
        assert push(1 - p, stop_gradient=True) < 0


def test_the_gradient_through_the_targets_drives_to_one_half_near_it():
    # methods.md section 4: for 0.409 < p < 0.591, as released.
    assert push(0.58, stop_gradient=False) < 0
    assert push(0.42, stop_gradient=False) > 0
    assert push(0.60, stop_gradient=False) > 0
    assert push(0.40, stop_gradient=False) < 0


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_sharpened_predictions_have_a_gradient_on_request(stop_gradient):
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    assert sharpened(logits, 0.5, False, stop_gradient=stop_gradient).requires_grad == (not stop_gradient)


def test_it_is_computed_in_fp32():
    half = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mutual_consistency([half, half], 0.1, False).dtype == torch.float32
