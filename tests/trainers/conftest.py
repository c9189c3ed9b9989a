"""A method with everything the engine offers, and finished trainings to look into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch
from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.errors import CheckpointError
from lgssl_nnunet.files import content_hash
from lgssl_nnunet.registry import find_trainer
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class ExampleHyperparameters:
    """Numbers of the example.

    Attributes:
        weight: weight of the consistency after the ramp.
        teacher_decay: decay of the teacher.
    """

    weight: float = 1.0
    teacher_decay: float = 0.9


class ExampleTeacherTrainer(SemiSupervisedTrainer):
    """A mean teacher: stands in the grid for what no trainer of the package uses yet (teacher, both views)."""

    hyperparameters = ExampleHyperparameters()
    views = ("weak", "strong")

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        supervised = self.supervised_loss(self.network(labeled.image), labeled.target)
        student = torch.softmax(self.network(unlabeled.strong)[0].float(), dim=1)
        teacher = torch.softmax(self.teacher(unlabeled.weak)[0].float(), dim=1)
        consistency = (student - teacher).square().mean()
        return {
            "supervised": Term(supervised),
            "consistency": Term(consistency, self.hp.weight * self.ramp(), uses_unlabeled=True),
        }


@pytest.fixture(scope="session")
def trainer_class() -> Callable[[str], type]:
    """The class behind a name of the grid."""
    return lambda name: ExampleTeacherTrainer if name == ExampleTeacherTrainer.__name__ else find_trainer(name)


@pytest.fixture(scope="session")
def build(build_trainer, trainer_class, train_source, tmp_path_factory) -> Callable[..., Any]:
    """`build_trainer` for a name of the grid; where a method refuses for want of a source model, it gets one."""

    def make(name: str, **options: Any) -> Any:
        trainer = trainer_class(name)
        if not hasattr(trainer.hyperparameters, "source"):
            return build_trainer(trainer, **options)
        options = {"results": tmp_path_factory.mktemp("results"), **options}
        try:
            return build_trainer(trainer, **options)
        except CheckpointError:
            train_source(**options)
            return build_trainer(trainer, **options)

    return make


@pytest.fixture(scope="session")
def train_source(build_trainer, tmp_path_factory) -> Callable[..., None]:
    """Put a finished SupervisedTrainer of 2 epochs of 2 iterations into `results`; it is trained once per session."""
    trained: dict[str, Any] = {}

    def train(results: Path, **options: Any) -> None:
        training = {"seed": options.pop("training", {}).get("seed", 0)}
        options = {**options, "epochs": 2, "iterations": 2, "training": training}
        trainer = build_trainer("SupervisedTrainer", results=tmp_path_factory.mktemp("source"), **options)
        key = content_hash([trainer.plans_manager.plans, trainer.preprocessed_dataset_folder, str(trainer.fold)])
        if key not in trained:
            trainer.run_training()
            trained[key] = trainer.output_folder_base
        model = Path(trained[key])
        shutil.copytree(model, results / model.parent.name / model.name, dirs_exist_ok=True)

    return train


@pytest.fixture(scope="session")
def started(build) -> Callable[..., Any]:
    """A trainer that is ready for its first `train_step`."""

    def start(name: str, **options: Any) -> Any:
        trainer = build(name, **options)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    return start


@pytest.fixture(scope="session")
def finished(build) -> Callable[[str], Any]:
    """A trainer after a whole training of 2 epochs of 2 iterations, one per name and session; not to be changed."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = build(name)
            made[name].run_training()
        return made[name]

    return get


@pytest.fixture(scope="session")
def check_resuming(build, same) -> Callable[..., None]:
    """Check that a run stopped at its half and resumed ends as one without interruption, to the bit."""

    def check(name: str, *, epochs: int = 2, **options: Any) -> None:
        whole, first, second = (build(name, epochs=epochs, **options) for _ in range(3))
        whole.run_training()
        stop_after_epoch(first, epochs // 2)
        with pytest.raises(KeyboardInterrupt):
            first.run_training()
        second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
        assert second.current_epoch == epochs // 2
        second.run_training()
        expected, resumed = (
            torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
            for trainer in (whole, second)
        )
        for key in ("network_weights", "optimizer_state", "lgssl", "current_epoch", "inference_allowed_mirroring_axes"):
            assert same(expected[key], resumed[key]), key
        for curve in ("train_losses", "val_losses", "mean_fg_dice", "lrs"):
            assert same(expected["logging"][curve], resumed["logging"][curve]), curve
        assert expected["_best_ema"] == resumed["_best_ema"]

    return check


def stop_after_epoch(trainer: Any, epoch: int) -> None:
    """Make the trainer raise KeyboardInterrupt at the end of an epoch, as a user would."""
    original = trainer.on_epoch_end

    def on_epoch_end() -> None:
        original()
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt

    trainer.on_epoch_end = on_epoch_end


@pytest.fixture
def with_settings(started) -> Callable[..., Any]:
    """`with_settings("CPSTrainer", pseudo_weight=1)`: a trainer with these hyper-parameters, ready to train."""
    return lambda name, **values: started(name, training={"seed": 0, "hyperparameters": values})


@pytest.fixture
def next_batches() -> Callable[[Any], tuple[LabeledBatch, UnlabeledBatch]]:
    """The next labelled and unlabelled batch of a trainer."""
    return lambda trainer: trainer.to_batches(next(trainer.dataloader_train))


@pytest.fixture
def terms_of() -> Callable[..., dict[str, Term]]:
    """The terms of a step on given batches, with the same dropout, noise and boxes each time."""

    def compute(trainer: Any, batches: tuple[LabeledBatch, UnlabeledBatch]) -> dict[str, Term]:
        seed_everything(0)
        return trainer.loss_terms(*batches)

    return compute


@pytest.fixture
def values_of(terms_of) -> Callable[..., dict[str, float]]:
    """The values of those terms."""
    return lambda trainer, batches: {
        name: float(term.value.detach()) for name, term in terms_of(trainer, batches).items()
    }


@pytest.fixture
def reached() -> Callable[..., set[str]]:
    """The names of those parameters that get a gradient other than zero from a loss."""

    def find(loss: torch.Tensor, **networks: torch.nn.Module) -> set[str]:
        named = {f"{name}.{key}": p for name, net in networks.items() for key, p in net.named_parameters()}
        for parameter in named.values():
            parameter.grad = None
        loss.backward(retain_graph=True)
        return {name for name, p in named.items() if p.grad is not None and p.grad.abs().max() > 0}

    return find
