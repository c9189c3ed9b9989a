from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.losses.uncertainty import entropy, entropy_threshold, maximal_entropy, mean_of_passes


def test_the_entropy_of_a_uniform_prediction_is_the_maximum():
    for channels in (2, 4):
        uniform = torch.full((1, channels, 2, 2), 1 / channels)
        assert entropy(uniform, False).shape == (1, 1, 2, 2)
        assert float(entropy(uniform, False).mean()) == pytest.approx(maximal_entropy(channels, False), abs=1e-4)
    assert maximal_entropy(4, False) == math.log(4)


def test_each_region_has_an_entropy_of_its_own():
    p = torch.tensor([0.5, 1.0, 0.1]).view(1, 3, 1, 1)
    expected = [math.log(2), 0.0, -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))]
    assert entropy(p, True).flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert maximal_entropy(3, True) == math.log(2)


def test_a_certain_prediction_has_no_entropy_and_no_nan():
    one_hot = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert float(entropy(one_hot, False)) == pytest.approx(0, abs=2e-6)
    assert torch.isfinite(entropy(one_hot, True)).all()


def test_the_threshold_moves_from_its_start_to_its_end():
    # methods.md section 3: 0.521028 for two classes at the start, where the ramp-up is exp(-5).
    assert entropy_threshold(0.75, 1.0, math.exp(-5), 2, False) == pytest.approx(0.521028, abs=1e-6)
    assert entropy_threshold(0.75, 1.0, 1.0, 2, False) == math.log(2)


def test_the_first_threshold_keeps_voxels_above_a_probability_of_0_7846():
    h = entropy_threshold(0.75, 1.0, math.exp(-5), 2, False)
    p = torch.tensor([0.7844, 0.7848]).view(2, 1, 1, 1)
    uncertainty = entropy(torch.cat([p, 1 - p], dim=1), False).flatten()
    assert (uncertainty < h).tolist() == [False, True]


def test_the_mean_of_passes_is_theirs_and_has_no_gradient():
    weight = torch.ones(2, 1, 1, requires_grad=True)
    draws = iter([1.0, 2.0, 6.0])
    mean = mean_of_passes(lambda image: weight * next(draws), torch.zeros(2, 1, 1), 0.0, 3)
    assert mean.flatten().tolist() == [3.0, 3.0]
    assert not mean.requires_grad


@pytest.mark.parametrize(("patches", "shown"), [(1, [2, 2, 1]), (2, [2] * 5)])
def test_passes_of_a_single_patch_go_in_pairs_and_each_has_noise_of_its_own(patches, shown):
    image, seen = torch.zeros(patches, 1, 50), []
    mean = mean_of_passes(lambda noisy: seen.append(noisy) or noisy, image, 1.0, 5)
    assert [len(noisy) for noisy in seen] == shown
    passes = torch.cat(seen).reshape(5, patches, 1, 50)
    assert len(passes.flatten(1).unique(dim=0)) == 5
    assert torch.allclose(mean, passes.mean(dim=0), atol=1e-6)
