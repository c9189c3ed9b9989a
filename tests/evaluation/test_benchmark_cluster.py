"""Workers as jobs of a cluster, with submitit's local executor in the cluster's place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lgssl_nnunet.errors import MissingDependencyError, UsageError
from lgssl_nnunet.evaluation.benchmark.cluster import ClusterWorker, require_submitit, run_on_cluster
from lgssl_nnunet.evaluation.benchmark.records import CellStore

HERE = Path(__file__).parent


@pytest.fixture
def fakes(monkeypatch):
    """The module of fake cells, importable here and in jobs."""
    pytest.importorskip("submitit")
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    import fake_cells

    return fake_cells


@pytest.mark.slow
def test_jobs_work_through_the_cells_and_each_cell_is_run_once(tmp_path, fakes):
    cells = [fakes.make_cell(seed) for seed in (0, fakes.FAILING, 1, 2)]
    job = fakes.make_job(tmp_path, *cells)
    run_on_cluster(job, 2, "local", {"timeout_min": 5}, progress=False)
    assert sorted(fakes.runs(tmp_path)) == sorted(cell.name for cell in cells)
    statuses = [CellStore(tmp_path, cell).read()["status"] for cell in cells]
    assert statuses == ["finished", "failed", "finished", "finished"]
    assert list((tmp_path / "jobs").glob("*_log.out"))


def test_an_unknown_parameter_is_refused_before_anything_is_submitted(tmp_path, fakes):
    with pytest.raises(UsageError, match=r"--cluster local: .*colour"):
        run_on_cluster(fakes.make_job(tmp_path, fakes.make_cell()), 1, "local", {"colour": "blue"}, progress=False)
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_preempted_job_queues_itself_again(tmp_path, fakes):
    worker = ClusterWorker(fakes.make_job(tmp_path, fakes.make_cell()))
    assert worker.checkpoint().function is worker


def test_without_submitit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingDependencyError, match=r'pip install -c constraints.txt -e "\.\[cluster\]"'):
        require_submitit()
