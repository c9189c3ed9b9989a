"""nnU-Net's spatial transform, with labels interpolated only where they meet."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from torch import Tensor
from torch.nn.functional import grid_sample


class BoundaryInterpolation(SpatialTransform):
    """SpatialTransform with the same result, to the bit, for less work on the segmentation.

    nnU-Net interpolates the indicator of every label at every voxel and takes the largest. Where the voxels around a
    place all have one label, that label is the result: only the other places, a thin layer, are left to nnU-Net.
    """

    @classmethod
    def of(cls, transform: SpatialTransform) -> BoundaryInterpolation:
        """Return `transform` as this class; both share what they have cached."""
        ours = cls.__new__(cls)
        ours.__dict__.update(transform.__dict__)
        return ours

    def _apply_to_segmentation(self, segmentation: Tensor, **params: Any) -> Tensor:
        """Return the segmentation (C, *patch) of (C, *S)."""
        grid = params["grid"]
        if grid is None or self.mode_seg != "bilinear":
            return super()._apply_to_segmentation(segmentation, **params)
        # One sampling for both: beyond the image the code is 0, so the place counts as not uniform.
        code = 2 * segmentation.float() + _uniform(segmentation)
        code = grid_sample(code[None], grid[None], "nearest", "zeros", align_corners=self.align_corners)[0]
        result = torch.div(code, 2, rounding_mode="floor").to(segmentation.dtype)
        boundary = (code.remainder(2) == 0).any(dim=0).nonzero(as_tuple=True)
        if len(boundary[0]):
            result[(slice(None), *boundary)] = self._interpolated(segmentation, grid, boundary)
        return result

    def _interpolated(self, segmentation: Tensor, grid: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        """Return nnU-Net's labels (C, N) at N places of the grid (*patch, dimensions)."""
        few = copy(self)
        few.patch_size = (len(places[0]),) + (1,) * (len(places) - 1)
        # Whether padding counts as a label is decided by the extent of the whole grid, and rounding depends on it.
        reaches_outside = self._may_reach_outside(grid, segmentation.shape[1:])
        few._may_reach_outside = lambda *_: reaches_outside
        part = grid[places].reshape(*few.patch_size, -1)
        return super(BoundaryInterpolation, few)._apply_to_segmentation(segmentation, grid=part).flatten(1)


def interpolate_at_boundaries(pipeline: ComposeTransforms) -> ComposeTransforms:
    """Replace the spatial transform of nnU-Net's pipeline by the faster one, in place."""
    pipeline.transforms = [
        BoundaryInterpolation.of(step) if type(step) is SpatialTransform else step for step in pipeline.transforms
    ]
    return pipeline


def _uniform(labels: Tensor) -> Tensor:
    """Return (C, *S), bool: the voxel is not at the image's border and all its neighbours have its label."""
    low, high = labels, labels
    for axis in range(1, labels.ndim):
        low = _with_neighbors(torch.minimum, low, axis)
        high = _with_neighbors(torch.maximum, high, axis)
    uniform = low == high
    for axis in range(1, labels.ndim):
        uniform.select(axis, 0).fill_(False)
        uniform.select(axis, -1).fill_(False)
    return uniform


def _with_neighbors(choose: Callable[[Tensor, Tensor], Tensor], values: Tensor, axis: int) -> Tensor:
    last = values.shape[axis] - 1
    result = values.clone()
    before, after = result.narrow(axis, 0, last), result.narrow(axis, 1, last)
    before.copy_(choose(values.narrow(axis, 0, last), values.narrow(axis, 1, last)))
    after.copy_(choose(after, values.narrow(axis, 0, last)))
    return result
