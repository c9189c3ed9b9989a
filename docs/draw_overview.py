"""Draw docs/overview.png, the picture of the README: `python docs/draw_overview.py`.

The scans are the demo's phantom, drawn on the spot; the segmentation shown is the phantom's own, not a prediction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from PIL import Image

from lgssl_nnunet.phantom import GALLBLADDER, PhantomSpec, draw_case

SPEC = PhantomSpec(shape=(48, 112, 112), seed=4)
SIZE, DPI = (12.0, 4.45), 130
INK, PALE = "#22313f", "#7b8894"
LABELED, UNLABELED, TEXT = "#2a6f97", "#b5651d", "#6a4c93"
CLASSES = ("#ff9f1c", "#2ec4b6")
OPACITY = 0.6


def slice_with_both_organs(kind: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return image and segmentation (Y, X) of a phantom case where the gallbladder is largest, grey values 0 to 1."""
    case = draw_case(SPEC, kind, index)
    position = int((case.segmentation == GALLBLADDER).sum((1, 2)).argmax())
    image, segmentation = case.image[0, position], case.segmentation[position]
    return np.clip(image / np.percentile(image, 99.7), 0, 1), segmentation


def colored(image: np.ndarray, segmentation: np.ndarray | None = None) -> np.ndarray:
    """Return the image (Y, X, 3), with the classes laid over it if there is a segmentation."""
    picture = np.repeat(image[..., None], 3, axis=2)
    for value, color in enumerate(CLASSES if segmentation is not None else (), 1):
        mask = segmentation == value
        picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * np.array(to_rgb(color))
    return picture


def place(axis: Axes, picture: np.ndarray, left: float, bottom: float, side: float, edge: str) -> None:
    """Put a square picture on the canvas, with a frame."""
    axis.imshow(picture, extent=(left, left + side, bottom, bottom + side), zorder=2)
    frame = FancyBboxPatch((left, bottom), side, side, boxstyle="square,pad=0", fill=False, edgecolor=edge, lw=1.6)
    axis.add_patch(frame).set_zorder(3)


def box(axis: Axes, center: tuple[float, float], size: tuple[float, float], text: str, color: str) -> None:
    """Draw a rounded box with a text."""
    corner = (center[0] - size[0] / 2, center[1] - size[1] / 2)
    axis.add_patch(
        FancyBboxPatch(
            corner, *size, boxstyle="round,pad=0,rounding_size=0.08", facecolor="white", edgecolor=color, lw=1.6
        )
    )
    axis.text(*center, text, ha="center", va="center", color=color, fontsize=10, linespacing=1.35)


def funnel(axis: Axes, left: float, right: float, center: float, heights: tuple[float, float], text: str) -> None:
    """Draw an encoder (narrowing) or a decoder (widening)."""
    start, end = (height / 2 for height in heights)
    corners = [(left, center - start), (left, center + start), (right, center + end), (right, center - end)]
    axis.add_patch(Polygon(corners, facecolor="#eef2f5", edgecolor=INK, lw=1.6))
    axis.text((left + right) / 2, center, text, ha="center", va="center", color=INK, fontsize=10, linespacing=1.35)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """Draw an arrow from one point to another."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **style))


def draw_inputs(axis: Axes) -> None:
    """Draw the two kinds of scans at the left."""
    for index in range(2):
        image, segmentation = slice_with_both_organs("labeled", index)
        place(axis, colored(image, segmentation), 0.15 + 0.42 * index, 2.85 - 0.14 * index, 1.15, LABELED)
    for index in range(4):
        image, _ = slice_with_both_organs("unlabeled", index)
        place(axis, colored(image), 0.15 + 0.28 * index, 0.93 - 0.14 * index, 1.15, UNLABELED)
    axis.text(0.15, 4.1, "few scans with segmentations", color=LABELED, fontsize=10)
    axis.text(0.15, 2.18, "many scans without", color=UNLABELED, fontsize=10)
    arrow(axis, (1.8, 3.2), (2.7, 2.7), LABELED)
    arrow(axis, (2.22, 1.25), (2.7, 1.8), UNLABELED)


def draw_network(axis: Axes) -> None:
    """Draw encoder, prompts, fusion and the two decoders."""
    funnel(axis, 2.75, 4.15, 2.25, (1.9, 0.9), "encoder\nplanned by\nnnU-Net")
    arrow(axis, (4.2, 2.25), (4.57, 2.25))
    box(axis, (5.1, 2.25), (1.0, 0.7), "fusion\n(TVSF)", TEXT)
    sentences = "prompts, embedded once:\n“A magnetic resonance\nimage of the liver”, ..."
    box(axis, (4.45, 3.95), (2.3, 0.9), sentences, TEXT)
    arrow(axis, (5.1, 3.46), (5.1, 2.65), TEXT)
    arrow(axis, (5.64, 2.4), (6.2, 2.95))
    arrow(axis, (5.64, 2.1), (6.2, 1.55))
    funnel(axis, 6.25, 7.65, 3.15, (0.75, 1.5), "decoder 1\ntransposed\nconvolution")
    funnel(axis, 6.25, 7.65, 1.35, (0.75, 1.5), "decoder 2\ninterpolation")


def draw_losses(axis: Axes) -> None:
    """Draw what the two decoders are trained with, and the result."""
    axis.text(8.75, 3.5, "training", color=PALE, fontsize=9, ha="center", va="bottom")
    box(axis, (8.75, 2.95), (1.35, 0.75), "labelled:\nDice + CE", LABELED)
    box(axis, (8.75, 1.55), (1.35, 0.75), "unlabelled:\nboth agree", UNLABELED)
    for decoder in (3.15, 1.35):
        for loss, color in ((2.95, LABELED), (1.55, UNLABELED)):
            arrow(axis, (7.7, decoder + 0.12 * (loss - decoder)), (8.05, loss + 0.12 * (decoder - loss)), color)
    image, segmentation = slice_with_both_organs("test", 3)
    place(axis, colored(image, segmentation), 10.1, 1.5, 1.7, INK)
    axis.text(10.95, 1.37, "segmentation of a new scan", color=INK, fontsize=10, ha="center", va="top")
    axis.text(9.0, 4.32, "prediction: decoder 1 alone", color=PALE, fontsize=9, ha="center", va="bottom")
    axis.plot([6.95, 6.95, 10.95], [3.85, 4.25, 4.25], color=INK, lw=1.6)
    arrow(axis, (10.95, 4.25), (10.95, 3.27))


def main() -> None:
    """Draw the picture beside this file."""
    figure = Figure(figsize=SIZE, dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    draw_inputs(axis)
    draw_network(axis)
    draw_losses(axis)
    axis.set(xlim=(0, SIZE[0]), ylim=(0.25, 0.25 + SIZE[1]), aspect="equal")
    axis.axis("off")
    canvas.draw()
    # 128 colours instead of 16 million: a third of the size.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128)
    picture.save(Path(__file__).with_name("overview.png"), optimize=True)


if __name__ == "__main__":
    main()
