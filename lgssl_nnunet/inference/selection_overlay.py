"""A picture of a selection map: slices of the image in grey, and under each the same slice with the map in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from lgssl_nnunet.data.cropping import nonzero_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue below 0.5, red above: the hue says what the map is, the brightness what the image is.
COLORMAP = "coolwarm"
CT_WINDOW = (-160.0, 240.0)  # HU; the usual window of the abdomen
PERCENTILES = (0.5, 99.5)
_SAMPLE = 2_000_000  # intensities that are enough for a percentile
FONT_SIZE = 9  # said everywhere: nnU-Net's plotting changes matplotlib's default for the whole process
_PLANES = ("axial", "coronal", "sagittal")
_PANEL_INCHES = 2.6
_OPACITY = 0.55
_NO_VARIATION = 1e-4
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class _Slice:
    """One slice of image and map as it is looked at, and the size of its pixels (rows, columns) in mm."""

    title: str
    image: np.ndarray
    selection: np.ndarray
    pixel: tuple[float, float]


def draw_selection(image: np.ndarray, selection: np.ndarray, properties: dict, case: str, is_ct: bool) -> Figure:
    """Draw the slice along each axis in which a selection map varies most.

    What preprocessing cut off has no map: it is 0 there, which a selection never is, and stays grey in the picture.

    Slices lie as radiologists look at them, the patient's right on the left, where the file says how the patient lies.

    Args:
        image: one channel (Z, Y, X) as nnU-Net's reader returns it; a single slice for two-dimensional images.
        selection: the map, same shape, in [0, 1].
        properties: what the reader says of the image.
        case: case id, for the title.
        is_ct: whether the image is in Hounsfield units, which get a fixed window.

    Returns:
        A figure of matplotlib, to be saved.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = selection[nonzero_box(selection[None])]
    shown = _slices(image, selection, properties)
    window = CT_WINDOW if is_ct else np.percentile(image.ravel()[:: max(image.size // _SAMPLE, 1)], PERCENTILES)
    figure = Figure(figsize=(_PANEL_INCHES * len(shown) + 1.2, 2 * _PANEL_INCHES + 0.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(shown), squeeze=False)
    for above, below, part in zip(*axes, shown, strict=True):
        _draw_grey(above, part, window)
        above.set_title(part.title, fontsize=FONT_SIZE)
        _draw_grey(below, part, window)
        heat = below.imshow(part.selection, cmap=COLORMAP, vmin=0, vmax=1, alpha=_OPACITY, aspect=_aspect(part))
    bar = figure.colorbar(heat, ax=axes, shrink=0.7)
    bar.set_label("selection (0: held back, 1: passes)", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    title = f"{case}: selection map, {kept.min():.2f} to {kept.max():.2f}"
    figure.suptitle(title, fontsize=FONT_SIZE, parse_math=False)
    return figure


def _draw_grey(axes: Axes, part: _Slice, window: Sequence[float]) -> None:
    axes.imshow(part.image, cmap="gray", vmin=window[0], vmax=window[1], aspect=_aspect(part))
    axes.set(xticks=[], yticks=[])


def _aspect(part: _Slice) -> float:
    return part.pixel[0] / part.pixel[1]


def _slices(image: np.ndarray, selection: np.ndarray, properties: dict) -> list[_Slice]:
    """Return one slice per axis, of a two-dimensional image the only one."""
    spacing = tuple(float(value) for value in properties["spacing"])
    affine = _affine(properties)
    if affine is not None:
        to_patient = ornt_transform(io_orientation(affine), axcodes2ornt("LPS"))
        image, selection = (_reordered(volume, to_patient) for volume in (image, selection))
        spacing = _reordered_spacing(spacing, to_patient)
    kept = nonzero_box(selection[None])
    place = [box.start + index for box, index in zip(kept, most_varied_slices(selection[kept]), strict=True)]
    colored = np.full(selection.shape, np.nan, dtype=np.float32)
    colored[kept] = selection[kept]
    shown = []
    for axis in range(3) if len(selection) > 1 else (0,):
        title = f"{_PLANES[axis] if affine is not None else 'slice'} {place[axis] + 1} of {selection.shape[axis]}"
        pixel = tuple(value for other, value in enumerate(spacing) if other != axis)
        parts = (np.take(volume, place[axis], axis) for volume in (image, colored))
        # Upright planes are stored feet first.
        shown.append(_Slice(title, *(part[::-1] if axis and affine is not None else part for part in parts), pixel))
    return shown


def most_varied_slices(selection: np.ndarray) -> tuple[int, ...]:
    """Return the slice along each axis in which a map varies most, the middle one where it does not vary at all.

    Not those through its highest value: maps also hold structures back, and their extremes often lie at the border.
    """
    found = []
    for axis, size in enumerate(selection.shape):
        spread = selection.std(axis=tuple(other for other in range(selection.ndim) if other != axis))
        found.append(int(spread.argmax()) if spread.max() > _NO_VARIATION else size // 2)
    return tuple(found)


def _affine(properties: dict) -> np.ndarray | None:
    """Return the (4, 4) matrix from voxels (X, Y, Z) as read to mm in RAS, None for two-dimensional images.

    The origin is left out: only directions matter here.
    """
    if "nibabel_stuff" in properties:
        geometry = properties["nibabel_stuff"]
        return geometry.get("reoriented_affine", geometry["original_affine"])
    geometry = properties["sitk_stuff"]
    if len(geometry["spacing"]) == 2:
        return None
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ np.reshape(geometry["direction"], (3, 3)) @ np.diag(geometry["spacing"])
    return affine


def _reordered(volume: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    return apply_orientation(volume.transpose(2, 1, 0), orientation).transpose(2, 1, 0)


def _reordered_spacing(spacing: tuple[float, ...], orientation: np.ndarray) -> tuple[float, ...]:
    reordered = np.empty(3)
    reordered[orientation[:, 0].astype(int)] = spacing[::-1]
    return tuple(reordered[::-1])
