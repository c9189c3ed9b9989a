"""The page of a report: what its template is given, and how it is filled in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lgssl_nnunet.evaluation.metrics import NOT_ANNOTATED, POLICY, ClassResult
from lgssl_nnunet.evaluation.report.curves import Chart, draw
from lgssl_nnunet.evaluation.report.facts import Fact, class_names
from lgssl_nnunet.evaluation.report.inputs import ReportInputs
from lgssl_nnunet.evaluation.report.overlays import CLASS_COLORS, DIFFERENCE_COLORS, DIFFERENCE_MEANING, CasePictures
from lgssl_nnunet.evaluation.report.tables import heading, results_table
from lgssl_nnunet.evaluation.report.viewer import ViewerCase

GENERATOR = '<meta name="generator" content="lgssl_report">'
_PACKAGE = "lgssl_nnunet.evaluation.report"
_IN_HEADINGS = ("dice", "hd95")
_IN_HEADLINES = 6
_IN_HEADLINE = ("dice", "jaccard", "surface_dice", "hd95", "assd")


@dataclass(frozen=True)
class CaseSection:
    """One case of the page: why it is shown, its results per class, its slices, and its volumes for the viewer."""

    name: str
    reason: str
    results: Sequence[ClassResult]
    pictures: CasePictures
    viewer: ViewerCase | None
    remarks: Sequence[str]

    @property
    def headline(self) -> str:
        """The main metrics of each class in words; of many classes only the worst."""
        measured = [result for result in self.results if not math.isnan(result.dice)]
        if len(measured) <= _IN_HEADLINES:
            return "; ".join(_class_in_words(result) for result in self.results)
        worst = sorted(measured, key=lambda result: result.dice)[:_IN_HEADLINES]
        return f"Worst of {len(measured)} classes: {'; '.join(_class_in_words(result) for result in worst)}"


@dataclass(frozen=True)
class Page:
    """Everything that the page shows; `results` is what `evaluate` returned, `niivue` the viewer's script."""

    inputs: ReportInputs
    facts: Sequence[Fact]
    charts: Sequence[Chart]
    results: Mapping[str, Any] | None
    cases: Sequence[CaseSection]
    notes: Sequence[str]
    niivue: str | None

    @property
    def title(self) -> str:
        """The page's title: dataset and model, or the folder's name, and the group."""
        known = {fact.name: fact.value for fact in self.facts}
        parts = [known[name] for name in ("Dataset", "Trainer", "Plans", "Configuration") if name in known]
        group = f", group {self.inputs.group}" if self.inputs.group is not None else ""
        return (" ".join(parts) or self.inputs.source.name) + group


def render(page: Page) -> str:
    """Return the page as HTML that needs nothing but itself."""
    environment = Environment(
        loader=PackageLoader(_PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    classes = class_names(page.inputs.dataset_json)
    colors = {value: f"#{CLASS_COLORS[(value - 1) % len(CLASS_COLORS)]}" for value in classes}
    return environment.get_template("report.html.j2").render(
        page=page,
        generator=Markup(GENERATOR),
        style=_asset("report.css"),
        scripts=[_asset("report.js")],
        viewer_script=_asset("viewer.js"),
        niivue=Markup(page.niivue or ""),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        policy=POLICY,
        class_table=results_table((page.results or {}).get("classes", ())),
        case_table=results_table((page.results or {}).get("cases", ())),
        means=_means(page.results),
        tolerance=(page.results or {}).get("tolerance"),
        charts=[(chart, Markup(draw(chart))) for chart in page.charts],
        legend=[(classes[value], colors[value]) for value in classes],
        differences=[(kind, DIFFERENCE_MEANING[kind], f"#{color}") for kind, color in DIFFERENCE_COLORS.items()],
        viewer_settings=Markup(_json(_viewer_settings(page))),
    )


def _asset(name: str) -> Markup:
    return Markup((files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8"))


def _viewer_settings(page: Page) -> dict[str, Any]:
    """Return what the viewer's script needs besides the volumes: the label colours, and each case's layers."""
    labels, differences = label_colors(CLASS_COLORS), label_colors(tuple(DIFFERENCE_COLORS.values()))
    cases = [
        {
            "name": case.name,
            "reason": case.reason,
            "layers": list(case.viewer.layers),
            "remark": case.viewer.remark,
            "center": case.viewer.center,
        }
        for case in page.cases
        if case.viewer is not None
    ]
    return {"colors": {"reference": labels, "prediction": labels, "difference": differences}, "cases": cases}


def label_colors(colors: Sequence[str]) -> dict[str, list[int]]:
    """Return NiiVue's table of label colours: 0 is transparent, 1 has the first of the colours ("rrggbb")."""
    red, green, blue = (list(channel) for channel in zip((0, 0, 0), *map(bytes.fromhex, colors), strict=True))
    alpha = [0] + [255] * len(colors)
    return {"R": red, "G": green, "B": blue, "A": alpha, "I": list(range(len(alpha)))}


def _json(content: Any) -> str:
    """Return JSON that may stand inside a script element."""
    return json.dumps(content).replace("<", "\\u003c")


def _class_in_words(result: ClassResult) -> str:
    texts = [text for name in _IN_HEADINGS if (text := _in_words(name, getattr(result, name)))]
    nothing = "not annotated" if result.status == NOT_ANNOTATED else "absent in both"
    return f"{result.name}: {', '.join(texts) or nothing}"


def _in_words(name: str, value: float | None) -> str:
    """Return a metric with its name and unit, "" if it was not measured."""
    if value is None or math.isnan(value):
        return ""
    label = heading(name).removesuffix(" [mm]")
    return f"{label} {value:.1f} mm" if heading(name).endswith(" [mm]") else f"{label} {value:.4f}"


def _means(results: Mapping[str, Any] | None) -> list[str]:
    """Return the main means over the classes in words."""
    means = (results or {}).get("means", {})
    return [text for name in _IN_HEADLINE if (text := _in_words(name, means.get(name)))]
