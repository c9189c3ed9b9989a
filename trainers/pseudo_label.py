"""Iterative pseudo-labelling: a finished model labels the unlabelled cases, a new one learns from all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgssl_nnunet.data.unlabeled import PseudoLabeledDataset, UnlabeledDataset, UnlabeledLoader
from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch
from lgssl_nnunet.engine.hyperparameters import check_ranges, resolve
from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.inference.models import TrainedModel, read_model_json
from lgssl_nnunet.inference.pseudo_labels import (
    SOURCE_RECORD,
    models_of_same_data,
    settle_source,
    write_pseudo_labels,
)
from lgssl_nnunet.paths import data_folders, dataset_number
from lgssl_nnunet.plans.stored import planned_as, training_iterations, training_seed
from lgssl_nnunet.registry import trainer_names
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

OWN_NAME = "PseudoLabelTrainer"
FOLDER = "pseudo_labels"


@dataclass(frozen=True)
class PseudoLabelHyperparameters:
    """Hyper-parameters of a round of pseudo-labelling (methods.md section 15).

    Attributes:
        source: trainer whose finished model labels the unlabelled cases, of several the longest trained and newest;
            PseudoLabelTrainer for a further round.
        round: number of a further round, whose source is the model of the round before; only with that source.
        pseudo_weight: weight of pseudo-labelled patches relative to labelled ones.
        oversample_foreground: make sure of pseudo-labelled foreground in as many patches as nnU-Net does of labelled.
    """

    source: str = "SupervisedTrainer"
    round: int = 2
    pseudo_weight: float = 1.0
    oversample_foreground: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, round=(2, None), pseudo_weight=(0, None))
        if self.round > 2 and self.source != OWN_NAME:
            raise ValueError(f"round={self.round} needs the model of the round before: add source={OWN_NAME}")

    @property
    def rounds_before(self) -> int:
        """How many rounds of pseudo-labelling the source went through."""
        return self.round - 1 if self.source == OWN_NAME else 0


class PseudoLabelTrainer(SemiSupervisedTrainer):
    """One round: hard pseudo-labels of a finished model, then nnU-Net from scratch on true and pseudo-labels.

    Source: Z. Huang et al., "Revisiting nnU-Net for Iterative Pseudo Labeling and Efficient Sliding Window Inference",
    FLARE 2022; methods.md section 15. The source model has the same plans, fold and training seed, so it has not seen
    the validation cases either. As published, true and pseudo-labelled patches count alike by default; other than
    published (50 of 1974 cases true, all drawn alike), half of the patches are labelled ones. The weights of both terms
    sum to 1, which leaves nnU-Net's learning rate its meaning. No case is left out as unstable between rounds, which
    was cut by hand.
    """

    hyperparameters = PseudoLabelHyperparameters()
    views = ("strong",)
    # Twice the patches of SupervisedTrainer.
    memory_factor = 0.6

    @classmethod
    def check_request(
        cls, plans: dict[str, Any], configuration: str, fold: int | str, dataset_json: dict[str, Any]
    ) -> None:
        """Refuse also without a finished source model, unless the run has begun with one."""
        super().check_request(plans, configuration, fold, dataset_json)
        results = data_folders()["nnUNet_results"].path / plans["dataset_name"]
        own = results / f"{cls.__name__}__{plans['plans_name']}__{configuration}" / f"fold_{fold}"
        if not (own / FOLDER / SOURCE_RECORD).is_file() and not cls._sources(results, plans, configuration, fold):
            hp = resolve(cls.hyperparameters, plans, cls.__name__)
            raise CheckpointError(
                f"{cls.__name__} needs a finished {hp.source} of the same plans, fold and seed, which labels the "
                f"unlabelled cases: train it first with {_command(hp, plans, configuration, fold)}."
            )

    @classmethod
    def _sources(cls, results: Path, plans: dict[str, Any], configuration: str, fold: int | str) -> list[TrainedModel]:
        hp = resolve(cls.hyperparameters, plans, cls.__name__)
        if hp.source not in trainer_names():
            raise UsageError(f"source={hp.source} is no trainer of this package: use {', '.join(trainer_names())}.")

        def of_round_before(theirs: dict[str, Any]) -> bool:
            if hp.source != OWN_NAME:
                return True
            return resolve(cls.hyperparameters, theirs, hp.source).rounds_before == hp.rounds_before - 1

        return models_of_same_data(results, hp.source, plans, configuration, fold, of_round_before)

    @property
    def label_folder(self) -> Path:
        """Where this fold's pseudo-labels and the record of their source lie."""
        return Path(self.output_folder) / FOLDER

    def on_train_start(self) -> None:
        """Label the unlabelled cases as far as they are not, then start."""
        results, plans = Path(self.output_folder_base).parent, self.plans_manager.plans
        models = self._sources(results, plans, self.configuration_name, self.fold)
        source = settle_source(self.label_folder, models, self.fold)
        theirs = training_iterations(read_model_json(source.folder, "plans.json"))
        self.print_to_log_file(
            f"Pseudo-labels are those of {source.folder}, fold {self.fold}, which trained for {theirs} iterations "
            f"(this run: {self.num_iterations})."
        )
        images = UnlabeledDataset(str(self.unlabeled_folder), self.unlabeled_cases())
        write_pseudo_labels(source, self.fold, images, self.label_folder, self.device, self.hides_progress)
        super().on_train_start()

    def unlabeled_loader(self, initial_patch_size: Any, training_transforms: Any) -> UnlabeledLoader:
        """Return the loader of pseudo-labelled patches, cropped and augmented as nnU-Net does with labelled ones."""
        cases = PseudoLabeledDataset(str(self.unlabeled_folder), self.unlabeled_cases(), self.label_folder)
        share = self.oversample_foreground_percent if self.hp.oversample_foreground else 0.0
        return self._unlabeled_loader(
            cases, initial_patch_size, training_transforms, oversample_foreground_percent=share
        )

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return nnU-Net's loss on labelled and on pseudo-labelled patches."""
        supervised = self.supervised_loss(self.network(labeled.image), labeled.target)
        pseudo = self.supervised_loss(self.network(unlabeled.strong), unlabeled.target)
        share = self.hp.pseudo_weight / (1 + self.hp.pseudo_weight)
        return {"supervised": Term(supervised, 1 - share), "pseudo": Term(pseudo, share, uses_unlabeled=True)}


def _command(hp: PseudoLabelHyperparameters, plans: dict[str, Any], configuration: str, fold: int | str) -> str:
    """Return what trains the source model."""
    words = ["lgssl_train", str(dataset_number(plans["dataset_name"])), configuration, hp.source]
    words += ["-p", planned_as(plans)] + (["-f", str(fold)] if fold != "all" else [])
    words += ["--seed", str(training_seed(plans))] if training_seed(plans) else []
    words += ["--set", f"source={OWN_NAME}"] if hp.rounds_before > 1 else []
    words += ["--set", f"round={hp.rounds_before}"] if hp.rounds_before > 2 else []
    return " ".join(words)
