"""The curves of a run."""

from __future__ import annotations

import csv

from lgssl_nnunet.engine.logs import TermLog


def log(*epochs: int, **values: float) -> TermLog:
    made = TermLog()
    for epoch in epochs:
        made.add(epoch, {"supervised": 1.0 / (epoch + 1), **values})
    return made


def test_the_table_has_a_row_per_epoch_and_a_column_per_term(tmp_path):
    made = log(0, 1, agreement=0.25)
    made.write_csv(tmp_path / "terms.csv")
    with (tmp_path / "terms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "0", "supervised": "1.0", "agreement": "0.25"},
        {"epoch": "1", "supervised": "0.5", "agreement": "0.25"},
    ]


def test_a_term_that_comes_later_leaves_earlier_cells_empty(tmp_path):
    made = log(0)
    made.add(1, {"supervised": 0.5, "late": 2.0})
    made.write_csv(tmp_path / "terms.csv")
    assert (tmp_path / "terms.csv").read_text().splitlines() == ["epoch,supervised,late", "0,1.0,", "1,0.5,2.0"]


def test_a_resumed_run_replaces_the_epochs_that_it_repeats():
    made = log(0, 1, 2, 3)
    made.add(2, {"supervised": 9.0})
    assert [row["epoch"] for row in made.rows] == [0, 1, 2]
    assert made.rows[-1]["supervised"] == 9.0


def test_the_picture_is_a_png_even_before_the_first_epoch(tmp_path):
    log(0, 1, agreement=0.25).plot(tmp_path / "progress.png")
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG"
    TermLog().plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes()[:4] == b"\x89PNG"
