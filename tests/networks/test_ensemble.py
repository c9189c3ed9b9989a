from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.networks.ensemble import NetworkPair, mean_of_probabilities


@pytest.fixture
def pair(stock_network, configuration_manager) -> NetworkPair:
    return NetworkPair(*(stock_network(configuration_manager) for _ in range(2)))


def probabilities(logits: torch.Tensor, has_regions: bool) -> torch.Tensor:
    return logits.sigmoid() if has_regions else logits.softmax(1)


@pytest.mark.parametrize("has_regions", [False, True])
def test_it_predicts_the_mean_of_both_probabilities_at_every_scale(pair, configuration_manager, has_regions):
    pair.has_regions = has_regions
    image = torch.randn(2, 1, *configuration_manager.patch_size)
    predicted, first, second = pair(image), pair.first(image), pair.second(image)
    assert len(predicted) == len(first) > 1
    for mean, a, b in zip(predicted, first, second, strict=True):
        expected = (probabilities(a, has_regions) + probabilities(b, has_regions)) / 2
        torch.testing.assert_close(probabilities(mean, has_regions), expected)


@pytest.mark.parametrize("has_regions", [False, True])
def test_the_mean_is_exact_where_probabilities_underflow(has_regions):
    first = torch.tensor([[[200.0, -3.0]], [[-200.0, 4.0]]], dtype=torch.half).transpose(0, 1)
    second = torch.tensor([[[180.0, 0.5]], [[-180.0, -1.0]]], dtype=torch.half).transpose(0, 1)
    wide = [probabilities(z.double(), has_regions) for z in (first, second)]
    expected = (wide[0] + wide[1]) / 2
    found = mean_of_probabilities(first, second, has_regions)
    assert found.dtype == torch.float32
    # Relative, so that the probabilities of 1e-79 and 1e-157 count.
    torch.testing.assert_close(probabilities(found.double(), has_regions), expected, rtol=1e-4, atol=0)


def test_two_equal_networks_predict_as_one():
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(mean_of_probabilities(z, z, False), z.log_softmax(1))
    torch.testing.assert_close(mean_of_probabilities(z, z, True), z)


def test_a_sure_network_and_an_undecided_one():
    sure, undecided = torch.tensor([[[1000.0], [0.0]]]), torch.zeros(1, 2, 1)
    assert mean_of_probabilities(sure, undecided, False).flatten().tolist() == pytest.approx(
        [math.log(0.75), math.log(0.25)]
    )


def test_each_member_is_reached_through_the_call(pair, configuration_manager):
    image = torch.randn(1, 1, *configuration_manager.patch_size)
    both = pair(image, member="both")
    for name, outputs in zip(("first", "second"), both, strict=True):
        for alone, together, direct in zip(pair(image, member=name), outputs, getattr(pair, name)(image), strict=True):
            assert torch.equal(alone, direct)
            assert torch.equal(together, direct)


def test_deep_supervision_is_switched_in_both(pair, configuration_manager):
    pair.set_deep_supervision(False)
    image = torch.randn(1, 1, *configuration_manager.patch_size)
    outputs = (pair(image), *pair(image, member="both"))
    assert all(output.shape == (1, 3, *configuration_manager.patch_size) for output in outputs)
    pair.set_deep_supervision(True)
    assert all(isinstance(output, list) for output in (pair(image), *pair(image, member="both")))


@pytest.mark.parametrize("has_regions", [False, True])
def test_weights_bring_along_whether_channels_are_regions(stock_network, configuration_3d, has_regions, tmp_path):
    trained = NetworkPair(*(stock_network(configuration_3d) for _ in range(2)), has_regions=has_regions)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    rebuilt = NetworkPair(*(stock_network(configuration_3d) for _ in range(2)), has_regions=not has_regions)
    rebuilt.load_state_dict(torch.load(tmp_path / "weights.pth"))
    assert rebuilt.has_regions is has_regions
    assert all(isinstance(value, torch.Tensor) for value in trained.state_dict().values())
    image = torch.randn(1, 1, *configuration_3d.patch_size)
    assert all(torch.equal(a, b) for a, b in zip(trained(image), rebuilt(image), strict=True))
