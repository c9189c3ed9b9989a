"""The curves of a run: every loss term per epoch as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lgssl_nnunet.files import write_atomically


class TermLog:
    """Rows of named values, one per epoch; the whole table lives in the checkpoint."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Record an epoch, replacing it and everything after it if it was there (a resumed run)."""
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows.append({"epoch": epoch, **values})

    def names(self) -> list[str]:
        """Return the column names besides the epoch, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "epoch"))

    def write_csv(self, path: Path) -> None:
        """Write the table; missing values stay empty."""

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["epoch", *self.names()])
                writer.writeheader()
                writer.writerows(self.rows)

        write_atomically(path, write)

    def plot(self, path: Path) -> None:
        """Draw one small panel per column over epochs."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = self.names()
        figure = Figure(figsize=(7, 1.8 * max(len(names), 1)), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, name in zip(
            figure.subplots(max(len(names), 1), 1, sharex=True, squeeze=False)[:, 0], names, strict=False
        ):
            points = [(row["epoch"], row[name]) for row in self.rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
            axis.set_title(name, loc="left", fontsize=9)
            axis.grid(alpha=0.3)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
