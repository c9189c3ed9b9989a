"""The prompts of a raw dataset, before anything is planned: the function behind `lgssl_prompts`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.figures import save_png
from lgssl_nnunet.plans.cases import find_raw_folder, load_dataset_json
from lgssl_nnunet.text.encoders import EmbeddedText, embed_dataset
from lgssl_nnunet.text.prompts import prompt_modality, templates
from lgssl_nnunet.text.similarity import SIMILAR, SimilarPair, cosine_matrix, similar_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

FONT_SIZE = 9  # said everywhere: nnU-Net's plotting changes matplotlib's default for the whole process
PAIRS_IN_WARNING = 3
MOST_CLASSES_WITH_NUMBERS = 20
"""A plot of more classes shows colours alone; numbers would not be legible."""


@dataclass(frozen=True, eq=False)
class PromptOverview:
    """What a text encoder makes of the classes of a dataset.

    Attributes:
        dataset: Name of the dataset's folder.
        encoder: What made the vectors.
        sha256: Checksum of the encoder's weights.
        templates: Templates over which every phrase is averaged; a single one without ensembling.
        classes: C class names, in the order of the network's channels.
        texts: The texts of each class as they were embedded.
        cosines: (C, C) cosine of each pair of classes.
        threshold: Cosine above which classes count as hardly told apart.
        similar: Those pairs, most similar first.
    """

    dataset: str
    encoder: str
    sha256: str
    templates: tuple[str, ...]
    classes: list[str]
    texts: list[tuple[EmbeddedText, ...]]
    cosines: np.ndarray
    threshold: float
    similar: list[SimilarPair]


def prompts(
    dataset: int | str,
    *,
    prompts: Path | str | None = None,
    text_encoder: str = "bank",
    ensemble_prompts: bool = False,
    threshold: float = SIMILAR,
    output: Path | str | None = None,
) -> PromptOverview:
    """Show what planning would embed for each class, and how alike the classes are to the encoder.

    Reads dataset.json alone, no image and no plans, and writes nothing but the plot that is asked for. Warns of classes
    that are hardly told apart.

    Args:
        dataset: id (501) or folder name ("Dataset501_Name") in `nnUNet_raw`.
        prompts: JSON file with prompts by class name; they override those of dataset.json.
        text_encoder: where embeddings come from, as in `plan_and_preprocess`.
        ensemble_prompts: average every phrase over all templates of the modality.
        threshold: cosine from -1 to 1 above which two classes count as hardly told apart.
        output: PNG file for a plot of the cosines; None: no plot.

    Returns:
        Prompts, their sources, the cosines and the pairs above the threshold.

    Raises:
        UsageError: no such dataset, a threshold that is no cosine, or a plot that is not a PNG.
        DatasetError: dataset.json is missing or incomplete.
        PromptError: a class has no usable prompt or embedding.
        MissingDependencyError: the encoder needs a package that is not installed.
    """
    if output is not None and Path(output).suffix.lower() != ".png":
        raise UsageError(f"-o {output}: the plot is a PNG; give a file name that ends in .png.")
    folder = find_raw_folder(dataset)
    dataset_json = load_dataset_json(folder)
    worded, embedded = embed_dataset(dataset_json, prompts, text_encoder, ensemble=ensemble_prompts)
    classes = [prompt.class_name for prompt in worded]
    cosines = cosine_matrix(embedded.embeddings)
    overview = PromptOverview(
        dataset=folder.name,
        encoder=embedded.encoder,
        sha256=embedded.sha256,
        templates=templates(prompt_modality(dataset_json))[: None if ensemble_prompts else 1],
        classes=classes,
        texts=embedded.texts,
        cosines=cosines,
        threshold=threshold,
        similar=similar_pairs(classes, cosines, threshold),
    )
    _warn_of_similar_classes(overview)
    if output is not None:
        save_png(draw_cosines(overview), output)
    return overview


def format_overview(overview: PromptOverview) -> str:
    """Return an overview as lines of text: prompts with their sources, cosines, pairs that are hardly told apart."""
    lines = [
        f"Dataset   {overview.dataset}",
        f"Encoder   {overview.encoder}, SHA-256 of its weights {overview.sha256}",
        *_beside("Template  ", overview.templates),
        "",
        "Prompts",
        *_prompt_lines(overview),
        "",
        "Cosines of the classes",
        *_cosine_lines(overview),
        "",
        f"Hardly told apart (cosine above {overview.threshold:g})",
        *([f"  {pair}" for pair in overview.similar] or ["  none"]),
    ]
    return "\n".join(lines)


def draw_cosines(overview: PromptOverview) -> Figure:
    """Draw the cosines as a table of colours, with a frame around the pairs that are hardly told apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(overview.classes)
    size = max(3.0, 0.35 * count) + 2
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(overview.cosines, vmin=min(0, overview.cosines.min()), vmax=1, cmap="viridis")
    as_given = {"fontsize": FONT_SIZE, "parse_math": False}
    axes.set_xticks(range(count), overview.classes, rotation=60, ha="right", **as_given)
    axes.set_yticks(range(count), overview.classes, **as_given)
    if count <= MOST_CLASSES_WITH_NUMBERS:
        _write_numbers(axes, overview.cosines)
    _frame_similar(axes, overview)
    axes.set_title(f"{overview.dataset}, {overview.encoder}", **as_given)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"cosine (framed: above {overview.threshold:g})", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    return figure


def _warn_of_similar_classes(overview: PromptOverview) -> None:
    if not overview.similar:
        return
    shown = ", ".join(map(str, overview.similar[:PAIRS_IN_WARNING]))
    more = len(overview.similar) - PAIRS_IN_WARNING
    logger.warning(
        "%s: to the text encoder these classes are nearly the same (cosine above %g): %s%s. Describe what tells them "
        "apart with --prompts FILE or the `prompts` block of dataset.json.",
        overview.dataset,
        overview.threshold,
        shown,
        f" and {more} more pairs" if more > 0 else "",
    )


def _prompt_lines(overview: PromptOverview) -> list[str]:
    """Return a line per text: number and name of the class beside its first one, source, sentence."""
    labels = _labels(overview.classes)
    sources = max(len(text.source) for texts in overview.texts for text in texts)
    return [
        line
        for label, texts in zip(labels, overview.texts, strict=True)
        for line in _beside(f"  {label}  ", [f"{text.source:<{sources}}  {text.sentence}" for text in texts])
    ]


def _cosine_lines(overview: PromptOverview) -> list[str]:
    """Return the matrix, with the numbers of the classes above the columns."""
    labels = _labels(overview.classes)
    header = " " * (2 + len(labels[0])) + "".join(f"{number:>7}" for number in range(1, len(labels) + 1))
    return [header] + [
        f"  {label}" + "".join(f"{cosine:7.3f}" for cosine in row)
        for label, row in zip(labels, overview.cosines, strict=True)
    ]


def _labels(names: Sequence[str]) -> list[str]:
    """Return number and name of each class, all of one length."""
    digits, width = len(str(len(names))), max(map(len, names))
    return [f"{number:>{digits}} {name:<{width}}" for number, name in enumerate(names, 1)]


def _beside(label: str, lines: Sequence[str]) -> list[str]:
    """Put a label before the first line and as much space before the others."""
    return [f"{label if index == 0 else ' ' * len(label)}{line}" for index, line in enumerate(lines)]


def _write_numbers(axes: Axes, cosines: np.ndarray) -> None:
    for (row, column), cosine in np.ndenumerate(cosines):
        color = "black" if cosine > 0.6 else "white"
        axes.text(column, row, f"{cosine:.2f}", ha="center", va="center", color=color, fontsize=FONT_SIZE - 2)


def _frame_similar(axes: Axes, overview: PromptOverview) -> None:
    from matplotlib.patches import Rectangle

    similar = np.triu(overview.cosines > overview.threshold, k=1)
    for row, column in np.argwhere(similar | similar.T):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
