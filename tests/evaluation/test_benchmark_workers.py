"""Who works on which cell of a benchmark folder, and what is left when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from lgssl_nnunet.errors import TrainingStopped
from lgssl_nnunet.evaluation.benchmark.records import CellStore
from lgssl_nnunet.evaluation.benchmark.worker import DIED, attempt, sources_of, work
from lgssl_nnunet.evaluation.benchmark.workers import divided_cores, run_workers

HERE = Path(__file__).parent
SCRIPT = """
import sys
import time
from pathlib import Path
import fake_cells
from lgssl_nnunet.evaluation.benchmark.worker import work

folder, together = Path(sys.argv[1]), int(sys.argv[3])
seeds = [int(word) for word in sys.argv[4:]]
(folder / f"ready_{sys.argv[2]}").touch()
while len(list(folder.glob("ready_*"))) < together:
    time.sleep(0.01)
work(fake_cells.make_job(folder, *map(fake_cells.make_cell, seeds), session=sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """The module of fake cells, importable here and in worker processes."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    import fake_cells

    return fake_cells


def record_of(folder: Path, cell) -> dict:
    return json.loads((CellStore(folder, cell).place / "cell.json").read_text())


def start_process(folder: Path, session: str, *seeds: int, together: int = 1) -> subprocess.Popen:
    """Work on the cells of these seeds, as soon as `together` processes are ready for it."""
    words = [str(folder), session, str(together), *map(str, seeds)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words])


def test_a_finished_cell_is_not_run_again(tmp_path, fakes):
    cells = [fakes.make_cell(0), fakes.make_cell(1)]
    work(fakes.make_job(tmp_path, *cells))
    work(fakes.make_job(tmp_path, *cells, fakes.make_cell(2), session="second"))
    assert fakes.runs(tmp_path) == [cell.name for cell in (*cells, fakes.make_cell(2))]


def test_a_record_tells_versions_hardware_command_and_times(tmp_path, fakes):
    cell = fakes.make_cell()
    work(fakes.make_job(tmp_path, cell))
    record = record_of(tmp_path, cell)
    assert record["cell"] == cell.identity()
    assert record["status"] == "finished"
    assert record["command"] == "lgssl_benchmark -d 901"
    assert record["versions"].keys() >= {"python", "lgssl_nnunet", "nnunetv2", "torch", "commit"}
    assert record["hardware"].keys() == {"device", "processor", "cores", "system"}
    assert record["started"] <= record["finished"]


def test_what_the_steps_say_goes_to_the_cells_log_alone(tmp_path, fakes, caplog):
    cell = fakes.make_cell()
    work(fakes.make_job(tmp_path, cell))
    log = CellStore(tmp_path, cell).log.read_text()
    assert "nnU-Net says something" in log
    assert "INFO A step says something" in log
    assert "A step says something" not in caplog.text


def test_a_failure_is_recorded_and_does_not_stop_the_rest(tmp_path, fakes):
    failing, good = fakes.make_cell(fakes.FAILING), fakes.make_cell(1)
    work(fakes.make_job(tmp_path, failing, good))
    record = record_of(tmp_path, failing)
    assert (record["status"], record["error"]) == ("failed", "ValueError: too many\nlayers")
    assert "fake_cells.py" in record["traceback"]
    assert record_of(tmp_path, good)["status"] == "finished"


def test_a_failed_cell_is_tried_once_per_call(tmp_path, fakes):
    failing = fakes.make_cell(fakes.FAILING)
    for session in ("first", "first", "second"):
        work(fakes.make_job(tmp_path, failing, session=session))
    assert fakes.runs(tmp_path) == [failing.name] * 2


def test_an_interrupted_cell_is_begun_again_by_the_next_call(tmp_path, fakes):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    cell = fakes.make_cell()
    with pytest.raises(KeyboardInterrupt):
        work(fakes.make_job(tmp_path, cell, run=interrupted))
    assert record_of(tmp_path, cell)["status"] == "running"
    work(fakes.make_job(tmp_path, cell, session="second"))
    assert record_of(tmp_path, cell)["status"] == "finished"


def spoil_record(store: CellStore) -> None:
    file = store.place / "cell.json"
    file.write_text(file.read_text()[:-20])


def put_another_cell(store: CellStore) -> None:
    file = store.place / "cell.json"
    record = json.loads(file.read_text())
    record["cell"]["seed"] = 5
    file.write_text(json.dumps(record))


def spoil_segmentation(store: CellStore) -> None:
    (store.prediction / "a.nii.gz").write_bytes(b"")


def remove_segmentation(store: CellStore) -> None:
    (store.prediction / "a.nii.gz").unlink()


def spoil_table(store: CellStore) -> None:
    store.cases_file.write_text(store.cases_file.read_text().replace("0.5", "0.9"))


def remove_predictions(store: CellStore) -> None:
    for file in store.prediction.iterdir():
        file.unlink()
    store.prediction.rmdir()


@pytest.mark.parametrize(
    "spoil",
    [spoil_record, put_another_cell, spoil_segmentation, remove_segmentation, spoil_table, remove_predictions],
)
def test_a_cell_of_which_anything_is_damaged_is_done_again(spoil, tmp_path, fakes):
    cell, other = fakes.make_cell(), fakes.make_cell(1)
    work(fakes.make_job(tmp_path, cell, other))
    store = CellStore(tmp_path, cell)
    spoil(store)
    work(fakes.make_job(tmp_path, cell, other, session="second"))
    assert fakes.runs(tmp_path) == [cell.name, other.name, cell.name]
    assert store.is_intact(store.read())


def test_a_file_that_somebody_adds_to_the_predictions_changes_nothing(tmp_path, fakes):
    cell = fakes.make_cell()
    work(fakes.make_job(tmp_path, cell))
    (CellStore(tmp_path, cell).prediction / "report.html").write_text("looked at")
    work(fakes.make_job(tmp_path, cell, session="second"))
    assert fakes.runs(tmp_path) == [cell.name]


def test_two_processes_on_one_folder_run_every_cell_once(tmp_path, fakes):
    processes = [start_process(tmp_path, session, *range(6), together=2) for session in ("first", "second")]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert sorted(fakes.runs(tmp_path)) == sorted(fakes.make_cell(seed).name for seed in range(6))
    assert len({record_of(tmp_path, fakes.make_cell(seed))["pid"] for seed in range(6)}) == 2


def test_a_cell_that_another_process_works_on_is_left_alone(tmp_path, fakes):
    cell = fakes.make_cell()
    with FileLock(CellStore(tmp_path, cell).lock().lock_file):
        assert not attempt(fakes.make_job(tmp_path, cell), cell)
    assert fakes.runs(tmp_path) == []
    assert attempt(fakes.make_job(tmp_path, cell), cell)


def test_the_lock_of_a_killed_process_is_free_although_its_forked_child_lives_on(tmp_path, fakes):
    cell = fakes.make_cell(fakes.SLOW)
    process = start_process(tmp_path, "first", fakes.SLOW)
    deadline = time.monotonic() + 120
    while not fakes.runs(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)  # until it has forked
    with pytest.raises(Timeout):
        CellStore(tmp_path, cell).lock().acquire(blocking=False)
    process.kill()
    process.wait()
    CellStore(tmp_path, cell).lock().acquire(blocking=False)


def test_a_cell_whose_process_died_is_failed_in_this_call_and_tried_again_in_the_next(tmp_path, fakes):
    cell = fakes.make_cell(fakes.KILLED)
    assert start_process(tmp_path, "first", fakes.KILLED).wait(timeout=300) < 0
    work(fakes.make_job(tmp_path, cell))
    assert fakes.runs(tmp_path) == [cell.name]
    assert record_of(tmp_path, cell)["error"] == DIED
    work(fakes.make_job(tmp_path, dataclasses.replace(cell, seed=0), session="second"))
    assert start_process(tmp_path, "second", fakes.KILLED).wait(timeout=300) < 0
    assert fakes.runs(tmp_path).count(cell.name) == 2


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_cell_named(tmp_path, fakes, caplog):
    cells = [fakes.make_cell(seed) for seed in (fakes.KILLED, fakes.FAILING, 0, 1)]
    with caplog.at_level("INFO", logger="lgssl_nnunet"):
        run_workers(fakes.make_job(tmp_path, *cells), 1, progress=False)
    assert fakes.runs(tmp_path) == [cell.name for cell in cells]
    assert [record_of(tmp_path, cell)["status"] for cell in cells] == ["failed", "failed", "finished", "finished"]
    assert f"{cells[0]}: failed: {DIED}" in caplog.text
    assert f"{cells[1]}: failed: ValueError" in caplog.text
    assert f"{cells[2]}: Dice 0.4600" in caplog.text


def test_a_stopped_cell_has_not_failed_and_the_next_call_goes_on_with_it(tmp_path, fakes):
    stopped, other = fakes.make_cell(fakes.STOPPED), fakes.make_cell(0)
    with pytest.raises(TrainingStopped):
        work(fakes.make_job(tmp_path, stopped, other))
    assert record_of(tmp_path, stopped)["status"] == "running"
    with pytest.raises(TrainingStopped):
        work(fakes.make_job(tmp_path, stopped, session="second"))
    assert fakes.runs(tmp_path) == [stopped.name] * 2


@pytest.mark.slow
def test_a_worker_that_was_stopped_is_not_replaced(tmp_path, fakes):
    stopped = fakes.make_cell(fakes.STOPPED)
    run_workers(fakes.make_job(tmp_path, stopped, fakes.make_cell(0)), 1, progress=False)
    assert fakes.runs(tmp_path) == [stopped.name]
    assert record_of(tmp_path, stopped)["status"] == "running"


@pytest.mark.slow
def test_a_benchmark_that_is_terminated_ends_its_workers(tmp_path, fakes):
    script = (
        "import sys, fake_cells; from pathlib import Path\n"
        "from lgssl_nnunet.evaluation.benchmark.workers import run_workers\n"
        "if __name__ == '__main__':\n"
        "    job = fake_cells.make_job(Path(sys.argv[1]), fake_cells.make_cell(fake_cells.SLOW))\n"
        "    run_workers(job, 1, progress=False)\n"
    )
    (tmp_path / "script.py").write_text(script)
    with (tmp_path / "said.txt").open("w") as said:  # a file, because the cell's forked child lives on with a pipe
        run = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path], stderr=said)
    deadline = time.monotonic() + 120
    while not fakes.runs(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    run.terminate()
    assert run.wait(timeout=60) != 0
    assert "KeyboardInterrupt" in (tmp_path / "said.txt").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(record_of(tmp_path, fakes.make_cell(fakes.SLOW))["pid"], 0)


@pytest.mark.slow
def test_workers_share_the_cells_and_the_cores(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    variables = divided_cores(2)
    assert variables == {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0"}  # the tests have set the second
    cells = [fakes.make_cell(seed) for seed in range(4)]
    run_workers(fakes.make_job(tmp_path, *cells, variables=tuple(variables.items())), 2, progress=False)
    assert sorted(fakes.runs(tmp_path)) == sorted(cell.name for cell in cells)
    assert record_of(tmp_path, cells[0])["hardware"]["device"] == "cpu (1 threads)"


@pytest.mark.parametrize(("workers", "threads", "data"), [(1, "32", "12"), (4, "8", "3"), (64, "1", "1")])
def test_every_worker_has_at_least_one_core(workers, threads, data, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    for name in ("OMP_NUM_THREADS", "nnUNet_n_proc_DA"):
        monkeypatch.delenv(name, raising=False)
    assert divided_cores(workers) == {"OMP_NUM_THREADS": threads, "nnUNet_n_proc_DA": data}


def test_a_cell_waits_for_the_model_that_it_learns_from(tmp_path, fakes):
    source, pseudo = fakes.make_cell(0), fakes.make_cell(0, "PseudoLabelTrainer")
    others = [fakes.make_cell(1), fakes.make_cell(0, budget=8), fakes.make_cell(0, "LGSSLTrainer")]
    assert sources_of(pseudo, [source, *others, pseudo]) == [source]
    assert sources_of(pseudo, [*others, pseudo]) == []
    assert sources_of(source, [source, pseudo]) == []


def test_a_later_round_of_pseudo_labels_waits_for_the_earlier_one_only(fakes):
    first = fakes.make_cell(0, "PseudoLabelTrainer")
    second = dataclasses.replace(first, settings=(("source", "PseudoLabelTrainer"),))
    assert sources_of(second, [first, second]) == [first]
    assert sources_of(first, [first, second]) == []


def test_a_cell_is_not_begun_while_another_process_trains_its_source(tmp_path, fakes):
    source, pseudo = fakes.make_cell(0), fakes.make_cell(0, "PseudoLabelTrainer")
    lock = CellStore(tmp_path, source).lock()
    lock.acquire()
    worker = threading.Thread(target=work, args=[fakes.make_job(tmp_path, source, pseudo)], daemon=True)
    worker.start()
    time.sleep(1)
    assert fakes.runs(tmp_path) == []
    lock.release()
    worker.join(timeout=60)
    assert fakes.runs(tmp_path) == [source.name, pseudo.name]


def test_without_waiting_a_worker_leaves_cells_that_others_work_on(tmp_path, fakes):
    cell = fakes.make_cell()
    with FileLock(CellStore(tmp_path, cell).lock().lock_file):
        work(fakes.make_job(tmp_path, cell), wait=False)
    assert fakes.runs(tmp_path) == []
