"""Views of an unlabelled patch: geometry drawn once, intensity once per view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

VIEWS = ("weak", "strong")
_GEOMETRIC = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)


def is_intensity_transform(transform: BasicTransform) -> bool:
    """Whether a step of nnU-Net's pipeline changes grey values and nothing else."""
    return isinstance(transform, RandomTransform) and isinstance(transform.transform, ImageOnlyTransform)


def make_deterministic(pipeline: ComposeTransforms) -> ComposeTransforms:
    """Switch off the timing contest by which Gaussian blur picks its algorithm: batches must not depend on a clock."""
    for transform in pipeline.transforms:
        inner = getattr(transform, "transform", transform)
        if isinstance(inner, GaussianBlurTransform):
            inner.benchmark = False
    return pipeline


class ViewsTransform(BasicTransform):
    """Turns one unlabelled patch into several views, stacked along the channel axis.

    The geometric and the intensity steps are those of nnU-Net's training pipeline, so labelled and unlabelled patches
    are augmented alike. `weak` is geometry alone, `strong` adds one draw of the intensity steps.

    Args:
        pipeline: nnU-Net's training transforms.
        views: names out of `VIEWS`, in the order in which they are stacked.
        masked_channels: channels that nnU-Net keeps at 0 outside the non-zero region of the image.
    """

    def __init__(self, pipeline: ComposeTransforms, views: Sequence[str], masked_channels: Sequence[int] = ()) -> None:
        super().__init__()
        self.geometry = ComposeTransforms([t for t in pipeline.transforms if isinstance(t, _GEOMETRIC)])
        self.intensity = ComposeTransforms([t for t in pipeline.transforms if is_intensity_transform(t)])
        self.views = tuple(views)
        self.masked_channels = list(masked_channels)

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Return {"image": (V * M, *S), "segmentation": empty}."""
        image = self.geometry(image=data_dict["image"])["image"]
        views = [image if name == "weak" else self._strong(image) for name in self.views]
        return {"image": torch.cat(views), "segmentation": torch.empty(0, dtype=torch.int16)}

    def _strong(self, image: Tensor) -> Tensor:
        strong = self.intensity(image=image.clone())["image"]
        for channel in self.masked_channels:
            strong[channel][image[channel] == 0] = 0
        return strong


def split_views(stacked: Tensor, views: Sequence[str]) -> dict[str, Tensor]:
    """Undo the stacking: (B, V * M, *S) to {view: (B, M, *S)}."""
    return dict(zip(views, stacked.chunk(len(views), dim=1), strict=True))
