from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine.perturbation import with_noise


def test_the_noise_has_the_deviation_asked_for_and_is_clipped_at_twice_that():
    torch.manual_seed(0)
    noise = with_noise(torch.zeros(1, 1, 100, 100), 0.1)
    assert noise.abs().max() == pytest.approx(0.2)
    # Clipping a Gaussian at two standard deviations leaves 0.959 of its standard deviation.
    assert noise.std().item() == pytest.approx(0.0959, rel=0.03)
    assert not torch.equal(noise, with_noise(torch.zeros(1, 1, 100, 100), 0.1))


def test_no_noise_is_the_image_itself():
    image = torch.randn(1, 1, 4, 4)
    assert with_noise(image, 0.0) is image
