from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.losses.adversarial import adversarial_loss, critic_loss
from lgssl_nnunet.networks import critics
from lgssl_nnunet.networks.critics import VoxelCritic

SHAPES = {2: (6, 7), 3: (5, 6, 7)}


def segmentation(dimensions: int = 3, classes: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, classes, *SHAPES[dimensions]).softmax(1)


def touched(critic: VoxelCritic) -> set[tuple[int, ...]]:
    """Offsets of the voxels on which the judgement of the middle voxel of a cube of 11 depends."""
    p = torch.rand(1, 3, 11, 11, 11, requires_grad=True)
    critic(p)[0, :, 5, 5, 5].sum().backward()
    return {tuple((voxel - 5).tolist()) for voxel in p.grad[0].abs().sum(0).nonzero()}


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_it_judges_every_voxel_and_channel(dimensions, spatial):
    p = segmentation(dimensions)
    assert VoxelCritic(3, dimensions, spatial)(p).shape == p.shape


def test_widths_are_the_published_ones_and_the_last_layer_is_bare():
    layers = list(VoxelCritic(3, 3).layers)
    shapes = [tuple(p.shape) for layer in layers for p in layer.parameters() if p.ndim > 1]
    assert shapes == [(16, 3), (32, 16), (64, 32), (3, 64)]
    assert isinstance(layers[-1], torch.nn.Linear)
    assert [layer.negative_slope for layer in layers if isinstance(layer, torch.nn.LeakyReLU)] == [0.2] * 3


def test_a_voxel_is_judged_by_its_own_probabilities():
    assert touched(VoxelCritic(3, 3)) == {(0, 0, 0)}


def test_a_spatial_critic_sees_four_voxels_around():
    offsets = touched(VoxelCritic(3, 3, spatial=True))
    assert {max(map(abs, offset)) for offset in offsets} == {0, 1, 2, 3, 4}


def test_a_sample_of_voxels_is_judged_as_within_the_patch():
    critic, p = VoxelCritic(3, 3), segmentation()
    torch.manual_seed(1)
    sample = critic.sample(p, 20)
    torch.manual_seed(1)
    torch.testing.assert_close(critic(sample), critic.sample(critic(p), 20))
    assert sample.shape == (2, 3, 20)


def test_different_maps_are_sampled_at_the_same_place_in_all_patches():
    place = torch.arange(210.0).view(1, 1, 5, 6, 7).expand(2, 2, -1, -1, -1)
    for spatial in (False, True):
        sample = VoxelCritic(3, 3, spatial).sample(place, 20)
        assert torch.equal(sample[0, 0], sample[1, 1])


def test_samples_differ_from_draw_to_draw():
    place = torch.arange(210.0).view(1, 1, 5, 6, 7)
    for spatial in (False, True):
        critic = VoxelCritic(3, 3, spatial)
        assert len({tuple(critic.sample(place, 20).flatten().tolist()) for _ in range(10)}) > 1


def test_a_spatial_sample_is_a_box_of_about_that_many_voxels():
    place = torch.arange(27000).view(1, 1, 30, 30, 30)
    box = VoxelCritic(3, 3, spatial=True).sample(place, 1000)
    assert box.shape == (1, 1, 10, 10, 10)
    corner = box[0, 0, 0, 0, 0]
    inside = corner + 900 * torch.arange(10)[:, None, None] + 30 * torch.arange(10)[:, None] + torch.arange(10)
    assert torch.equal(box[0, 0], inside)


@pytest.mark.parametrize("voxels", [0, 210, 1000])
@pytest.mark.parametrize("spatial", [False, True])
def test_zero_or_more_voxels_than_there_are_take_all(voxels, spatial):
    p = segmentation()
    assert VoxelCritic(3, 3, spatial).sample(p, voxels) is p


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_confidence_in_pieces_is_that_of_the_whole(dimensions, spatial, monkeypatch):
    monkeypatch.setattr(critics, "_PIECE", 8)
    critic, p = VoxelCritic(3, dimensions, spatial), segmentation(dimensions).requires_grad_()
    found = critic.confidence(p)
    assert not found.requires_grad
    torch.testing.assert_close(found, critic(p).sigmoid().detach())


def test_it_computes_in_float32_under_autocast():
    critic, p = VoxelCritic(3, 3), segmentation()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(critic(p), critic(p.float()))
        assert critic(p).dtype == torch.float32


class Fixed(torch.nn.Module):
    """A critic that says what it is shown."""

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return p


def test_the_losses_are_the_binary_cross_entropies_of_the_method():
    real, fake = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[0.5, 3.0, -2.0]]])
    bce = functional.binary_cross_entropy_with_logits
    expected = 0.5 * bce(real, torch.ones_like(real)) + 0.5 * bce(fake, torch.zeros_like(fake))
    torch.testing.assert_close(critic_loss(Fixed(), real, fake, torch.ones(1, 1, 2)), expected)
    torch.testing.assert_close(adversarial_loss(Fixed(), fake), bce(fake, torch.ones_like(fake)))


def test_voxels_without_annotation_are_no_example_of_one():
    real, fake = torch.tensor([[[2.0, -1.0], [0.0, 7.0]]]), torch.full((1, 2, 1), -math.inf)
    found = critic_loss(Fixed(), real, fake, torch.tensor([[[1.0, 0.0]]]))
    assert float(found) == pytest.approx(0.5 * (math.log1p(math.exp(-2)) + math.log(2)) / 2)
    assert float(critic_loss(Fixed(), real, fake, torch.zeros(1, 1, 2))) == 0


@pytest.mark.parametrize("spatial", [False, True])
def test_a_trained_critic_believes_labels_and_not_uniform_probabilities(spatial):
    torch.manual_seed(0)
    critic = VoxelCritic(1, 2, spatial)
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-2)
    for _ in range(60):
        labels, uniform = torch.randint(0, 2, (2, 1, 16, 16)).float(), torch.rand(2, 1, 16, 16)
        optimizer.zero_grad()
        critic_loss(critic, labels, uniform, torch.ones(2, 1, 16, 16)).backward()
        optimizer.step()
    if spatial:
        believed = critic.confidence(torch.randint(0, 2, (1, 1, 16, 16)).float())
        assert (believed > 0.5).float().mean() > 0.9
        return
    ends, middle = critic.confidence(torch.tensor([[[0.0, 1.0]]])), critic.confidence(torch.tensor([[[0.3, 0.5, 0.7]]]))
    assert (ends > 0.5).all()
    assert (middle < 0.5).all()
