"""Run by torchrun: what several processes do with trainers that a test has written down; each writes what it found.

    torchrun --nproc_per_node 2 several_processes.py FOLDER

FOLDER/work.pt holds the arguments; process R leaves FOLDER/found_R.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lgssl_nnunet.engine.distributed import num_processes, process_group, process_number
from lgssl_nnunet.errors import LGSSLError, TrainingStopped
from lgssl_nnunet.registry import find_trainer


def make_trainer(name: str, plans: dict[str, Any], dataset_json: dict[str, Any]) -> Any:
    trainer = find_trainer(name)(
        {**plans, "continue_training": False}, "3d_fullres", "all", dataset_json, torch.device("cpu")
    )
    trainer.show_progress = False
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.term_log.plot = lambda path: None
    return trainer


def share(batch: dict[str, Any], number: int, of: int) -> dict[str, Any]:
    """A process's rows of a global batch."""

    def rows(entry: Any) -> Any:
        if isinstance(entry, list) and isinstance(entry[0], torch.Tensor):
            return [rows(scale) for scale in entry]
        size = len(entry) // of
        return entry[number * size : (number + 1) * size]

    return {name: rows(entry) for name, entry in batch.items()}


def trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Everything that the steps change: network, companions, teacher."""
    modules = {"network": trainer.plain_network}
    modules |= {name: part for name, part in trainer.parts.items() if isinstance(part, torch.nn.Module)}
    if trainer.teacher is not None:
        modules["teacher"] = trainer.teacher.network
    return {f"{part}/{name}": p.detach().clone() for part, net in modules.items() for name, p in net.named_parameters()}


def after_steps(name: str, plans: dict, dataset_json: dict, batches: list[dict]) -> dict[str, Any]:
    """Weights and mean values of the terms after a step on each batch, in fp32."""
    trainer = make_trainer(name, plans, dataset_json)
    trainer.initialize()
    trainer.precision = torch.float32
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(share(batch, process_number(), num_processes())) for batch in batches]
    return {"weights": trained_weights(trainer), "outputs": outputs}


def whole_run(name: str, plans: dict, dataset_json: dict) -> dict[str, Any]:
    trainer = make_trainer(name, plans, dataset_json)
    trainer.run_training()
    weights = trained_weights(trainer)
    return {"weights": weights, "rows": trainer.term_log.rows, "losses": trainer.logger.get_value("train_losses", None)}


def stopped_and_continued_run(name: str, plans: dict, dataset_json: dict, after: int, reason: str) -> dict[str, Any]:
    """The last process alone is asked to stop once `after` steps are done; then all go on from the checkpoint."""
    trainer = make_trainer(name, plans, dataset_json)
    original, last = trainer.train_step, process_number() == num_processes() - 1

    def train_step(batch: dict) -> dict:
        output = original(batch)
        if last and trainer.iteration == after:
            if reason == "file":
                trainer.stop.file.touch()
            else:
                trainer.stop.received = reason
        return output

    trainer.train_step = train_step
    try:
        trainer.run_training()
        stopped = None
    except TrainingStopped as error:
        stopped = (str(error), error.exit_code)
    again = make_trainer(name, plans, dataset_json)
    file = Path(again.output_folder) / "checkpoint_latest.pth"
    again.load_checkpoint(str(file))
    continued_at, step_outputs = again.iteration, list(again._step_outputs)
    again.run_training()
    return {
        "stopped": stopped,
        "continued_at": continued_at,
        "step_outputs": step_outputs,
        "weights": trained_weights(again),
        "rows": again.term_log.rows,
        "losses": again.logger.get_value("train_losses", None),
        "file_left": again.stop.file.exists(),
    }


def with_a_broken_term(name: str, plans: dict, dataset_json: dict, batches: list[dict]) -> dict[str, Any]:
    """In the last process alone the loss of the second of three steps is not finite."""
    trainer = make_trainer(name, plans, dataset_json)
    trainer.initialize()
    trainer.on_train_epoch_start()
    last = process_number() == num_processes() - 1
    weights, losses = [], []
    for number, batch in enumerate(batches):
        batch = share(batch, process_number(), num_processes())
        if number == 1 and last:
            batch["data"] = torch.full_like(batch["data"], torch.nan)
        losses.append(float(trainer.train_step(batch)["loss"]))
        weights.append(trained_weights(trainer))
    return {"weights": weights, "losses": losses, "skipped": trainer.non_finite.skipped}


def refusal(name: str, plans: dict, dataset_json: dict) -> str | None:
    try:
        make_trainer(name, plans, dataset_json)
    except LGSSLError as error:
        return str(error)
    return None


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    work = torch.load(folder / "work.pt", weights_only=False)
    with process_group(torch.device("cpu")):
        found = {key: globals()[function](**arguments) for key, (function, arguments) in work.items()}
        torch.save(found, folder / f"found_{process_number()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
