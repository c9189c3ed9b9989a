"""Training curves of a model as charts for a page: nnU-Net's losses and pseudo Dice, and every term of the loss."""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lgssl_nnunet.figures import MISSING_GLYPH

TERMS_FILE = "lgssl_terms.csv"
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b")
_INK = "#010203"
_EPOCH = re.compile(r": Epoch (\d+)\s*$")
_VALUE = re.compile(r": (train_loss|val_loss|Current learning rate:|Epoch time:) ([-+.\deEnaif]+)")
_PSEUDO_DICE = re.compile(r": Pseudo dice \[(.*)\]")
_NUMBER = re.compile(r"nan|[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
_HYPERPARAMETERS = re.compile(r": Hyper-parameters: (.*)")

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """One panel of the curves.

    Attributes:
        title: what is drawn.
        lines: points (epoch, value) by label.
    """

    title: str
    lines: dict[str, Points]

    @property
    def summary(self) -> str:
        """First and last value of each line in words, for those who do not see the chart."""
        parts = [
            f"{label}: {points[0][1]:.4g} in epoch {points[0][0]:.0f}, {points[-1][1]:.4g} in epoch {points[-1][0]:.0f}"
            for label, points in self.lines.items()
            if points
        ]
        return f"{self.title}. {'; '.join(parts)}."


@dataclass(frozen=True)
class TrainingLog:
    """What nnU-Net's training logs of one fold say.

    Attributes:
        rows: values by name for each epoch.
        hyperparameters: the method's values as text, "" if the logs do not say.
    """

    rows: dict[int, dict[str, float]]
    hyperparameters: str

    @property
    def seconds(self) -> float:
        """Time of all epochs."""
        return math.fsum(row.get("epoch time", 0.0) for row in self.rows.values())


def read_training_log(fold: Path, classes: Sequence[str]) -> TrainingLog:
    """Read nnU-Net's training logs of a fold, the oldest first, so that a continued run replaces what it repeated.

    Args:
        fold: the fold folder.
        classes: class names, for the pseudo Dice.
    """
    rows: dict[int, dict[str, float]] = {}
    hyperparameters, epoch = "", None
    for file in sorted(fold.glob("training_log_*.txt")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := _EPOCH.search(line):
                epoch = int(match[1])
                rows = {number: row for number, row in rows.items() if number < epoch} | {epoch: {}}
            elif match := _HYPERPARAMETERS.search(line):
                hyperparameters = match[1].strip()
            elif epoch is not None:
                rows[epoch].update(_values(line, classes))
    return TrainingLog(rows, hyperparameters)


def _values(line: str, classes: Sequence[str]) -> dict[str, float]:
    if match := _VALUE.search(line):
        return {match[1].rstrip(":").lower(): float(match[2])}
    if match := _PSEUDO_DICE.search(line):
        numbers = [float(number) for number in _NUMBER.findall(re.sub(r"np\.float\d+", "", match[1]))]
        names = classes if len(classes) == len(numbers) else [f"class {i + 1}" for i in range(len(numbers))]
        return {f"pseudo Dice {name}": number for name, number in zip(names, numbers, strict=True)}
    return {}


def read_terms(fold: Path) -> dict[str, Points]:
    """Return every column of lgssl_terms.csv over epochs, {} if the fold has no such file."""
    file = fold / TERMS_FILE
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in (rows[0] if rows else {}) if name != "epoch"]
    return {name: tuple((float(row["epoch"]), float(row[name])) for row in rows if row[name]) for name in names}


def charts(folds: Sequence[Path], classes: Sequence[str]) -> list[Chart]:
    """Return the charts of a model, each with a line per fold.

    Args:
        folds: the fold folders.
        classes: class names, for the pseudo Dice.
    """
    panels: dict[str, dict[str, Points]] = {}
    for fold in folds:
        suffix = f", fold {fold.name.removeprefix('fold_')}" if len(folds) > 1 else ""
        rows = read_training_log(fold, classes).rows
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        for name in names:
            points = tuple((float(epoch), row[name]) for epoch, row in rows.items() if name in row)
            panels.setdefault(_panel(name), {})[_line(name) + suffix] = points
        for name, points in read_terms(fold).items():
            panels.setdefault(f"Term: {name}", {})[name + suffix] = points
    last = [title for title in ("Learning rate",) if title in panels]
    order = [title for title in panels if title and title not in last] + last
    return [Chart(title, panels[title]) for title in order]


def _panel(name: str) -> str:
    """Return the title of the chart that a value of the log belongs to, "" for none."""
    if name in ("train_loss", "val_loss"):
        return "Loss"
    if name.startswith("pseudo Dice"):
        return "Pseudo Dice on patches"
    return {"current learning rate": "Learning rate"}.get(name, "")


def _line(name: str) -> str:
    return {"train_loss": "training", "val_loss": "validation patches"}.get(name, name.removeprefix("pseudo Dice "))


def draw(chart: Chart) -> str:
    """Return a chart as inline SVG that takes its text colour from the page."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9, "text.color": _INK}
    settings |= dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    settings |= {"text.parse_math": False}  # names of classes stand as they were given
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axis = figure.subplots()
        for position, (label, points) in enumerate(chart.lines.items()):
            marker = "." if len(points) < 40 else ""
            color = LINE_COLORS[position % len(LINE_COLORS)]
            axis.plot(*zip(*points, strict=True), marker=marker, color=color, linewidth=1.5, label=label)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(chart.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
        stream = io.StringIO()
        figure.set_canvas(FigureCanvasSVG(figure))
        warnings.filterwarnings("ignore", MISSING_GLYPH)  # the text stays text, which the reader's browser draws
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue())


def _inline(svg: str) -> str:
    """Return the SVG element without fixed size, and without ids that several charts of one page would share."""
    element = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    referenced = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', element))
    element = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in referenced else "", element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1), count=1
    )


def hyperparameters(folds: Sequence[Path]) -> Mapping[str, str]:
    """Return the method's hyper-parameters by name, as the newest log of the first fold that tells them has them."""
    for fold in folds:
        text = read_training_log(fold, ()).hyperparameters
        inside = text[text.find("(") + 1 : text.rfind(")")]
        if inside:
            pairs = re.findall(r"(\w+)=((?:\([^)]*\)|\[[^\]]*\]|'[^']*'|[^,])*)", inside)
            return {name: value.strip("'") for name, value in pairs}
    return {}
