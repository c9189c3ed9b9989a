"""Several processes train the same weights as one, agree on everything, and leave one model folder.

CPU processes that exchange by gloo. Comparisons are in fp32, where the order of a sum changes the last digits: weights
agree within 1e-5 absolutely or 1e-4 relatively after four steps.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import find_free_network_port

from lgssl_nnunet.cli.train import main
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.registry import find_trainer, trainer_names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
]
SCRIPT = Path(__file__).with_name("several_processes.py")
PATIENCE = 300
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PROCESSES = 2
# Dropout and noise are drawn in each process by itself, so the comparison goes without; every term counts.
WITHOUT_CHANCE: dict[str, list[dict[str, Any]]] = {
    "SupervisedTrainer": [{}],
    "LGSSLTrainer": [{"dropout": 0.0, "class_map_weight": 0.5, "alignment_weight": 0.5, "ramp_fraction": 0.0}],
    "UAMTTrainer": [
        {"dropout": 0.0, "noise": 0.0, "passes": 1, "ramp_fraction": 0.0, "consistency_weight": 20.0}
        | {"first_threshold": 0.6, "last_threshold": 0.6}
    ],
    "MeanTeacherTrainer": [{"noise": 0.0, "ramp_fraction": 0.0, "consistency_weight": 20.0}],
    "MCFTrainer": [{"ramp_fraction": 0.0, "pseudo_weight": 5.0}],
    "MCNetPlusTrainer": [{"dropout": 0.0, "ramp_fraction": 0.0}],
    "CPSTrainer": [{"ramp_fraction": 0.0, "pseudo_weight": 1.0}],
    "TACTrainer": [
        {"ramp_fraction": 0.0, "attention_weight": 5.0, "encoder_weight": 5.0, "denominator": denominator}
        for denominator in ("sample", "batch")
    ],
}
SUPPORTED = [name for name in trainer_names() if find_trainer(name).supports_several_gpus]
CASES = [(name, number) for name in SUPPORTED for number in range(len(WITHOUT_CHANCE.get(name, [])))]
PARTIAL = [name for name in SUPPORTED if find_trainer(name).supports_partial_labels]
# By the name of a run: trainer, hyper-parameters, and whether some cases annotate only some of the classes.
RUNS = {f"{name}{number}": (name, WITHOUT_CHANCE[name][number], False) for name, number in CASES} | {
    f"{name} partial": (name, WITHOUT_CHANCE[name][0], True) for name in PARTIAL
}
SCHEDULES = {
    "sgd": {"optimizer": "sgd", "lr_schedule": "poly", "initial_lr": 0.01, "weight_decay": 3e-5},
    "adamw": {"optimizer": "adamw", "lr_schedule": "cosine", "initial_lr": 1e-3, "weight_decay": 1e-2},
}
BATCH_DICE = {"sgd": False, "adamw": True}  # whether the Dice is that of the whole batch
STOPS = {"signal": ("SIGTERM", 3), "file": ("file", 4)}


def several() -> Any:
    spec = importlib.util.spec_from_file_location("several_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plans_for(dataset: Any, schedule: str, batch_size: int, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    plans = dataset.plans()
    plans["lgssl"]["schedule"].update(SCHEDULES[schedule], num_epochs=2, iterations_per_epoch=4)
    plans["lgssl"]["training"] = {"seed": 0, "hyperparameters": hyperparameters}
    plans["configurations"]["3d_fullres"].update(batch_size=batch_size, batch_dice=BATCH_DICE[schedule])
    return plans


def without_hidden_labels(batch: dict[str, Any], partial: dict[str, list[str]]) -> dict[str, Any]:
    """A batch as it is where these cases were preprocessed as partially annotated."""
    hidden = {case: 2 if classes == ["liver"] else 1 for case, classes in partial.items()}
    scales = [scale.clone() for scale in batch["target"]]
    for scale in scales:
        for row, case in enumerate(batch["keys"]):
            scale[row][scale[row] == hidden.get(case)] = 0
    return {**batch, "target": scales}


@pytest.fixture(scope="module")
def work(tiny_dataset, build_trainer) -> dict[str, tuple[str, dict[str, Any]]]:
    """What both kinds of process do: a function of the script and its arguments, by name."""
    dataset, batches, made = tiny_dataset(), {}, {}
    description = dataset.dataset_json()

    def batches_of(views: tuple[str, ...]) -> list[dict[str, Any]]:
        if views not in batches:
            name = next(name for name in SUPPORTED if find_trainer(name).views == views)
            trainer = build_trainer(
                name, changes=lambda plans: plans["configurations"]["3d_fullres"].update(batch_size=4)
            )
            trainer.initialize()
            loader, _ = trainer.get_dataloaders()
            batches[views] = [next(loader) for _ in range(4)]
        return batches[views]

    cases = dataset.plans()["lgssl"]["split"]["labeled"]
    partial = {case: ["liver"] for case in cases[::2]} | {cases[1]: ["gallbladder"]}
    for run, (name, values, in_part) in RUNS.items():
        for schedule in SCHEDULES:
            plans, given = plans_for(dataset, schedule, 4, values), batches_of(find_trainer(name).views)
            if in_part:
                plans["lgssl"]["partial_labels"] = partial
                given = [without_hidden_labels(batch, partial) for batch in given]
            arguments = {"batches": given, "name": name, "plans": plans}
            made[f"{run}{schedule}"] = ("after_steps", {**arguments, "dataset_json": description})
    run = {"name": "UAMTTrainer", "dataset_json": description}
    plans = plans_for(dataset, "adamw", 2, {})
    made["whole"] = ("whole_run", {**run, "plans": plans})
    for kind, (reason, after) in STOPS.items():
        named = {**copy.deepcopy(plans), "plans_name": f"{plans['plans_name']}_{kind}"}
        made[kind] = ("stopped_and_continued_run", {**run, "plans": named, "after": after, "reason": reason})
    run |= {"plans": plans_for(dataset, "sgd", 4, {}), "batches": batches_of(("weak", "strong"))[:3]}
    made["broken"] = ("with_a_broken_term", run)
    return made


@pytest.fixture(scope="module")
def found(work, tiny_dataset, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found that torchrun started."""
    folder = tmp_path_factory.mktemp("several")
    plans = tiny_dataset().plans()
    refusals = {f"refused {name}": ("refusal", name) for name in trainer_names() if name not in SUPPORTED}
    refused = {"dataset_json": tiny_dataset().dataset_json(), "plans": plans}
    more = {key: (function, {**refused, "name": name}) for key, (function, name) in refusals.items()}
    torch.save({**work, **more}, folder / "work.pt")
    environment = tiny_dataset().environment(tmp_path_factory.mktemp("results"))
    with environment, started(torchrun(str(SCRIPT), str(folder))) as processes:
        said = finished(processes)
    assert said.returncode == 0, said.stderr
    return [torch.load(folder / f"found_{number}.pt", weights_only=False) for number in range(PROCESSES)]


def torchrun(*words: str, nodes: int = 1, node: int = 0, port: int = 0) -> list[str]:
    where = ["--nnodes", str(nodes), "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    where = where if nodes > 1 else ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", str(PROCESSES // nodes), *words]


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A command that is ended, if it has not ended, with the block."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in (*training_processes(process), process.pid):
                os.kill(pid, signal.SIGKILL)


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    _, said = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, "", said)


def train_words(*words: str, trainer: str = "SupervisedTrainer") -> list[str]:
    return ["901", "3d_fullres", trainer, "-device", "cpu", "--no_pbar", *words]


def results() -> Path:
    return Path(os.environ["nnUNet_results"])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.1)


def training_processes(launcher: subprocess.Popen) -> list[int]:
    """The processes that a launcher started for the training, first one first."""
    found = []
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_text()
        if "spawn_main" in command or "lgssl_nnunet.cli.train" in command:
            found.append(int(child))
    return sorted(found)


# ------------------------------------------------------------------------------------------------- the same weights


def test_every_trainer_that_declares_support_is_compared():
    assert set(SUPPORTED) == set(WITHOUT_CHANCE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_the_weights_of_one(run, schedule, work, found, tiny_dataset, tmp_path):
    key = f"{run}{schedule}"
    with tiny_dataset().environment(tmp_path):
        alone = several().after_steps(**work[key][1])
    first, second = (process[key] for process in found)
    assert alone["weights"].keys() == first["weights"].keys()
    for weight, expected in alone["weights"].items():
        assert torch.equal(first["weights"][weight], second["weights"][weight]), weight
        if not without_effect(weight, schedule):
            torch.testing.assert_close(first["weights"][weight], expected, **TOLERANCE)
    for one, *two in zip(alone["outputs"], first["outputs"], second["outputs"], strict=True):
        for term, value in one.items():
            assert sum(float(output[term]) for output in two) / 2 == pytest.approx(float(value), rel=1e-4, abs=1e-5)


def without_effect(weight: str, schedule: str) -> bool:
    """Biases before a normalisation have no gradient but rounding, of which adaptive steps make whole ones."""
    return schedule == "adamw" and weight.endswith(".bias") and ".seg_layers." not in weight


# ------------------------------------------------------------------------------------------------------ agreements


@pytest.mark.parametrize("kind", STOPS)
def test_one_process_is_asked_to_stop_and_all_stop_after_the_same_step_and_go_on(kind, found, same):
    after = STOPS[kind][1]
    for process in found:
        text, exit_code = process[kind]["stopped"]
        assert f"after {after} of 8 iterations" in text
        assert ("SIGTERM" in text, exit_code) == ((True, 75) if kind == "signal" else (False, 0))
        assert process[kind]["continued_at"] == after
        assert not process[kind]["file_left"]
        assert same(process[kind]["step_outputs"], found[0][kind]["step_outputs"])
        assert same(process[kind]["weights"], process["whole"]["weights"])
        assert process[kind]["losses"] == pytest.approx(process["whole"]["losses"], rel=1e-6)
    assert len(found[0]["signal"]["step_outputs"]) == 3


def test_terms_are_averaged_over_the_processes(found):
    assert found[0]["whole"]["rows"] == found[1]["whole"]["rows"]
    assert same_weights(found[0]["whole"], found[1]["whole"])


def same_weights(one: dict, two: dict) -> bool:
    return all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(found):
    for process in found:
        broken = process["broken"]
        assert [math.isnan(loss) for loss in broken["losses"]] == [False, True, False]
        assert broken["skipped"] == 1
        before, skipped, after = broken["weights"]
        assert all(torch.equal(before[name], skipped[name]) for name in before)
        assert any(not torch.equal(skipped[name], after[name]) for name in before)
        assert all(torch.equal(after[name], found[0]["broken"]["weights"][2][name]) for name in after)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", [name for name in trainer_names() if name not in SUPPORTED])
def test_other_trainers_refuse_in_a_sentence(name, found, train_tiny):
    with pytest.raises(UsageError, match=f"{name} trains in one process only") as refused:
        find_trainer(name).check_processes({}, "3d_fullres", 2)
    if name != "PseudoLabelTrainer":  # which asks for its source first
        assert [process[f"refused {name}"] for process in found] == [str(refused.value)] * 2
        with pytest.raises(UsageError, match="trains in one process only"):
            train_tiny(trainer=name, num_gpus=2)


def test_a_batch_that_cannot_be_shared_equally_is_refused(train_tiny):
    with pytest.raises(
        UsageError, match="3 processes cannot share a batch of 2 labelled patches equally: start 1 or 2"
    ):
        train_tiny(num_gpus=3)
    with pytest.raises(UsageError, match="2 processes cannot share a batch of 3 unlabelled patches"):
        train_tiny(trainer="UAMTTrainer", num_gpus=2, unlabeled_batch_size=3)
    assert not list(results().rglob("fold_all"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-num_gpus", "0", "-device", "cpu"], "give at most as many"),
        (["-num_gpus", "2", "-device", "mps"], "-device mps"),
        (["-num_gpus", "2", "-tr", "nnUNetTrainer", "-device", "cpu"], "nnU-Net's own"),
    ],
)
def test_other_requests_that_cannot_be_met_are_a_sentence(words, message, dataset, capsys):
    assert main(["901", "3d_fullres", *words]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the real command


def test_num_gpus_on_the_cpu_leaves_one_model_folder_that_predicts(dataset, tmp_path, capfd):
    from lgssl_nnunet.cli.predict import main as predict

    assert main(train_words("-num_gpus", "2", trainer="LGSSLTrainer")) == 0
    (fold,) = results().rglob("fold_all")
    assert [file.name for file in fold.glob("*.pth")].count("checkpoint_final.pth") == 1
    assert len(list(fold.glob("training_log_*.txt"))) == 1
    assert len((fold / "lgssl_terms.csv").read_text().splitlines()) == 3
    assert not list(results().rglob("*.tmp"))
    assert json.loads((fold / "debug.json").read_text())["is_ddp"] == "True"
    words = f"-device cpu -npp 0 -nps 0 --disable_tta --disable_progress_bar -o {tmp_path / 'out'}"
    assert predict(["-m", str(fold.parent), "-i", str(dataset.raw / "imagesTs"), *words.split()]) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_two_nodes_train_one_model(dataset):
    port = find_free_network_port()
    words = ["-m", "lgssl_nnunet.cli.train", *train_words("--epochs", "1", trainer="UAMTTrainer")]
    one, other = (started(torchrun(*words, nodes=2, node=node, port=port)) for node in range(2))
    with one as first, other as second:
        said = [finished(node) for node in (first, second)]
    assert [node.returncode for node in said] == [0, 0], said
    assert len(list(results().rglob("checkpoint_final.pth"))) == 1
    (log,) = results().rglob("training_log_*.txt")
    assert "Training done" in log.read_text()


LONG = ("--epochs", "10000", "--iterations_per_epoch", "2")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_one_process_of_num_gpus_stops_all_with_its_exit_code(dataset):
    with started([sys.executable, "-m", "lgssl_nnunet.cli.train", *train_words(*LONG, "-num_gpus", "2")]) as run:
        wait_for(lambda: bool(list(results().rglob("lgssl_terms.csv"))), run)
        os.kill(training_processes(run)[1], signal.SIGTERM)
        said = finished(run)
    assert said.returncode == 75, said.stderr
    assert said.stderr.count("Training stopped because of SIGTERM") == 1
    assert "To go on: lgssl_train" in said.stderr
    assert "Traceback" not in said.stderr
    (file,) = results().rglob("checkpoint_latest.pth")
    assert f"after {torch.load(file, weights_only=False)['lgssl']['iteration']} of 20000 iterations" in said.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("launcher", ["num_gpus", "torchrun"])
def test_a_process_that_dies_takes_the_others_along(launcher, dataset):
    words = ["-m", "lgssl_nnunet.cli.train", *train_words(*LONG)]
    with started(torchrun(*words) if launcher == "torchrun" else [sys.executable, *words, "-num_gpus", "2"]) as run:
        wait_for(lambda: bool(list(results().rglob("lgssl_terms.csv"))), run)
        processes = training_processes(run)
        os.kill(processes[1], signal.SIGKILL)
        said = finished(run)
    assert said.returncode == 1, said.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    if launcher == "num_gpus":
        assert "was ended by SIGKILL" in said.stderr or "lost contact with another one" in said.stderr
        assert "Traceback" not in said.stderr
