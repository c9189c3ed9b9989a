"""The base class of every method: nnU-Net's trainer with an unlabelled stream and named loss terms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lgssl_nnunet.data.batches import SeededBatches, next_batch, start_workers, stop_workers
from lgssl_nnunet.data.partial_labels import PartialLabel, foreground_classes
from lgssl_nnunet.data.spatial import interpolate_at_boundaries
from lgssl_nnunet.data.unlabeled import UnlabeledDataset, UnlabeledLoader
from lgssl_nnunet.data.views import ViewsTransform, make_deterministic, split_views
from lgssl_nnunet.engine import distributed, hyperparameters
from lgssl_nnunet.engine.allocation import keep_freed_memory
from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest
from lgssl_nnunet.engine.checkpoints import read_checkpoint, write_checkpoint
from lgssl_nnunet.engine.clipping import clip_gradients
from lgssl_nnunet.engine.interruption import StopRequest
from lgssl_nnunet.engine.labels import annotated, one_hot, without_hidden_regions
from lgssl_nnunet.engine.logs import TermLog
from lgssl_nnunet.engine.non_finite import NonFiniteError, NonFiniteGuard
from lgssl_nnunet.engine.precision import (
    move_network,
    preferred_memory_format,
    to_float,
    training_autocast,
    training_precision,
)
from lgssl_nnunet.engine.schedules import CosineSchedule, sigmoid_rampup
from lgssl_nnunet.engine.seeding import derive_seed, seed_everything
from lgssl_nnunet.engine.teacher import EMATeacher
from lgssl_nnunet.engine.validation import hard_counts, leave_out_of_summary
from lgssl_nnunet.errors import CheckpointError, PlansError, SplitError, TrainingError, TrainingStopped, UsageError
from lgssl_nnunet.files import remove_leftovers, write_atomically, write_json
from lgssl_nnunet.locks import hold_lock, lock_beside
from lgssl_nnunet.losses.consistency import probabilities
from lgssl_nnunet.losses.marginal import marginal_logits
from lgssl_nnunet.losses.pseudo_labels import hard_labels
from lgssl_nnunet.networks.unet import planned_unet
from lgssl_nnunet.paths import LATEST_CHECKPOINT
from lgssl_nnunet.plans.folds import fold_cases, fold_partly_annotated, fold_unlabeled
from lgssl_nnunet.plans.partial_labels import missing_classes
from lgssl_nnunet.plans.stored import planned_as, training_seed

logger = logging.getLogger(__name__)

MIN_CASES_FOR_FOLDS = 5
# Distinguishes the random numbers of initialisation and of a step (dropout, noise) from those of the data streams.
_INITIALISATION, _STEP = 10, 11


@dataclass(frozen=True)
class NoHyperparameters:
    """A method without hyper-parameters."""


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer for a method that gives its loss as named terms of a labelled and an unlabelled batch.

    A method sets the class attributes below and implements `loss_terms`; one that needs more than nnU-Net's network
    builds it in `set_up`. Everything else is here: streams and views, device and precision, clipping, the teacher,
    ramps, logging of every term, checkpoints and resuming. Data, budget, schedule and options come from the plans
    (`plans["lgssl"]`), never from constructor arguments, which nnU-Net fixes.

    Attributes:
        hyperparameters: default values of the method, a frozen dataclass; `self.hp` holds them with overrides. With a
            field `teacher_decay` the method has an EMA teacher of that decay, `self.teacher`.
        views: the views of an unlabelled patch that the method needs, out of "weak" and "strong"; empty for a method
            that does not use unlabelled cases.
        pairs_batches: whether the method needs as many unlabelled as labelled patches in a step.
        memory_factor: memory of a step relative to LGSSLTrainer's, for which the planner sizes patch and batch.
        supports_several_gpus: whether several processes that share each batch train the same weights as one process
            (tests/training/test_distributed.py compares them); if not, they are refused.
        supports_regions: whether the method trains region-based labels; if not, they are refused.
        supports_sparse_annotation: whether the method trains on two propagated slices per case; if not, they are
            refused.
        supports_partial_labels: whether the method's loss of a labelled patch leaves open which of the classes that its
            case does not annotate are there (`LabeledBatch.known`); if not, plans with such cases are refused.
    """

    hyperparameters: ClassVar[Any] = NoHyperparameters()
    views: ClassVar[tuple[str, ...]] = ("weak",)
    pairs_batches: ClassVar[bool] = False
    memory_factor: ClassVar[float] = 1.0
    supports_several_gpus: ClassVar[bool] = False
    supports_regions: ClassVar[bool] = True
    supports_sparse_annotation: ClassVar[bool] = False
    supports_partial_labels: ClassVar[bool] = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        if "lgssl" not in plans:
            raise PlansError(
                f"{type(self).__name__} needs plans made by lgssl_plan_and_preprocess, and {plans.get('plans_name')} "
                "are nnU-Net's own: plan the dataset with lgssl_plan_and_preprocess and pass its plans with -p."
            )
        # Before nnU-Net's own initialisation, which makes the output folder.
        self.hp = hyperparameters.resolve(self.hyperparameters, plans, type(self).__name__)
        self.check_request(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.device = device  # nnU-Net replaces every GPU by the one of the process's number, 0 for a single process
        if device.type != "cuda":
            self.grad_scaler = None  # of several processes nnU-Net expects GPUs
        self.settings = plans["lgssl"]
        self.partial_labels = {
            case: PartialLabel.of(dataset_json["labels"], classes)
            for case, classes in self.settings.get("partial_labels", {}).items()
        }
        self.seed = training_seed(plans)
        self._read_schedule(self.settings["schedule"])
        self.unlabeled_batch_size = self.settings.get("training", {}).get("unlabeled_batch_size")
        self.iteration = 0
        self.teacher: EMATeacher | None = None
        self.parts: dict[str, Any] = {}
        self.term_log = TermLog()
        self.non_finite = NonFiniteGuard()
        self.stop = StopRequest(Path(self.output_folder))
        self._epoch_is_open = False
        self._step_outputs: list[dict] = []
        self.show_progress: bool | None = None
        self._progress_bar: tqdm | None = None

    # ------------------------------------------------------------------ what a method provides

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> dict[str, Term]:
        """Return the loss of a step as named terms; runs under the device's autocast."""
        raise NotImplementedError

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the network that trains and predicts, from the plans alone, as nnU-Net asks for it."""
        hp = hyperparameters.resolve(cls.hyperparameters, plans_manager.plans, cls.__name__)
        network = planned_unet(configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision)
        return cls.adapt_network(network, hp)

    @staticmethod
    def adapt_network(network: nn.Module, hp: Any) -> nn.Module:
        """Return the method's form of the planned network; by default the network as it is.

        Args:
            network: the planned U-Net, with `encoder` and `decoder`.
            hp: the method's hyper-parameters.
        """
        return network

    def set_up(self) -> None:
        """Build what the method needs beside `self.network`, by `add_network` and `keep`; called once, seeded."""

    def optimizer_groups(self) -> Iterable[dict[str, Any]]:
        """Return the optimiser's parameter groups, by default all that is trainable: a group for each network."""
        networks = getattr(self.network, "networks", (self.network,))
        return [{"params": [p for p in network.parameters() if p.requires_grad]} for network in networks]

    def extra_steps(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> None:
        """Do what must follow the optimiser's step, such as a critic's own update."""

    # ------------------------------------------------------------------ what a method may use

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run."""
        return self.num_epochs * self.num_iterations_per_epoch

    def ramp(self, fraction: float = 1.0) -> float:
        """Return the sigmoid ramp-up that reaches 1 after `fraction` of the run."""
        return sigmoid_rampup(self.iteration, fraction * self.num_iterations)

    def add_network(self, name: str, network: nn.Module, trained: bool = True) -> nn.Module:
        """Take a further network along: on the device, in the checkpoint under its name.

        Args:
            name: its key in the checkpoint.
            network: a network in training mode, and left in it.
            trained: whether the optimiser of the prediction network steps it too. Its gradients are clipped by
                themselves, so that neither network shortens the step of the other.
        """
        move_network(network, self.device, self.num_dimensions)
        if trained:
            self.optimizer.add_param_group({"params": [p for p in network.parameters() if p.requires_grad]})
        return self.keep(name, network)

    def another_network(self) -> nn.Module:
        """Return a network like `self.network` with an initialisation of its own."""
        return self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )

    def keep(self, name: str, part: Any) -> Any:
        """Put a part of the method (with `state_dict` and `load_state_dict`) into the checkpoint; return it."""
        if name in self._stateful_parts():
            raise ValueError(f"there is a part called {name!r} already")
        self.parts[name] = part
        return part

    def probabilities(self, outputs: Tensor | list[Tensor]) -> Tensor:
        """Return probabilities (B, C, *S) of the finest logits, fp32: softmax, or sigmoid for regions."""
        return probabilities(finest(outputs), self.label_manager.has_regions)

    def one_hot(self, target: Tensor | list[Tensor]) -> Tensor:
        """Return the finest target as (B, C, *S) in 0 and 1, all 0 where it is to be ignored."""
        return one_hot(finest(target), self.label_manager)

    def annotated(self, target: Tensor | list[Tensor]) -> Tensor:
        """Return (B, 1, *S), where the finest target is not the ignore label."""
        return annotated(finest(target), self.label_manager)

    def at_every_scale(self, loss: Callable[..., Tensor], outputs: Tensor | list[Tensor], *maps: Tensor) -> Tensor:
        """Return the sum of `loss(logits, *maps)` over scales with nnU-Net's deep-supervision weights.

        Args:
            loss: function of logits (B, C, *S_k) and the maps at that resolution.
            outputs: logits per scale, finest first; a single tensor without deep supervision.
            *maps: (B, N, *S) at full resolution, such as labels and weights; each scale gets the nearest voxels.
        """
        if isinstance(outputs, Tensor):
            return loss(outputs, *maps)
        losses = []
        for weight, logits in zip(self.loss.weight_factors, outputs, strict=True):
            if weight:
                nearest = [functional.interpolate(m.float(), logits.shape[2:], mode="nearest-exact") for m in maps]
                losses.append(weight * loss(logits, *nearest))
        return torch.stack(losses).sum()

    def supervised_loss(
        self, outputs: Tensor | list[Tensor], target: Tensor | list[Tensor], known: Tensor | None = None
    ) -> Tensor:
        """Return nnU-Net's Dice and cross-entropy loss with its deep-supervision weights, in float32.

        Args:
            outputs: logits (B, C, *S_k) per scale, finest first.
            target: label map (B, 1, *S_k) or regions (B, R, *S_k) per scale.
            known: `LabeledBatch.known`; with it the loss is the marginal one, which asks nothing of the classes that a
                patch does not annotate.
        """
        with torch.autocast(self.device.type, enabled=False):
            outputs = to_float(outputs)
            if known is not None:
                exclusive = not self.label_manager.has_regions
                scales = [outputs] if isinstance(outputs, Tensor) else outputs
                merged = [marginal_logits(logits, known, exclusive) for logits in scales]
                outputs = merged[0] if isinstance(outputs, Tensor) else merged
            return self.loss(outputs, target)

    # ------------------------------------------------------------------ set-up

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the method has an unlabelled stream."""
        return bool(self.views)

    def _read_schedule(self, schedule: dict[str, Any]) -> None:
        self.schedule = schedule
        self.initial_lr = schedule["initial_lr"]
        self.weight_decay = schedule["weight_decay"]
        self.num_epochs = schedule["num_epochs"]
        self.num_iterations_per_epoch = schedule["iterations_per_epoch"]
        self.num_val_iterations_per_epoch = schedule["val_iterations_per_epoch"]
        # nnU-Net saves every 50 of 1000 epochs: the same share of a short schedule.
        self.save_every = max(1, self.num_epochs // 20)

    @classmethod
    def check_request(
        cls, plans: dict[str, Any], configuration: str, fold: int | str, dataset_json: dict[str, Any]
    ) -> None:
        """Refuse, in a sentence and before anything is written, what the method cannot train."""
        name, split, plans_name = cls.__name__, plans["lgssl"]["split"], plans["plans_name"]
        if not cls.supports_regions and PlansManager(plans).get_label_manager(dataset_json).has_regions:
            raise UsageError(
                f"{name} needs one class per voxel, and the labels in dataset.json are overlapping regions: choose "
                "another trainer, for example LGSSLTrainer, or define classes that exclude each other."
            )
        sparse = plans["lgssl"].get("sparse_annotation")
        if sparse is not None and not cls.supports_sparse_annotation:
            raise PlansError(
                f"{plans_name} have two labelled slices per case, and {name} needs whole labels: train DeSCOTrainer, "
                f"or name {sparse['planned_as']} with -p."
            )
        planned = PlansManager(plans).get_configuration(configuration)
        if planned.previous_stage_name is not None:
            raise PlansError(f"{configuration} is a cascade, which {name} cannot train: use 3d_fullres.")
        if fold != "all" and len(split["labeled"]) < MIN_CASES_FOR_FOLDS:
            raise SplitError(
                f"Fold {fold} needs at least {MIN_CASES_FOR_FOLDS} labelled cases and {plans_name} have "
                f"{len(split['labeled'])}: train with -f all."
            )
        if "partial_labels" in plans["lgssl"]:
            cls._check_partial_labels(plans, fold, dataset_json)
        if cls.views:
            cls._check_unlabeled(plans, fold)
        if cls.pairs_batches:
            cls.check_pairs(plans, configuration)
        if distributed.num_processes() > 1:
            cls.check_processes(plans, configuration, distributed.num_processes())

    @classmethod
    def _check_unlabeled(cls, plans: dict[str, Any], fold: int | str) -> None:
        """Refuse plans, or a fold of them, in which nothing is unlabelled."""
        settings = plans["lgssl"]
        if fold_unlabeled(settings, fold) or (cls.supports_partial_labels and fold_partly_annotated(settings, fold)):
            return
        what, remedy = ("", "") if fold == "all" else (f" for fold {fold}", "train with -f all, ")
        raise SplitError(
            f"{plans['plans_name']} have no unlabelled image{what}, and {cls.__name__} learns from them: {remedy}put "
            "images into imagesUn, plan with --labeled N, or train SupervisedTrainer."
        )

    @classmethod
    def _check_partial_labels(cls, plans: dict[str, Any], fold: int | str, dataset_json: dict[str, Any]) -> None:
        """Refuse labels that say nothing of some classes, if the method cannot take them or a class has none."""
        partial = plans["lgssl"]["partial_labels"]
        if not cls.supports_partial_labels:
            raise PlansError(
                f"{len(partial)} labelled cases of {plans['plans_name']} annotate only some of the classes (among them "
                f"{next(iter(partial))}), and {cls.__name__} would learn that the others are background: train "
                "SupervisedTrainer or LGSSLTrainer, or plan with --labeled_list and cases that annotate every class."
            )
        named = {name for classes in partial.values() for name in classes}
        unknown = sorted(named.difference(foreground_classes(dataset_json["labels"])))
        if unknown:
            raise PlansError(
                f"partial_labels of {plans['plans_name']} name {' and '.join(unknown)}, which dataset.json does not "
                "have as a class: plan the dataset again with lgssl_plan_and_preprocess."
            )
        missing = missing_classes(dataset_json["labels"], partial, fold_cases(plans["lgssl"], fold)[0])
        if missing:
            raise SplitError(
                f"None of the training cases of fold {fold} annotates {' and '.join(missing)}: train with -f all, or "
                "label more."
            )

    @classmethod
    def check_processes(cls, plans: dict[str, Any], configuration: str, number: int) -> None:
        """Refuse to train in `number` processes what they would not train as one process does."""
        if not cls.supports_several_gpus:
            raise UsageError(f"{cls.__name__} trains in one process only: start it without -num_gpus and torchrun.")
        planned = PlansManager(plans).get_configuration(configuration).batch_size
        asked = plans["lgssl"].get("training", {}).get("unlabeled_batch_size")
        for kind, size in (("labelled", planned), ("unlabelled", asked or planned)):
            if size % number:
                raise UsageError(
                    f"{number} processes cannot share a batch of {size} {kind} patches equally: start "
                    f"{_or([n for n in range(1, size + 1) if size % n == 0])}."
                )

    @classmethod
    def check_pairs(cls, plans: dict[str, Any], configuration: str) -> None:
        """Refuse another number of unlabelled than of labelled patches in a step."""
        asked = plans["lgssl"].get("training", {}).get("unlabeled_batch_size")
        planned = PlansManager(plans).get_configuration(configuration).batch_size
        if asked not in (None, planned):
            raise UsageError(
                f"{cls.__name__} pairs every labelled with an unlabelled patch: leave out --unlabeled_batch_size or "
                f"give {planned}."
            )

    def initialize(self) -> None:
        """Build network, optimiser, loss and teacher, under the training seed."""
        seed_everything(derive_seed(self.seed, _INITIALISATION))
        with self._as_a_single_process():
            super().initialize()
        if self.is_ddp:
            self._set_batch_size_and_oversample()
            finest_loss = self.loss.loss if self.enable_deep_supervision else self.loss
            finest_loss.dc.ddp = True
        unlabeled = self.unlabeled_batch_size or self.configuration_manager.batch_size
        self.unlabeled_batch_size = unlabeled // distributed.num_processes()
        self.num_dimensions = len(self.configuration_manager.patch_size)
        move_network(self.plain_network, self.device, self.num_dimensions)
        strides = self.configuration_manager.network_arch_init_kwargs["strides"]
        self.precision = training_precision(self.device, self.configuration_manager.patch_size, strides)
        if self.device.type == "cpu":
            keep_freed_memory()
        if hasattr(self.hp, "teacher_decay"):
            self.teacher = EMATeacher(self.plain_network, self.hp.teacher_decay)
        self.set_up()
        modules = (self.plain_network, *(part for part in self.parts.values() if isinstance(part, nn.Module)))
        distributed.copy_from_first([*modules, *([self.teacher.averaged] if self.teacher is not None else [])])
        if self.memory_factor > 1:
            self.print_to_log_file(
                f"A step of {type(self).__name__} needs about {self.memory_factor:.1f} times the memory that the plans "
                "were sized for; plan with a smaller -gpu_memory_target if it does not fit."
            )

    @contextmanager
    def _as_a_single_process(self) -> Iterator[None]:
        """Keep nnU-Net from wrapping the network for several GPUs, or from looking for it in the wrapper.

        The gradients are averaged by `average_gradients`.
        """
        several, self.is_ddp = self.is_ddp, False
        try:
            yield
        finally:
            self.is_ddp = several

    def autocast(self) -> AbstractContextManager:
        """Return the context in which a training step computes."""
        return training_autocast(self.device, self.precision)

    @property
    def plain_network(self) -> nn.Module:
        """The network without the wrapper of compilation."""
        return getattr(self.network, "_orig_mod", self.network)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return optimiser and learning-rate schedule of the plans: nnU-Net's SGD, or AdamW with cosine decay."""
        if self.schedule["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(self.optimizer_groups(), self.initial_lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                self.optimizer_groups(), self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True
            )
        if self.schedule["lr_schedule"] == "cosine":
            return optimizer, CosineSchedule(optimizer, self.initial_lr, self.num_epochs)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch deep supervision in every decoder of the network."""
        network = self.plain_network
        if hasattr(network, "set_deep_supervision"):
            network.set_deep_supervision(enabled)
        else:
            network.decoder.deep_supervision = enabled

    # ------------------------------------------------------------------ data

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return training and validation cases out of the labelled cases of the plans, see `fold_cases`."""
        return fold_cases(self.settings, self.fold)

    def unlabeled_cases(self) -> list[str]:
        """Return the unlabelled cases of the plans, without twins of this fold's validation cases."""
        return fold_unlabeled(self.settings, self.fold)

    def partly_annotated_cases(self) -> list[str]:
        """Return the training cases that leave a class open: they are unlabelled there, so both streams draw them."""
        return fold_partly_annotated(self.settings, self.fold)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        """Restrict nnU-Net's mirroring to the axes that the plans allow (left and right must stay apart)."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        allowed = self.settings["mirroring_axes"]
        if allowed is not None:
            # The plans count the three axes of the preprocessed image; a 2D patch has the last two of them.
            offset = 3 - len(self.configuration_manager.patch_size)
            mirror_axes = tuple(axis for axis in mirror_axes if axis + offset in allowed)
            # Stock prediction takes None, not an empty tuple, for "no mirroring".
            self.inference_allowed_mirroring_axes = mirror_axes or None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return iterators over training batches (labelled and unlabelled) and validation batches."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size, scales = self.configuration_manager.patch_size, self._get_deep_supervision_scales()
        labels = {
            "is_cascaded": False,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }
        use_mask = self.configuration_manager.use_mask_for_norm
        training_transforms = self.get_training_transforms(
            patch_size, rotation, scales, mirror_axes, dummy_2d, use_mask_for_norm=use_mask, **labels
        )
        training_transforms = interpolate_at_boundaries(make_deterministic(training_transforms))
        validation_transforms = self.get_validation_transforms(scales, **labels)
        training_cases, validation_cases = self.get_tr_and_val_datasets()
        loaders = {"labeled": self._labeled_loader(training_cases, initial_patch_size, training_transforms)}
        if self.uses_unlabeled:
            loaders["unlabeled"] = self.unlabeled_loader(initial_patch_size, training_transforms)
        validation = {"validation": self._labeled_loader(validation_cases, patch_size, validation_transforms)}
        first_validation = self.current_epoch * self.num_val_iterations_per_epoch
        return self._start(loaders, self.iteration, 1.0), self._start(validation, first_validation, 0.5)

    def _labeled_loader(self, cases: Any, initial_patch_size: Any, transforms: Any) -> nnUNetDataLoader:
        return nnUNetDataLoader(
            cases,
            self.batch_size,
            initial_patch_size,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            probabilistic_oversampling=self.probabilistic_oversampling,
            transforms=transforms,
        )

    @property
    def unlabeled_folder(self) -> Path:
        """The folder of the preprocessed unlabelled images."""
        return Path(f"{self.preprocessed_dataset_folder}_unlabeled")

    def unlabeled_loader(self, initial_patch_size: Any, training_transforms: Any) -> UnlabeledLoader:
        """Return the loader of unlabelled patches, by default random crops in the views that the method asks for."""
        masked = [
            channel for channel, masked in enumerate(self.configuration_manager.use_mask_for_norm or ()) if masked
        ]
        views = ViewsTransform(training_transforms, self.views, masked)
        cases = UnlabeledDataset(
            str(self.unlabeled_folder),
            self.unlabeled_cases(),
            Path(self.preprocessed_dataset_folder),
            self.partly_annotated_cases(),
        )
        return self._unlabeled_loader(cases, initial_patch_size, views)

    def _unlabeled_loader(
        self, cases: UnlabeledDataset, initial_patch_size: Any, transforms: Any, **options: Any
    ) -> UnlabeledLoader:
        return UnlabeledLoader(
            cases,
            self.unlabeled_batch_size,
            initial_patch_size,
            self.configuration_manager.patch_size,
            self.label_manager,
            transforms=transforms,
            **options,
        )

    def _start(self, loaders: dict[str, nnUNetDataLoader], start: int, share_of_workers: float) -> Any:
        workers = get_allowed_n_proc_DA()
        if self.device.type == "cpu":
            # Network and workers share the same cores.
            workers = min(workers, max(1, workers // 2))
        batches = SeededBatches(loaders, self.seed, self.local_rank, start, int(workers * share_of_workers))
        return start_workers(batches, pin_memory=self.device.type == "cuda")

    # ------------------------------------------------------------------ the loop

    def run_training(self) -> None:
        """Run nnU-Net's loop, in which the run can end after any step.

        Raises:
            TrainingStopped: a signal or a STOP file ended it; everything is saved.
            FolderBusyError: another process trains this fold.
            TrainingError: steps are not finite, a data worker died, or a file could not be written.
        """
        with self.stop, self._only_writer():
            self.on_train_start()
            try:
                while self.current_epoch < self.num_epochs:
                    self._run_epoch()
            except OSError as error:
                raise TrainingError(
                    f"{self.output_folder}: {error} at iteration {self.iteration}. Make room or make the folder "
                    "writable; the checkpoints in it are whole, and --c goes on from them."
                ) from error
            self.on_train_end()

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Keep other processes out of the fold folder, and clear away what a killed one left there."""
        if self.local_rank != 0:
            yield
            return
        folder = Path(self.output_folder)
        with hold_lock(lock_beside(folder, "training"), folder):
            remove_leftovers(folder)
            yield

    def _run_epoch(self) -> None:
        """Run an epoch, or what is left of one that was stopped."""
        self._epoch_is_open = True
        self.on_epoch_start()
        self.on_train_epoch_start()
        while self.iteration < (self.current_epoch + 1) * self.num_iterations_per_epoch:
            output = self.train_step(self._next(self.dataloader_train))
            if np.isfinite(output["loss"]):
                self._step_outputs.append(output)
        self._step_outputs = distributed.mean_rows(self._step_outputs)
        self.on_train_epoch_end(self._step_outputs or [{"loss": np.nan}])
        with torch.no_grad():
            self.on_validation_epoch_start()
            steps = range(self.num_val_iterations_per_epoch)
            self.on_validation_epoch_end([self.validation_step(self._next(self.dataloader_val)) for _ in steps])
        self._epoch_is_open, self._step_outputs = False, []
        self.on_epoch_end()

    def _next(self, batches: Any) -> dict:
        """Return the next batch, unless the run is to end here."""
        self._stop_if_asked()
        try:
            return next_batch(batches)
        except TrainingError:
            if not self.is_ddp:  # others do not know of it, and could not agree
                self._stop_if_asked()  # a signal to the whole group ended the data workers too
            raise

    def _stop_if_asked(self) -> None:
        reason = distributed.said_by_any(self.stop.reason)
        if reason is None:
            return
        file = Path(self.output_folder) / LATEST_CHECKPOINT
        self.save_checkpoint(str(file))
        self._close_data()
        how = "nothing is saved, as asked" if self.disable_checkpointing else f"{file} is saved"
        stopped = TrainingStopped(
            f"Training stopped because of {reason} after {self.iteration} of {self.num_iterations} iterations; {how}."
        )
        if self.stop.is_file(reason):
            self.stop.file.unlink(missing_ok=True)  # or the continued run would stop at once
            stopped.exit_code = 0
        distributed.wait_for_all()  # who leaves before everything is saved takes the others along
        raise stopped

    def _close_data(self) -> None:
        stop_workers(self.dataloader_train, self.dataloader_val)
        if self._progress_bar is not None:
            self._progress_bar.close()

    def on_train_start(self) -> None:
        """Open the data, and leave in the model folder everything that prediction needs."""
        if not self.was_initialized:
            self.initialize()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.print_plans()
        self.print_to_log_file(f"Hyper-parameters: {self.hp}")
        self.print_to_log_file(f"Convolutions are computed in {str(self.precision).removeprefix('torch.')}.")
        empty_cache(self.device)
        if self.local_rank == 0:
            self._write_model_description()
            self._save_debug_information()
        self._progress_bar = tqdm(
            total=self.num_iterations,
            initial=self.iteration,
            desc=type(self).__name__,
            unit="it",
            disable=self.hides_progress,
        )

    @property
    def hides_progress(self) -> bool | None:
        """What tqdm takes as `disable`; None shows a bar on a terminal only."""
        return None if self.show_progress is None else not self.show_progress

    def print_plans(self) -> None:
        """Log configuration and plans, without the hundreds of numbers of the prompt embeddings."""
        text = {key: value for key, value in (self.settings.get("text") or {}).items() if key != "embeddings"}
        plans = {**self.plans_manager.plans, "lgssl": {**self.settings, "text": text}}
        del plans["configurations"]
        self.print_to_log_file(f"Configuration {self.configuration_name}: {self.configuration_manager}\n")
        self.print_to_log_file(f"Plans: {plans}\n")

    def _write_model_description(self) -> None:
        folder, preprocessed = Path(self.output_folder_base), Path(self.preprocessed_dataset_folder_base)
        write_json(self.plans_manager.plans, folder / "plans.json")
        write_json(self.dataset_json, folder / "dataset.json")
        fingerprint = preprocessed / f"dataset_fingerprint_{planned_as(self.plans_manager.plans)}.json"
        if fingerprint.is_file():
            content = fingerprint.read_bytes()
            write_atomically(folder / "dataset_fingerprint.json", lambda temporary: temporary.write_bytes(content))

    def train_step(self, batch: dict) -> dict:
        """Do one optimisation step and return the value of the loss and of each term.

        A step in which something is not finite is left out: its loss is nan and nothing else is returned.

        Raises:
            TrainingError: five steps in a row were left out, by another reason than the scale of float16's gradients.
        """
        seed_everything(derive_seed(self.seed, self.local_rank, _STEP, self.iteration))
        if isinstance(self.lr_scheduler, CosineSchedule):
            self.lr_scheduler.step(self.iteration / self.num_iterations_per_epoch)
        try:
            output = self._step(*self.to_batches(batch))
            self.non_finite.done()
        except NonFiniteError as error:
            self.non_finite.skip(error, self.iteration)
            output = {"loss": np.float32(np.nan)}
        self.iteration += 1
        if self._progress_bar is not None:
            self._progress_bar.update()
        return output

    def _step(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            terms = self.loss_terms(labeled, unlabeled)
        with distributed.failing_together(NonFiniteError, NonFiniteError.elsewhere):
            loss = self.total(terms)
        self._optimize(loss)
        if self.teacher is not None:
            self.teacher.update(self.plain_network)
        self.extra_steps(labeled, unlabeled)
        values = {name: float(term.value.detach()) for name, term in terms.items()}
        if self._progress_bar is not None:
            self._progress_bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        weights = {f"weight of {name}": term.weight for name, term in terms.items() if term.uses_unlabeled}
        return {"loss": np.float32(loss.detach().cpu().numpy()), **values, **weights}

    def to_batches(self, batch: dict) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        """Move a batch of the loaders to the device, in the memory layout that the device prefers."""
        labeled = self._labeled_batch(batch)
        if "unlabeled_data" not in batch:
            return labeled, None
        views = {name: self._image(view) for name, view in split_views(batch["unlabeled_data"], self.views).items()}
        target = self._to_device(batch["unlabeled_target"]) if "unlabeled_target" in batch else None
        return labeled, UnlabeledBatch(
            views.get("weak"), views.get("strong"), tuple(map(str, batch["unlabeled_keys"])), target
        )

    def _labeled_batch(self, batch: dict) -> LabeledBatch:
        image, target, keys = self._image(batch["data"]), self._to_device(batch["target"]), map(str, batch["keys"])
        labeled = LabeledBatch(image, target, tuple(keys))
        known = self.known_classes(labeled.keys)
        if known is not None and self.label_manager.has_regions:
            target = without_hidden_regions(target, known)
        return replace(labeled, target=target, known=known)

    def known_classes(self, cases: Sequence[str]) -> Tensor | None:
        """Return (B, C), whether each case annotates a channel; None if all of them annotate every class."""
        if not self.partial_labels.keys() & set(cases):
            return None
        complete = (True,) * self.label_manager.num_segmentation_heads
        partial = {case: self.partial_labels[case] for case in cases if case in self.partial_labels}
        known = {case: label.known_channels(self.label_manager) for case, label in partial.items()}
        return torch.tensor([known.get(case, complete) for case in cases], device=self.device)

    def _to_device(self, scales: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(scales, list):
            return [self._to_device(scale) for scale in scales]
        return scales.to(self.device, non_blocking=True)

    def _image(self, tensor: Tensor) -> Tensor:
        memory_format = preferred_memory_format(self.device, self.num_dimensions)
        return self._to_device(tensor).contiguous(memory_format=memory_format)

    def total(self, terms: dict[str, Term]) -> Tensor:
        """Return the weighted sum of the terms.

        Raises:
            NonFiniteError: a term is not finite; raised before the optimiser's step.
        """
        for name, term in terms.items():
            if not bool(torch.isfinite(term.value.detach()).all()):
                raise NonFiniteError(f"the loss term {name!r}", float(term.value.detach()))
        active = [term.weight * term.value for term in terms.values() if term.weight != 0]
        return torch.stack(active).sum()

    def _optimize(self, loss: Tensor) -> None:
        # A scaler that is not enabled does nothing to loss, gradients and step.
        scaler = self.grad_scaler or torch.amp.GradScaler(enabled=False)
        scaler.scale(loss).backward()
        distributed.average_gradients(self.optimizer)
        scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer)
        if not bool(torch.isfinite(norm)):
            scale = scaler.get_scale()
            scaler.update()
            scale = scale if scaler.get_scale() < scale else 1.0  # not lowered: the norm alone is not finite
            raise NonFiniteError("the norm of the gradient, although the loss is finite,", float(norm), scale)
        scaler.step(self.optimizer)
        scaler.update()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log every term beside nnU-Net's loss."""
        super().on_train_epoch_end(train_outputs)
        names = [name for name in train_outputs[0] if name != "loss"]
        means = {name: float(np.mean([output[name] for output in train_outputs])) for name in names}
        self.term_log.add(self.current_epoch, means)
        for external in self.logger.loggers:
            for name, value in means.items():
                external.log(name, value, self.current_epoch)
        if self.local_rank == 0:
            summary = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            self.print_to_log_file(f"terms: {summary}", also_print_to_console=False)
            self.term_log.write_csv(Path(self.output_folder) / "lgssl_terms.csv")
            self.term_log.plot(Path(self.output_folder) / "lgssl_progress.png")

    def validation_step(self, batch: dict) -> dict:
        """Compute nnU-Net's pseudo Dice on a validation batch, in the memory layout that the device prefers.

        A patch counts for the classes that its case annotates.
        """
        labeled = self._labeled_batch(batch)
        if labeled.known is None:
            return super().validation_step({**batch, "data": labeled.image})
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):  # as in nnU-Net's step
            outputs = self.network(labeled.image)
        loss = self.supervised_loss(outputs, labeled.target, labeled.known)
        predicted = hard_labels(self.probabilities(outputs), self.label_manager.has_regions)
        counts = hard_counts(predicted, finest(labeled.target), labeled.known, self.label_manager)
        return {"loss": loss.detach().cpu().numpy(), **counts}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Run nnU-Net's final validation, and take out of its summary what a case does not annotate."""
        super().perform_actual_validation(save_probabilities)
        if not self.partial_labels or self.local_rank != 0:
            return
        file, ending = Path(self.output_folder) / "validation" / "summary.json", self.dataset_json["file_ending"]
        hides = {case: label.hides for case, label in self.partial_labels.items()}
        dice, mean = leave_out_of_summary(file, ending, hides)
        for label, value in dice.items():
            self.logger.log_summary(f"final_val/class_{label}_dice", value)
        self.logger.log_summary("final_val/foreground_dice", mean)
        self.print_to_log_file("Mean Validation Dice of annotated classes: ", mean)

    def on_train_end(self) -> None:
        """Close the progress bar and leave the final checkpoint."""
        if self._progress_bar is not None:
            self._progress_bar.close()
        super().on_train_end()
        distributed.wait_for_all()  # what follows reads what one process wrote

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint, whole or not at all, with the state of the method under its own key.

        Of several processes all have to call it, and one writes.
        """
        self._step_outputs = distributed.mean_rows(self._step_outputs)
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written: checkpointing is disabled.")
            return
        epochs_done = self.current_epoch + (not self._epoch_is_open)
        checkpoint = {
            "network_weights": self.plain_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            # Of an epoch that is not over nnU-Net's lists have nothing yet when it goes on.
            "logging": {name: values[:epochs_done] for name, values in self.logger.get_checkpoint().items()},
            "_best_ema": self._best_ema,
            "current_epoch": epochs_done,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "lgssl": {name: part.state_dict() for name, part in self._stateful_parts().items()}
            | {"terms": self.term_log.rows, "hyperparameters": asdict(self.hp)}
            | {"iteration": self.iteration, "step_outputs": self._step_outputs}
            | {"non_finite": self.non_finite.state_dict()},
        }
        write_checkpoint(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore everything that `save_checkpoint` wrote."""
        # First, because nnU-Net's method runs whatever the file asks for.
        state = read_checkpoint(Path(filename_or_checkpoint), device=self.device).get("lgssl")
        if not self.was_initialized:
            self.initialize()
        with self._as_a_single_process():
            super().load_checkpoint(filename_or_checkpoint)
        if state is None:
            raise CheckpointError(f"{filename_or_checkpoint} was not written by {type(self).__name__}.")
        for name, part in self._stateful_parts().items():
            part.load_state_dict(state[name])
        self.term_log.rows = list(state["terms"])
        self.iteration = state.get("iteration", self.current_epoch * self.num_iterations_per_epoch)
        self._step_outputs = list(state.get("step_outputs", []))
        self.non_finite.load_state_dict(state.get("non_finite", NonFiniteGuard().state_dict()))
        # nnU-Net writes checkpoint_latest before it updates the best value: taken from there, a resumed run would
        # replace checkpoint_best by a worse one.
        self._best_ema = max(self.logger.get_value("ema_fg_dice", step=None), default=None)

    def _stateful_parts(self) -> dict[str, Any]:
        teacher = {"teacher": self.teacher} if self.teacher is not None else {}
        return self.parts | teacher


def _or(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))
