"""Tables and pictures of a benchmark folder, and the command that makes them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from lgssl_nnunet.cli import benchmark as command
from lgssl_nnunet.evaluation.benchmark.benchmark import BenchmarkResult
from lgssl_nnunet.evaluation.benchmark.plots import box_plots, dice_over_budget
from lgssl_nnunet.evaluation.benchmark.records import CellStore
from lgssl_nnunet.evaluation.benchmark.results import load_results
from lgssl_nnunet.evaluation.benchmark.tables import markdown, p_value, spread
from lgssl_nnunet.evaluation.benchmark.worker import work

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fakes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        import fake_cells

        yield fake_cells


@pytest.fixture(scope="module")
def made(tmp_path_factory, fakes):
    cells = [fakes.make_cell(seed, trainer) for seed in (0, 1) for trainer in ("SupervisedTrainer", "LGSSLTrainer")]
    cells += [fakes.make_cell(0, budget=None), fakes.make_cell(fakes.FAILING, settings=(("dropout", 0.5),))]
    folder = tmp_path_factory.mktemp("made")
    work(fakes.make_job(folder, *cells))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """Two methods and two seeds with 4 labels, the baseline with all, and a cell that fails."""
    return shutil.copytree(made, tmp_path / "benchmark")


def run(*words: str) -> int:
    return command.main([*words])


def test_the_tidy_table_has_a_row_per_cell_case_and_class(folder):
    assert run("--tables_only", "-o", str(folder)) == 0
    table = pd.read_csv(folder / "results_per_case.csv", dtype={"case": str, "budget": str}, keep_default_na=False)
    assert len(table) == 5 * 2 * 2
    row = table[(table["method"] == "LGSSLTrainer") & (table["seed"] == 1) & (table["case"] == "007")]
    assert row[["dataset", "budget", "labeled", "iterations", "label", "class", "dice"]].to_numpy().tolist() == [
        ["Dataset901_Phantom", "4", 4, 10, 1, "liver", 0.63],
        ["Dataset901_Phantom", "4", 4, 10, 2, "NA", 0.51],
    ]


def test_the_table_of_cells_has_a_row_for_each_with_status_and_provenance(folder, fakes):
    run("--tables_only", "-o", str(folder))
    table = pd.read_csv(folder / "results_per_cell.csv")
    assert sorted(table["status"]) == ["failed"] + ["finished"] * 5
    failed = table[table["status"] == "failed"].iloc[0]
    assert (failed["method"], failed["error"]) == ("SupervisedTrainer:dropout=0.5", "ValueError: too many\nlayers")
    finished = table[(table["status"] == "finished") & (table["budget"] == "all")].iloc[0]
    assert finished["dice"] == pytest.approx((0.71 + 0.6) / 2)
    assert finished["labeled"] == 10
    for column in ("version_torch", "device", "processor", "started", "training_seconds", "command"):
        assert not pd.isna(finished[column])


def test_the_page_shows_means_spread_gap_and_test(folder):
    run("--tables_only", "-o", str(folder))
    lines = (folder / "results.md").read_text().splitlines()
    # Dice of a class: mean of 0.5 + 0.02 and 0.5, 0.01 more with seed 1; the other class 0.1 below the first case.
    assert (
        "| labels | method | seeds | Dice liver | Dice NA | Dice mean | gain | gap closed | p (Holm) | training [min] |"
        in lines
    )
    assert "| 4 | SupervisedTrainer | 2 | 51.5 ± 0.7 | 40.5 ± 0.7 | 46.0 ± 0.7 | - | - | - | 2 |" in lines
    # Only seed 0 has all three: (0.1) / (0.2).
    assert "| 4 | LGSSLTrainer | 2 | 61.5 ± 0.7 | 50.5 ± 0.7 | 56.0 ± 0.7 | +10.0 ± 0.0 | 50 % | 0.500 | 2 |" in lines
    assert "| all (10) | SupervisedTrainer | 1 | 71.0 | 60.0 | 65.5 | - | - | - | 2 |" in lines
    text = "\n".join(lines)
    for words in (
        "With 2 cases p cannot be smaller than 0.500",
        "SupervisedTrainer, dropout=0.5, labels 4, seed 13: ValueError: too many layers",
        "`lgssl_benchmark -d 901`",
        "Versions: python",
        "Hardware: cpu",
        "Training: 0.1 hours in 5 trainings",
    ):
        assert words in text


def test_cells_of_another_setting_have_a_table_of_their_own(folder, fakes):
    work(fakes.make_job(folder, fakes.make_cell(iterations=20), fakes.make_cell(spacing=(1.0, 1.0, 2.5))))
    page = markdown(load_results(folder), "SupervisedTrainer")
    titles = [line for line in page.splitlines() if line.startswith("## Dataset901")]
    assert titles == [
        "## Dataset901_Phantom, 3d_fullres, LGSSLPlannerCPU, 10 iterations",
        "## Dataset901_Phantom, 3d_fullres, LGSSLPlannerCPU, 20 iterations",
        "## Dataset901_Phantom, 3d_fullres, LGSSLPlannerCPU, spacing 1 1 2.5 mm, 10 iterations",
    ]


def test_another_reference_is_tested_against(folder):
    run("--tables_only", "-o", str(folder), "--reference", "LGSSLTrainer")
    table = pd.read_csv(folder / "tests.csv", dtype={"budget": str})
    assert table[["reference", "budget", "method", "cases", "seeds"]].to_numpy().tolist() == [
        ["LGSSLTrainer", "4", "SupervisedTrainer", 2, 2]
    ]
    assert table["difference"].iloc[0] == pytest.approx(-0.1)


def test_a_reference_without_a_cell_is_said_to_be_missing(folder):
    run("--tables_only", "-o", str(folder), "--reference", "MCFTrainer")
    assert "No test: MCFTrainer, the reference, has no finished cell here." in (folder / "results.md").read_text()


def test_the_latex_table_escapes_names_and_signs(folder):
    run("--tables_only", "-o", str(folder))
    text = (folder / "results.tex").read_text()
    assert r"Dataset901\_Phantom" in text
    assert r"4 & LGSSLTrainer & 2 & 61.5 $\pm$ 0.7" in text
    assert r"50 \%" in text
    assert r"\toprule" in text


def test_pictures_are_drawn_for_the_budgets_and_for_each_budget(folder):
    run("--tables_only", "-o", str(folder))
    files = sorted((folder / "plots").iterdir())
    name = "Dataset901_Phantom_3d_fullres_LGSSLPlannerCPU_i10"
    assert [file.name for file in files] == [f"dice_over_budget_{name}.png", f"dice_per_class_{name}_labeled4.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_names_that_look_like_formulas_are_drawn_as_they_stand(tmp_path):
    formula = r"liver $\foo$ $x_{$"
    columns = ("dataset", "method", "budget", "labeled", "seed", "class", "case", "dice")
    rows = [("D", formula, str(size), size, 0, formula, case, 0.5) for size in (2, 4) for case in "ab"]
    cases = pd.DataFrame(rows, columns=columns)
    for figure in (dice_over_budget(cases, formula), box_plots(cases, formula)):
        figure.savefig(tmp_path / "plot.png")


def test_a_damaged_cell_is_in_no_table(folder, fakes):
    store = CellStore(folder, fakes.make_cell(0, budget=None))
    (store.prediction / "a.nii.gz").unlink()
    run("--tables_only", "-o", str(folder))
    assert "all (10)" not in (folder / "results.md").read_text()


def test_a_folder_without_finished_cells_gives_a_page_that_says_so(tmp_path, fakes):
    work(fakes.make_job(tmp_path, fakes.make_cell(fakes.FAILING)))
    assert run("--tables_only", "-o", str(tmp_path)) == 0
    assert "No cell is finished yet." in (tmp_path / "results.md").read_text()
    assert "ValueError: too many layers" in (tmp_path / "results.md").read_text()


def test_tables_of_a_folder_that_is_no_benchmark_are_refused_and_nothing_is_written(tmp_path, capsys):
    assert run("--tables_only", "-o", str(tmp_path)) == 2
    assert "holds no benchmark" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mean", "deviation", "metric", "text"),
    [
        (0.8333, 0.0042, "dice", "83.3 ± 0.4"),
        (0.8333, float("nan"), "dice", "83.3"),
        (3.456, 0.123, "hd95", "3.46 ± 0.12"),
        (float("nan"), float("nan"), "dice", "-"),
    ],
)
def test_values_are_shown_in_percent_or_millimetres_with_their_spread(mean, deviation, metric, text):
    assert spread(mean, deviation, metric) == text


def test_small_p_values_are_bounded():
    assert [p_value(0.0004), p_value(0.0312), p_value(1.0)] == ["< 0.001", "0.031", "1.000"]


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_passes_what_was_typed_and_fails_when_cells_failed(tmp_path, monkeypatch, capsys, fakes):
    seen = {}
    (tmp_path / "results.md").write_text("the page")

    def fake(*positional, **options):
        seen.update(options, positional=positional)
        return BenchmarkResult(tmp_path, {"results.md": tmp_path / "results.md"}, [], unfinished)

    monkeypatch.setattr("lgssl_nnunet.evaluation.benchmark.benchmark.benchmark", fake)
    unfinished = {}
    words = ["-d", "510", "501", "--trainers", "SupervisedTrainer", "LGSSLTrainer:dropout=0", "--budgets", "4", "all"]
    words += ["--seeds", "0", "3", "--iterations", "7", "-c", "2d", "-pl", "LGSSLPlannerCPU", "-o", "a folder"]
    words += ["--overwrite_target_spacing", "1", "1", "2", "--workers", "2", "--cluster", "local", "-device", "cpu"]
    words += ["--cluster_options", "timeout_min=5", "slurm_partition=gpu", "-np", "0", "--no_pbar"]
    assert run(*words) == 0
    assert seen == {
        "positional": (["510", "501"], ["SupervisedTrainer", "LGSSLTrainer:dropout=0"], ["4", "all"], [0, 3]),
        "iterations": 7,
        "configuration": "2d",
        "planner": "LGSSLPlannerCPU",
        "overwrite_target_spacing": [1.0, 1.0, 2.0],
        "output": "a folder",
        "reference": "SupervisedTrainer",
        "workers": 2,
        "cluster": "local",
        "cluster_options": {"timeout_min": 5, "slurm_partition": "gpu"},
        "device": "cpu",
        "num_processes": 0,
        "tables_only": False,
        "command": f"lgssl_benchmark {' '.join(words)}".replace("a folder", "'a folder'"),
        "progress": False,
    }
    unfinished = {fakes.make_cell(): "memory ran out"}
    assert run("-d", "1") == 1
    assert (
        "No result: Dataset901_Phantom SupervisedTrainer, 4 labels, seed 0: memory ran out" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-d", "901", "--workers", "-1"], "--workers -1"),
        (["-d", "901", "--cluster", "cloud"], "--cluster cloud: give slurm or local"),
        (["-d", "901", "--cluster_options", "timeout"], "NAME=VALUE, not timeout"),
        (["-d", "901", "--reference", "LGSLTrainer"], "did you mean LGSSLTrainer"),
        ([], "-d: give one or more datasets"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_submitit_is_asked_for_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert run("-d", "901", "--cluster", "local") == 2
    assert '-e ".[cluster]"' in capsys.readouterr().err
