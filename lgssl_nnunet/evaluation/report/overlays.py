"""Slices of a case as pictures: image, reference, prediction, what differs, and selection maps."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib import colormaps
from PIL import Image
from skimage.segmentation import find_boundaries

from lgssl_nnunet.evaluation.report.volumes import Volume, box_around

# Okabe and Ito's palette, told apart with every common kind of colour blindness. Differences take the colours that the
# first classes do not have.
CLASS_COLORS = ("E69F00", "56B4E9", "009E73", "D55E00", "0072B2", "CC79A7", "F0E442")
MISSED, SURPLUS, CONFUSED = "missed", "surplus", "other class"
DIFFERENCE_COLORS = {MISSED: "F0E442", SURPLUS: "CC79A7", CONFUSED: "FFFFFF"}
DIFFERENCE_MEANING = {
    MISSED: "in the reference only",
    SURPLUS: "in the prediction only",
    CONFUSED: "in both, as different classes",
}
SELECTION_COLORMAP = "viridis"

PANEL_PIXELS = 320
MAX_SLICES = 16
_FILL = 0.45
_PLANES = ("axial", "coronal", "sagittal")
# What lies at the left, right, top and bottom of a slice across Z, Y, X.
_EDGES = (("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"))


@dataclass(frozen=True)
class SlicePictures:
    """The pictures of one slice.

    Attributes:
        number: number of the slice, from 1, counted along the axis that is looked along.
        differing: voxels of the slice in which prediction and reference differ; None without a reference.
        panels: pictures as data URLs by title.
    """

    number: int
    differing: int | None
    panels: dict[str, str]


@dataclass(frozen=True)
class CasePictures:
    """The chosen slices of one case.

    Attributes:
        plane: "axial", "coronal", "sagittal", or "" where the file does not say how the patient lies.
        edges: letters of the patient's directions at left, right, top and bottom; "" each without them.
        total: slices of the volume.
        slices: the chosen ones in order.
        start: index in `slices` of the one to show first.
    """

    plane: str
    edges: tuple[str, str, str, str]
    total: int
    slices: tuple[SlicePictures, ...]
    start: int


def difference_map(reference: np.ndarray, prediction: np.ndarray, ignored: int | None = None) -> np.ndarray:
    """Return 0 where two label maps agree, else 1 (missed), 2 (surplus) or 3 (other class), as in DIFFERENCE_COLORS.

    Where the reference has the label `ignored`, nothing is compared.
    """
    differing = (reference != prediction) & (reference != (-1 if ignored is None else ignored))
    kinds = np.where(prediction == 0, 1, np.where(reference == 0, 2, 3))
    return np.where(differing, kinds, 0).astype(np.uint8)


def color_indices(labels: Volume) -> Volume:
    """Return a label map in which each label is the number of its colour, from 1, and 0 stays 0.

    NiiVue mixes neighbouring colours of long tables (it looks them up a fraction of an entry off), so it gets a short
    one.
    """
    numbers = (labels.voxels.astype(np.int64) - 1) % len(CLASS_COLORS) + 1
    return replace(labels, voxels=np.where(labels.voxels > 0, numbers, 0).astype(np.uint8))


def draw_case(
    image: Volume | None,
    reference: Volume | None,
    prediction: Volume,
    maps: Mapping[str, Volume],
    ignored: int | None = None,
) -> CasePictures:
    """Draw at most MAX_SLICES slices of a case across its coarsest axis, the one with most errors first.

    Args:
        image: windowed image (uint8) on the grid of the prediction; without it the background is grey.
        reference: label map, None without one.
        prediction: label map.
        maps: selection maps by name, windowed (uint8).
        ignored: label of the reference where nothing is compared.
    """
    axis = int(np.argmax(prediction.spacing))
    stacks = {
        "image": _stack(image, prediction, axis),
        "prediction": _turned(prediction, axis),
        "reference": None if reference is None else _turned(reference, axis),
    }
    maps_turned = {name: _turned(volume, axis) for name, volume in maps.items()}
    if reference is not None:
        stacks["difference"] = difference_map(stacks["reference"], stacks["prediction"], ignored)
    chosen, start = choose_slices(stacks["prediction"], stacks["reference"], stacks.get("difference"))
    drawer = _Drawer(prediction, axis, stacks, maps_turned)
    return CasePictures(
        plane=_PLANES[axis] if prediction.oriented else "",
        edges=_EDGES[axis] if prediction.oriented else ("", "", "", ""),
        total=prediction.voxels.shape[axis],
        slices=tuple(drawer.slice_pictures(index) for index in chosen),
        start=chosen.index(start),
    )


def choose_slices(
    prediction: np.ndarray,
    reference: np.ndarray | None,
    difference: np.ndarray | None,
    limit: int = MAX_SLICES,
) -> tuple[list[int], int]:
    """Return at most `limit` slices over the range of the segmentations, and the one to show first.

    That one has most differing voxels, or most foreground if nothing differs; it is always among the slices.

    Args:
        prediction: label map, slices along the first axis.
        reference: label map of the same shape, or None.
        difference: what `difference_map` says of the two, or None.
        limit: most slices to return.
    """
    foreground = prediction > 0 if reference is None else (prediction > 0) | (reference > 0)
    weights = foreground.sum(axis=(1, 2))
    differing = np.zeros_like(weights) if difference is None else (difference > 0).sum(axis=(1, 2))
    first, last, start = 0, len(weights) - 1, len(weights) // 2
    if weights.any():
        filled = np.flatnonzero(weights)
        first, last = max(int(filled[0]) - 1, first), min(int(filled[-1]) + 1, last)
        start = int(np.argmax(differing if differing.any() else weights))
    spread = np.linspace(first, last, min(limit, last - first + 1)).round().astype(int).tolist()
    if start not in spread:
        nearest = min(range(len(spread)), key=lambda position: abs(spread[position] - start))
        spread[nearest] = start
    return sorted(set(spread)), start


def _turned(volume: Volume, axis: int) -> np.ndarray:
    """Return the voxels with `axis` first and each slice as it is looked at: the head up in upright planes."""
    turned = np.moveaxis(volume.voxels, axis, 0)
    return turned[:, ::-1] if volume.oriented and axis else turned


def _stack(image: Volume | None, prediction: Volume, axis: int) -> np.ndarray:
    if image is None:
        return np.full(np.moveaxis(prediction.voxels, axis, 0).shape, 60, np.uint8)
    return _turned(image, axis)


class _Drawer:
    """Draws slices of one case at one size and one crop."""

    def __init__(
        self, grid: Volume, axis: int, stacks: Mapping[str, np.ndarray | None], maps: Mapping[str, np.ndarray]
    ) -> None:
        self.stacks, self.maps = stacks, maps
        spacing = [value for position, value in enumerate(grid.spacing) if position != axis]
        labels = [stack for stack in (stacks["prediction"], stacks["reference"]) if stack is not None]
        foreground = np.logical_or.reduce([stack > 0 for stack in labels])
        _, *self.window = box_around(foreground, (grid.spacing[axis], *spacing))
        sides = [(side.stop - side.start) * step for side, step in zip(self.window, spacing, strict=True)]
        self.size = tuple(max(round(PANEL_PIXELS * side / max(sides)), 1) for side in reversed(sides))

    def slice_pictures(self, index: int) -> SlicePictures:
        grey = self._enlarged(self.stacks["image"], index, Image.Resampling.BICUBIC)
        prediction = self._enlarged(self.stacks["prediction"], index, Image.Resampling.NEAREST)
        panels = {"Image": _data_url(np.repeat(grey[..., None], 3, axis=2))}
        differing = None
        if self.stacks["reference"] is not None:
            reference = self._enlarged(self.stacks["reference"], index, Image.Resampling.NEAREST)
            panels["Reference"] = _data_url(_overlay(grey, reference, CLASS_COLORS))
        panels["Prediction"] = _data_url(_overlay(grey, prediction, CLASS_COLORS))
        if self.stacks["reference"] is not None:
            kinds = self._enlarged(self.stacks["difference"], index, Image.Resampling.NEAREST)
            panels["Difference"] = _data_url(_overlay(grey, kinds, tuple(DIFFERENCE_COLORS.values())))
            differing = int((self.stacks["difference"][index] > 0).sum())
        for name, stack in self.maps.items():
            panels[name.capitalize()] = _data_url(_heat(grey, self._enlarged(stack, index, Image.Resampling.BICUBIC)))
        return SlicePictures(index + 1, differing, panels)

    def _enlarged(self, stack: np.ndarray, index: int, resampling: Image.Resampling) -> np.ndarray:
        part = np.ascontiguousarray(stack[index][tuple(self.window)])
        mode = np.uint8 if resampling is Image.Resampling.BICUBIC else np.int32
        return np.asarray(Image.fromarray(part.astype(mode)).resize(self.size, resampling))


def _overlay(grey: np.ndarray, labels: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    """Return a picture (H, W, 3) with each label tinted and outlined.

    nnU-Net's generate_overlay adds the colours and stretches each picture to its own extremes; here the background
    keeps its brightness from panel to panel and from slice to slice, so that they can be compared.
    """
    picture = np.repeat(grey[..., None], 3, axis=2)
    for label in np.unique(labels[labels > 0]):
        mask, color = labels == label, np.array(_rgb(colors[(int(label) - 1) % len(colors)]))
        picture[mask] = (1 - _FILL) * picture[mask] + _FILL * color
        picture[find_boundaries(mask, mode="inner")] = color
    return picture


def _heat(grey: np.ndarray, values: np.ndarray) -> np.ndarray:
    heat = colormaps[SELECTION_COLORMAP](values)[..., :3] * 255
    return (0.45 * grey[..., None] + 0.55 * heat).astype(np.uint8)


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(color))


def _data_url(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
