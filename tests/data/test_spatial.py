"""Labels interpolated at boundaries alone are nnU-Net's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from scipy import ndimage
from torch import Tensor

from lgssl_nnunet.data.spatial import BoundaryInterpolation, interpolate_at_boundaries

PATCH = {2: (40, 32), 3: (24, 20, 28)}


def spatial_transform(patch: tuple[int, ...], **options: object) -> SpatialTransform:
    options = {"padding_value_seg": -1, "border_mode_seg": "constant", "p_rotation": 1, "p_scaling": 1, **options}
    return SpatialTransform(patch, 0, False, rotation=(-0.5, 0.5), scaling=(0.7, 1.4), **options)


def label_map(dimensions: int, labels: int, seed: int, channels: int = 1) -> Tensor:
    """Return (channels, *S) of touching blobs, larger than the patch."""
    shape = [length + 10 for length in PATCH[dimensions]]
    noise = np.random.default_rng(seed).normal(size=(channels, labels, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 0, *[3] * dimensions))
    return torch.from_numpy(smooth.argmax(1).astype(np.int16))


def both(transform: SpatialTransform, segmentation: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    parameters = transform.get_parameters(image=segmentation)
    ours = BoundaryInterpolation.of(transform)
    return (
        transform._apply_to_segmentation(segmentation, **parameters),
        ours._apply_to_segmentation(segmentation, **parameters),
    )


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("labels", [1, 2, 3, 12])
@pytest.mark.parametrize("border", ["constant", "zeros", "border", "reflection"])
def test_the_result_is_that_of_nnunet(dimensions: int, labels: int, border: str) -> None:
    transform = spatial_transform(PATCH[dimensions], border_mode_seg=border)
    for seed in range(6):
        segmentation = label_map(dimensions, labels, seed)
        expected, ours = both(transform, segmentation, seed)
        assert torch.equal(ours, expected)
        assert ours.dtype == expected.dtype
        if labels > 1:
            assert len(expected.unique()) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"p_elastic_deform": 1, "elastic_deform_magnitude": (0.1, 0.2), "elastic_deform_scale": (0.1, 0.2)},
        {"seg_tiebreak": "highest"},
        {"bg_style_seg_sampling": True},
        {"mode_seg": "nearest"},
        {"padding_value_seg": 7},
        {"p_rotation": 0, "p_scaling": 0},
        {"rotation": (0, 0), "scaling": (2, 2)},
    ],
)
def test_every_option_keeps_its_meaning(options: dict) -> None:
    base = {"rotation": (-0.5, 0.5), "scaling": (0.7, 1.4), "p_rotation": 1, "p_scaling": 1}
    transform = SpatialTransform(
        PATCH[3], 0, False, **{**base, "border_mode_seg": "constant", "padding_value_seg": -1, **options}
    )
    for seed in range(4):
        expected, ours = both(transform, label_map(3, 4, seed), seed)
        assert torch.equal(ours, expected)


def test_channels_and_labels_below_zero_and_far_apart() -> None:
    segmentation = label_map(3, 3, 0, channels=2)
    segmentation[0] = torch.tensor([-1, 0, 3000], dtype=torch.int16)[segmentation[0].long()]
    expected, ours = both(spatial_transform(PATCH[3]), segmentation, 1)
    assert torch.equal(ours, expected)
    assert {-1, 0, 3000} <= set(expected[0].unique().tolist())


def test_only_a_layer_is_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    interpolated = []
    stock = SpatialTransform._apply_to_segmentation

    def counting(self: SpatialTransform, segmentation: Tensor, **parameters: Tensor) -> Tensor:
        interpolated.append(parameters["grid"][..., 0].numel())
        return stock(self, segmentation, **parameters)

    monkeypatch.setattr(SpatialTransform, "_apply_to_segmentation", counting)
    segmentation = torch.zeros(1, 60, 60, 60, dtype=torch.int16)
    segmentation[:, 20:40, 20:40, 20:40] = 1
    both(spatial_transform((40, 40, 40)), segmentation, 0)
    whole, layer = interpolated
    assert whole == 40**3
    assert 0 < layer < 0.3 * whole


def test_the_pipeline_gets_it_and_keeps_its_other_steps() -> None:
    other = object()
    transform = spatial_transform(PATCH[3])
    pipeline = ComposeTransforms([transform, other])
    assert interpolate_at_boundaries(pipeline) is pipeline
    replaced, kept = pipeline.transforms
    assert type(replaced) is BoundaryInterpolation
    assert vars(replaced) == vars(transform)
    assert kept is other
