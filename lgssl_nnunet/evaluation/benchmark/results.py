"""The finished cells of a benchmark folder as two tidy tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lgssl_nnunet.evaluation.benchmark.cells import Cell
from lgssl_nnunet.evaluation.benchmark.grid import ALL
from lgssl_nnunet.evaluation.benchmark.records import FAILED, FINISHED, CellStore, all_records

SETTING = ["dataset", "configuration", "planner", "spacing", "iterations"]
"""What must agree for two methods to be compared."""

RUN = ["budget", "labeled", "method", "seed"]
"""What tells the cells of one setting apart; `labeled` is the number of labelled cases."""

COUNTS = ("n_", "lesions_")
METRICS_FIRST = ("dice", "jaccard")


@dataclass(frozen=True)
class Results:
    """What a benchmark folder holds.

    Attributes:
        cases: one row per cell, test case and class: SETTING, RUN, `case`, `label`, `class`, and the columns of the
            evaluation's table.
        cells: one row per cell: SETTING, RUN, status, mean of each metric over the classes, times, versions, hardware.
        records: the record of each finished cell, in the order of `cells`.
        failed: the record of each failed cell.
    """

    cases: pd.DataFrame
    cells: pd.DataFrame
    records: list[dict[str, Any]]
    failed: list[dict[str, Any]]

    def settings(self) -> list[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
        """Return each setting with its rows of `cases` and of the finished `cells`."""
        if self.cases.empty:
            return []
        cells = dict(list(self.cells[self.cells["status"] == FINISHED].groupby(SETTING)))
        groups = self.cases.groupby(SETTING)
        return [(dict(zip(SETTING, key, strict=True)), rows, cells[key]) for key, rows in groups]


def load_results(folder: Path) -> Results:
    """Read every cell of a benchmark folder; cells whose files are damaged count as not there."""
    cases, cells, records, failed = [], [], [], []
    for store, record in all_records(folder):
        if store.is_intact(record):
            rows = _case_rows(store, record)
            cases.append(rows)
            cells.append(_cell_row(store.cell, record) | _means(rows))
            records.append(record)
        elif record["status"] == FAILED:
            cells.append(_cell_row(store.cell, record))
            failed.append(record)
    empty = pd.DataFrame(columns=[*SETTING, *RUN])
    return Results(
        pd.concat(cases, ignore_index=True) if cases else empty,
        pd.DataFrame(cells) if cells else empty,
        records,
        failed,
    )


def metric_columns(cases: pd.DataFrame) -> list[str]:
    """Return the columns that hold a metric, Dice and Jaccard first; voxel and lesion counts are none."""
    others = {*SETTING, *RUN, "case", "label", "class", "status"}
    found = [
        name
        for name in cases.columns
        if name not in others and not name.startswith(COUNTS) and pd.api.types.is_numeric_dtype(cases[name])
    ]
    first = [name for name in METRICS_FIRST if name in found]
    return first + [name for name in found if name not in first]


def class_means(cases: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the mean over the test cases of each class, and over the classes, of each cell of one setting.

    Args:
        cases: rows of `Results.cases` of one setting.
        metric: a metric column; where it is empty (class absent from both masks) the case does not count.

    Returns:
        One row per budget, number of labelled cases, method and seed; one column per class, and "mean".
    """
    classes = list(dict.fromkeys(cases["class"]))
    means = cases.groupby([*RUN, "class"], sort=False)[metric].mean().unstack("class")[classes]
    return means.assign(mean=means.mean(axis=1))


def _case_rows(store: CellStore, record: Mapping[str, Any]) -> pd.DataFrame:
    text = {"case": str, "key": str, "name": str, "status": str}  # a case called 007 is no number, a class NA no gap
    rows = pd.read_csv(store.cases_file, dtype=text, keep_default_na=False, na_values=["", "nan"])
    rows = rows.rename(columns={"key": "label", "name": "class"})
    for position, (name, value) in enumerate(_coordinates(store.cell, record).items()):
        rows.insert(position, name, value)
    return rows


def _means(rows: pd.DataFrame) -> dict[str, float]:
    return {name: float(class_means(rows, name)["mean"].iloc[0]) for name in metric_columns(rows)}


def _coordinates(cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataset": cell.dataset,
        "configuration": cell.configuration,
        "planner": cell.planner,
        "spacing": " ".join(f"{length:g}" for length in cell.spacing or ()),
        "iterations": cell.iterations,
        "budget": ALL if cell.budget is None else str(cell.budget),
        "labeled": len(record["labeled"]) if "labeled" in record else cell.budget,
        "method": cell.method,
        "seed": cell.seed,
    }


def _cell_row(cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
    seconds = {f"{step}_seconds": value for step, value in (record.get("seconds") or {}).items()}
    versions = {f"version_{name}": value for name, value in (record.get("versions") or {}).items()}
    return {
        **_coordinates(cell, record),
        "status": record["status"],
        "error": record.get("error"),
        "trained_before": record.get("adopted"),
        "training_seconds": record.get("training_seconds"),
        **seconds,
        "started": record.get("started"),
        "finished": record.get("finished"),
        **(record.get("hardware") or {}),
        **versions,
        "plans": record.get("plans"),
        "model": record.get("model"),
        "command": record.get("command"),
    }
