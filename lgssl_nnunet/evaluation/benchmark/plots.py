"""Pictures of a benchmark: Dice over the number of labelled cases, and box plots per class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lgssl_nnunet.evaluation.benchmark.comparison import over_seeds
from lgssl_nnunet.evaluation.benchmark.grid import ALL
from lgssl_nnunet.evaluation.benchmark.results import Results
from lgssl_nnunet.figures import save_png
from lgssl_nnunet.inference.models import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT_SIZE = 9  # said everywhere: nnU-Net's plotting changes matplotlib's default for the whole process
UPPER_BOUND = f"{BASELINE}, all labels"


def draw_plots(results: Results, folder: Path) -> list[Path]:
    """Draw every picture that the results allow.

    Args:
        results: what the benchmark folder holds.
        folder: where the PNG files go.

    Returns:
        The files.
    """
    files = []
    for setting, cases, _ in results.settings():
        name = _file_name(setting)
        if cases["labeled"].nunique() > 1:
            files.append(_save(dice_over_budget(cases, setting["dataset"]), folder / f"dice_over_budget_{name}.png"))
        for budget, rows in cases.groupby("budget", sort=False):
            if budget != ALL:
                shown = pd.concat([rows, _upper_bound(cases)])
                title = f"{setting['dataset']}, {budget} labelled cases"
                files.append(_save(box_plots(shown, title), folder / f"dice_per_class_{name}_labeled{budget}.png"))
    return files


def dice_over_budget(cases: pd.DataFrame, title: str) -> Figure:
    """Draw mean Dice over the number of labelled cases, a line per method with its spread over seeds.

    Args:
        cases: rows of `Results.cases` of one setting.
        title: above the picture.
    """
    figure = _new_figure(6, 4)
    axes = figure.subplots()
    scores = over_seeds(cases, "dice")
    sizes = cases.groupby("budget")["labeled"].first()
    table = pd.DataFrame({"mean": scores["mean"]["mean"], "std": scores["std"]["mean"]}).reset_index()
    table["labeled"] = table["budget"].map(sizes)
    for method, rows in table.groupby("method", sort=False):
        rows = rows.sort_values("labeled")
        axes.errorbar(
            rows["labeled"], 100 * rows["mean"], 100 * rows["std"].fillna(0), marker="o", capsize=3, label=method
        )
    upper = table[(table["method"] == BASELINE) & (table["budget"] == ALL)]
    if not upper.empty:
        axes.axhline(100 * upper["mean"].iloc[0], color="0.5", linestyle="--", linewidth=1, label=UPPER_BOUND)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes.unique()), [str(size) for size in sorted(sizes.unique())], fontsize=FONT_SIZE)
    axes.minorticks_off()
    axes.set_xlabel("labelled cases", fontsize=FONT_SIZE)
    axes.set_ylabel("Dice [%], mean over classes", fontsize=FONT_SIZE)
    axes.set_title(title, fontsize=FONT_SIZE, parse_math=False)
    axes.tick_params(labelsize=FONT_SIZE)
    for name in axes.legend(fontsize=FONT_SIZE - 2).get_texts():
        name.set_parse_math(False)
    return figure


def box_plots(cases: pd.DataFrame, title: str) -> Figure:
    """Draw a box per method and class over the test cases, each averaged over the seeds.

    Args:
        cases: rows of `Results.cases`, of one setting and budget.
        title: above the picture.
    """
    per_case = cases.groupby(["method", "class", "case"], sort=False)["dice"].mean()
    methods, classes = (list(dict.fromkeys(cases[column])) for column in ("method", "class"))
    figure = _new_figure(max(4, 0.5 * len(methods) + 1) * len(classes) / 1.5 + 1, 4.5)
    for axes, name in zip(figure.subplots(1, len(classes), squeeze=False, sharey=True)[0], classes, strict=True):
        values = [100 * per_case[method][name].dropna().to_numpy() for method in methods]
        axes.boxplot(values)
        small = {"fontsize": FONT_SIZE - 2, "parse_math": False}
        axes.set_xticks(range(1, len(methods) + 1), methods, rotation=60, ha="right", **small)
        axes.set_title(name, fontsize=FONT_SIZE, parse_math=False)
        axes.tick_params(axis="y", labelsize=FONT_SIZE)
    figure.axes[0].set_ylabel("Dice [%]", fontsize=FONT_SIZE)
    figure.suptitle(title, fontsize=FONT_SIZE, parse_math=False)
    return figure


def _upper_bound(cases: pd.DataFrame) -> pd.DataFrame:
    rows = cases[(cases["method"] == BASELINE) & (cases["budget"] == ALL)]
    return rows.assign(method=UPPER_BOUND)


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> Path:
    save_png(figure, file)
    return file


def _file_name(setting: Mapping[str, Any]) -> str:
    words = [setting["dataset"], setting["configuration"], setting["planner"], f"i{setting['iterations']}"]
    words += [f"sp{setting['spacing']}"] if setting["spacing"] else []
    return re.sub(r"[^A-Za-z0-9._-]+", "x", "_".join(map(str, words)))
