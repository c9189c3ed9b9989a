"""A training that is asked to end does so after its step, saves everything, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lgssl_nnunet.cli.train import main
from lgssl_nnunet.errors import TrainingError, TrainingStopped
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

RUN = {"epochs": 3, "iterations_per_epoch": 3}


def final(folder: Path) -> dict:
    return torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=False)


@pytest.fixture
def ask(monkeypatch):
    """Within a block, `act` when a method of the trainer is entered with that many iterations done."""

    @contextmanager
    def asking(method: str, iteration: int, act: Callable[[SemiSupervisedTrainer], None]) -> Iterator[None]:
        original = getattr(SemiSupervisedTrainer, method)

        def asked(self, *arguments):
            if self.iteration == iteration:
                act(self)
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(SemiSupervisedTrainer, method, asked)
            yield

    return asking


def signal_of(kind: signal.Signals):
    return lambda trainer: os.kill(os.getpid(), kind)


def touch_stop(trainer: SemiSupervisedTrainer) -> None:
    Path(trainer.output_folder, "STOP").touch()


@pytest.mark.parametrize("trainer", ["SupervisedTrainer", "LGSSLTrainer", "UAMTTrainer"])
@pytest.mark.parametrize(
    ("method", "iteration", "act", "done"),
    [
        ("train_step", 4, signal_of(signal.SIGTERM), 5),  # within the second epoch
        ("validation_step", 6, signal_of(signal.SIGINT), 6),  # trained, not validated
        ("save_checkpoint", 6, signal_of(signal.SIGUSR1), 6),  # between two epochs
        ("train_step", 0, touch_stop, 1),
    ],
    ids=["step", "validation", "checkpoint", "file"],
)
def test_a_stopped_training_goes_on_to_the_same_end(trainer, method, iteration, act, done, train_tiny, ask, same):
    with ask(method, iteration, act), pytest.raises(TrainingStopped) as stopped:
        train_tiny(trainer=trainer, **RUN)
    assert f"after {done} of 9 iterations; " in str(stopped.value)
    assert stopped.value.exit_code == (0 if act is touch_stop else 75)
    resumed = final(train_tiny(trainer=trainer, continue_training=True, **RUN))
    shutil.rmtree(os.environ["nnUNet_results"])
    whole = final(train_tiny(trainer=trainer, **RUN))
    for key in ("network_weights", "optimizer_state", "lgssl", "_best_ema", "current_epoch"):
        assert same(whole[key], resumed[key]), key
    for name, values in whole["logging"].items():
        assert "timestamps" in name or same(values, resumed["logging"][name]), name
        assert len(values) == 3


def test_a_stop_file_is_used_up(train_tiny, ask):
    with (
        ask("train_step", 1, touch_stop),
        pytest.raises(TrainingStopped, match=r"because of the file .*STOP") as stopped,
    ):
        train_tiny(**RUN)
    assert stopped.value.exit_code == 0
    assert not list(Path(os.environ["nnUNet_results"]).rglob("STOP"))


def test_without_checkpoints_nothing_is_said_to_be_saved(train_tiny, ask):
    with ask("train_step", 1, touch_stop), pytest.raises(TrainingStopped, match="nothing is saved, as asked"):
        train_tiny(disable_checkpointing=True, **RUN)


def test_the_command_prints_how_to_go_on_and_that_works(dataset, ask, capsys):
    words = ["901", "3d_fullres", "SupervisedTrainer", "--epochs", "2", "-device", "cpu"]
    with ask("train_step", 1, signal_of(signal.SIGTERM)):
        assert main(words) == 75
    line = next(line for line in capsys.readouterr().err.splitlines() if "To go on: " in line)
    command = shlex.split(line.split("To go on: ")[1])
    assert command == ["lgssl_train", *words, "--c"]
    assert main(command[1:]) == 0
    assert list(Path(os.environ["nnUNet_results"]).rglob("checkpoint_final.pth"))


def process(*words: str) -> subprocess.Popen:
    """`lgssl_train` on the tiny dataset with a data worker, in a process group of its own."""
    code = "import sys; from lgssl_nnunet.cli.train import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "901", "3d_fullres", "SupervisedTrainer", "-device", "cpu", *words]
    variables = {**os.environ, "nnUNet_n_proc_DA": "2", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=variables, start_new_session=True, stderr=subprocess.PIPE, text=True)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)], ids=["stopped", "killed"])
def test_no_process_is_left_whatever_ends_the_training(kind, status, dataset, wait_for, is_running):
    run = process("--epochs", "1000", "--iterations_per_epoch", "20")
    wait_for(lambda: bool(list(Path(os.environ["nnUNet_results"]).rglob("lgssl_terms.csv"))))
    workers = children_of(run.pid)
    assert workers
    os.killpg(run.pid, kind)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == status
    wait_for(lambda: not any(map(is_running, workers)), 20)
    if kind == signal.SIGTERM:
        assert "Training stopped because of SIGTERM" in said
        assert "Traceback" not in said
        assert list(Path(os.environ["nnUNet_results"]).rglob("checkpoint_latest.pth"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_data_worker_that_dies_is_a_sentence(dataset, wait_for):
    run = process("--epochs", "1000", "--iterations_per_epoch", "20")
    wait_for(lambda: bool(list(Path(os.environ["nnUNet_results"]).rglob("lgssl_terms.csv"))))
    os.kill(children_of(run.pid)[0], signal.SIGKILL)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1
    assert "error: A process that prepares batches died" in said


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(train_tiny, monkeypatch, same):
    def full_from(iteration: int):
        write = torch.save

        def save(checkpoint, file):
            write(checkpoint, file)
            if checkpoint["lgssl"]["iteration"] >= iteration:
                Path(file).write_bytes(Path(file).read_bytes()[:1000])
                raise OSError(28, "No space left on device")

        return save

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_from(6))
        with pytest.raises(
            TrainingError, match=r"checkpoint_\w+.pth could not be written .*No space left.*go on with --c"
        ):
            train_tiny(**RUN)
    fold = next(Path(os.environ["nnUNet_results"]).rglob("fold_all"))
    assert not list(fold.glob(".*"))
    assert torch.load(fold / "checkpoint_latest.pth", weights_only=False)["lgssl"]["iteration"] == 3
    resumed = final(train_tiny(continue_training=True, **RUN))
    shutil.rmtree(os.environ["nnUNet_results"])
    assert same(resumed["network_weights"], final(train_tiny(**RUN))["network_weights"])


def test_a_deterministic_run_computes_so_and_ends_the_same(train_tiny, monkeypatch, same):
    seen, original = [], SemiSupervisedTrainer.train_step

    def train_step(self, batch):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(self, batch)

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", train_step)
    weights = []
    for _ in range(2):
        weights.append(final(train_tiny(trainer="LGSSLTrainer", deterministic=True, epochs=1))["network_weights"])
        shutil.rmtree(os.environ["nnUNet_results"])
    assert seen == [True] * 4
    assert same(*weights)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_fold_is_trained_by_one_process_at_a_time(train_tiny, ask):
    def start_another(trainer: SemiSupervisedTrainer) -> None:
        run = process("--epochs", "3", "--iterations_per_epoch", "3")
        said = run.communicate(timeout=120)[1]
        assert run.returncode == 1
        assert "fold_all: another process is writing there" in said

    with ask("train_step", 1, start_another):
        final(train_tiny(**RUN))


def test_what_a_killed_process_left_is_cleared_away(train_tiny, ask):
    with ask("train_step", 1, touch_stop), pytest.raises(TrainingStopped):
        train_tiny(**RUN)
    fold = next(Path(os.environ["nnUNet_results"]).rglob("fold_all"))
    (fold / ".checkpoint_latest.pth.123.tmp").write_bytes(b"half")
    train_tiny(continue_training=True, **RUN)
    assert not [file.name for file in fold.iterdir() if file.name.startswith(".")]
