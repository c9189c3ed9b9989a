"""Training as one function: what `lgssl_train` does."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgssl_nnunet.derived_plans import are_of_one_training, derive_plans, with_text
from lgssl_nnunet.errors import CheckpointError, LGSSLError, PlansError, UsageError
from lgssl_nnunet.files import read_json, read_json_if_valid, write_json
from lgssl_nnunet.paths import (
    BEST_CHECKPOINT,
    CHECKPOINTS,
    FINAL_CHECKPOINT,
    LATEST_CHECKPOINT,
    use_data_folders,
)
from lgssl_nnunet.plans.dataset_json import load_dataset_json
from lgssl_nnunet.plans.stored import load_plans, preprocessed_folder
from lgssl_nnunet.problems import first_of, raise_if_any
from lgssl_nnunet.registry import find_trainer, trainer_names

if TYPE_CHECKING:
    import torch

    from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

logger = logging.getLogger(__name__)

_MOST_NAMED = 5
_WITHOUT_IT = "Move it away; --c then goes on from the next checkpoint in its folder, and starts anew without one."


def train(
    dataset: int | str,
    configuration: str = "3d_fullres",
    trainer: str = "LGSSLTrainer",
    *,
    fold: int | str = "all",
    plans: str | None = None,
    epochs: int | None = None,
    iterations_per_epoch: int | None = None,
    unlabeled_batch_size: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
    hyperparameters: Mapping[str, Any] | None = None,
    pretrained_weights: Path | str | None = None,
    trust_checkpoint: bool = False,
    continue_training: bool = False,
    only_validate: bool = False,
    validate_best: bool = False,
    export_probabilities: bool = False,
    disable_checkpointing: bool = False,
    num_gpus: int = 1,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Path:
    """Train a model and leave an nnU-Net model folder.

    Options that differ from the plans (epochs, iterations, batch, seed, hyper-parameters) are written into a derived
    plans file with a name of its own, so no run overwrites another.

    Args:
        dataset: dataset id or name.
        configuration: "2d", "3d_fullres" or "3d_lowres"; with a protocol also "3d_literature".
        trainer: name of a trainer class, see `lgssl_info`.
        fold: "all" (every labelled case trains) or 0 to 4 (nnU-Net's five folds inside the labelled cases).
        plans: plans name; None takes the dataset's only LGSSL plans, else the newest.
        epochs: number of epochs instead of the planned one.
        iterations_per_epoch: optimiser steps per epoch instead of the planned number.
        unlabeled_batch_size: unlabelled patches per step; None means as many as labelled ones.
        seed: training seed (initialisation, batches, dropout).
        deterministic: compute so that a repeated run on the same machine, with as many threads, has the same weights to
            the bit; slower on a GPU.
        hyperparameters: values of the method's hyper-parameters by name.
        pretrained_weights: checkpoint whose weights start the training (segmentation layers excepted).
        trust_checkpoint: read pretrained weights from a file that holds more than tensors and numbers.
        continue_training: go on from the newest checkpoint of this run.
        only_validate: skip training and run the final validation.
        validate_best: use checkpoint_best.pth for the final validation.
        export_probabilities: save the validation's class probabilities as .npz.
        disable_checkpointing: write no checkpoints.
        num_gpus: number of processes on this machine that share the training, each with a GPU, or all on the CPU with
            `device` "cpu". Started by torchrun, the function takes the process that it is in for one of several.
        device: torch device or its name; None chooses. Of several processes each takes the GPU of its number.
        progress: show a progress bar; None means on a terminal only.

    Returns:
        The model folder (`<Trainer>__<plans>__<configuration>`).

    Raises:
        UsageError: options that do not fit together, unknown names.
        PlansError: no such plans or configuration.
        CheckpointError: the run exists already, or there is nothing to validate.
        TrainingStopped: a signal or a file named STOP in the fold folder ended it; `continue_training` goes on.
        TrainingError: five steps in a row were not finite, or a checkpoint could not be written.
    """
    arguments = dict(locals(), num_gpus=1)
    use_data_folders()
    _check_flags(continue_training, only_validate, validate_best, disable_checkpointing, pretrained_weights)
    fold = parse_fold(fold)
    trainer_class = find_trainer(trainer)
    dataset_folder = preprocessed_folder(dataset)
    base_plans = load_plans(dataset_folder, plans)
    _check_plans(base_plans, configuration, trainer, dataset_folder)
    options = (epochs, iterations_per_epoch, unlabeled_batch_size, seed, hyperparameters)
    used_plans, model_folder = _plans_and_folder(base_plans, dataset_folder, trainer_class, configuration, options)
    _check_model(model_folder, fold, used_plans, continue_training, only_validate, validate_best)
    logger.info("Plans: %s. Model folder: %s", used_plans["plans_name"], model_folder)
    if num_gpus != 1:
        _check_number_of_processes(num_gpus, device)
        _check_trainer(trainer_class, used_plans, configuration, fold, dataset_folder, num_gpus)
        from lgssl_nnunet.engine.launching import launch

        launch(train, num_gpus, arguments)
        return model_folder
    with _one_of_several(trainer_class, device) as own_device:
        run = _build(trainer_class, used_plans, configuration, fold, dataset_folder, continue_training, own_device)
        if run.local_rank == 0:
            _write_plans(dataset_folder, used_plans, base_plans)
        run.disable_checkpointing, run.show_progress = disable_checkpointing, progress if run.local_rank == 0 else False
        with _algorithms(deterministic):
            _load_weights(run, continue_training, only_validate, pretrained_weights, trust_checkpoint)
            _run_training(run, only_validate)
            _validate(run, fold, only_validate, validate_best, export_probabilities)
    return model_folder


def trained_model_folder(
    dataset: int | str,
    configuration: str,
    trainer: str,
    *,
    plans: str,
    epochs: int | None = None,
    iterations_per_epoch: int | None = None,
    seed: int | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Path:
    """Return the model folder that `train` fills when it is given the same options; nothing is written.

    Args:
        dataset: dataset id or name.
        configuration: for example "3d_fullres".
        trainer: name of a trainer class.
        plans: plans name.
        epochs: number of epochs instead of the planned one.
        iterations_per_epoch: optimiser steps per epoch instead of the planned number.
        seed: training seed.
        hyperparameters: values of the method's hyper-parameters by name.

    Raises:
        UsageError: unknown names or values.
        PlansError: no such plans.
        CheckpointError: the folder holds a model of other plans of that name.
    """
    use_data_folders()
    dataset_folder = preprocessed_folder(dataset)
    base_plans = load_plans(dataset_folder, plans)
    options = (epochs, iterations_per_epoch, None, seed, hyperparameters)
    trainer_class = find_trainer(trainer)
    used_plans, folder = _plans_and_folder(base_plans, dataset_folder, trainer_class, configuration, options)
    _refuse_other_plans(folder, used_plans)
    return folder


def parse_fold(fold: int | str) -> int | str:
    """Return "all" or the fold's number.

    Raises:
        UsageError: anything else.
    """
    if fold == "all":
        return fold
    if str(fold) in ("0", "1", "2", "3", "4"):
        return int(fold)
    raise UsageError(f"Fold {fold!r} does not exist: use all, or 0 to 4.")


def _check_flags(
    continue_training: bool,
    only_validate: bool,
    validate_best: bool,
    disable_checkpointing: bool,
    pretrained_weights: Path | str | None,
) -> None:
    if continue_training and only_validate:
        raise UsageError("--c continues a training and --val only validates a finished one: give one of them.")
    if continue_training and pretrained_weights is not None:
        raise UsageError("--c and -pretrained_weights exclude each other: pretrained weights start a training.")
    if validate_best and disable_checkpointing:
        raise UsageError("--val_best needs the checkpoint that --disable_checkpointing does not write.")
    if pretrained_weights is not None and not Path(pretrained_weights).is_file():
        raise UsageError(f"The file of -pretrained_weights does not exist: {pretrained_weights}.")


def _check_number_of_processes(num_gpus: int, device: str | torch.device | None) -> None:
    """Refuse a number of processes that this machine has no devices for."""
    import torch

    from lgssl_nnunet.engine.distributed import check_devices, is_launched
    from lgssl_nnunet.inference.device import choose_device

    if is_launched():
        raise UsageError("-num_gpus starts processes and so does torchrun: leave out one of them.")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus < 1 or (device is None and num_gpus > found):
        raise UsageError(
            f"-num_gpus {num_gpus}: torch sees {found} CUDA GPU(s) here; give at most as many, or -device cpu for "
            "processes that share the CPU."
        )
    check_devices(choose_device(device), num_gpus)


def _check_plans(plans: dict[str, Any], configuration: str, trainer: str, dataset_folder: Path) -> None:
    if "lgssl" in plans and trainer not in trainer_names():
        # They would ignore the split, the schedule and every option.
        raise PlansError(
            f"{trainer} is nnU-Net's own and knows nothing of the labelled cases and the schedule in "
            f"{plans['plans_name']}: train SupervisedTrainer, which is nnU-Net on the labelled cases, or name plans of "
            "nnU-Net with -p."
        )
    if configuration not in plans["configurations"]:
        cascade = " The cascade is not supported." if "cascade" in configuration else ""
        raise PlansError(
            f"{plans['plans_name']} have no configuration {configuration}; they have "
            f"{', '.join(plans['configurations'])}.{cascade}"
        )
    folder = dataset_folder / plans["configurations"][configuration]["data_identifier"]
    if not folder.is_dir():
        raise PlansError(
            f"{folder} does not exist: configuration {configuration} is planned but not preprocessed. Run "
            f"lgssl_plan_and_preprocess again with -c {configuration} and without --no_pp."
        )
    if "lgssl" in plans:
        _check_network(dataset_folder / f"{plans['plans_name']}.json", plans, configuration)
        _check_preprocessed(dataset_folder, plans, configuration)


def _check_network(file: Path, plans: dict[str, Any], configuration: str) -> None:
    """Refuse plans that name classes of elsewhere, which would be called, or whose architecture is no network."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from lgssl_nnunet.inference.known_classes import require_known_classes

    try:
        planned = PlansManager(plans)
        chosen = planned.get_configuration(configuration)
        require_known_classes(planned, chosen, file)
        with torch.device("meta"):  # takes neither memory nor time
            network = get_network_from_plans(
                chosen.network_arch_class_name,
                chosen.network_arch_init_kwargs,
                chosen.network_arch_init_kwargs_req_import,
                1,
                2,
                allow_init=False,
            )
            network(torch.empty(1, 1, *chosen.patch_size))
    except LGSSLError:
        raise
    except Exception as error:  # networks fail in as many ways as layers have arguments
        reason = f"{type(error).__name__}: {error}"[:200]
        raise PlansError(
            f"{file} makes no network for {configuration} ({reason}); plan the dataset again with "
            "lgssl_plan_and_preprocess."
        ) from error


def _dataset_json(dataset_folder: Path, plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a preprocessed dataset, checked if this package planned it."""
    return load_dataset_json(dataset_folder) if "lgssl" in plans else read_json(dataset_folder / "dataset.json")


def _check_preprocessed(dataset_folder: Path, plans: dict[str, Any], configuration: str) -> None:
    from lgssl_nnunet.plans.preprocessing import unprepared_cases
    from lgssl_nnunet.plans.sparse_annotation import unannotated_cases

    dataset_json = _dataset_json(dataset_folder, plans)
    missing = unprepared_cases(dataset_folder, plans, configuration, dataset_json)
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise PlansError(
            f"{len(missing)} cases are not preprocessed as {plans['plans_name']} ask ({shown}): plan the dataset again "
            f"with the same options and -c {configuration}; what is up to date is kept."
        )
    _check_annotated(dataset_folder, plans, dataset_json)
    missing = unannotated_cases(dataset_folder, plans, configuration)
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise PlansError(
            f"The slices of {len(missing)} cases are not propagated as {plans['plans_name']} ask ({shown}): run "
            f"lgssl_sparse_annotation again with the same options and -c {configuration}; what is up to date is kept."
        )


def _check_annotated(dataset_folder: Path, plans: dict[str, Any], dataset_json: Mapping[str, Any]) -> None:
    """Refuse plans that are older than a change of `annotated`: other plans of the dataset were made since."""
    from lgssl_nnunet.plans.partial_labels import annotated_classes, annotation_problems

    raise_if_any(annotation_problems(dataset_json), dataset_folder.name)
    now = annotated_classes(dataset_json, plans["lgssl"]["split"]["labeled"])
    planned = plans["lgssl"].get("partial_labels", {})
    differing = sorted(case for case in {**planned, **now} if set(planned.get(case, ())) != set(now.get(case, ())))
    if differing:
        raise PlansError(
            f"'annotated' of dataset.json was changed for {first_of(differing, _MOST_NAMED)} after "
            f"{plans['plans_name']} were made: plan the dataset again with the same options."
        )


def _check_trainer(
    trainer_class: type,
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_folder: Path,
    number: int,
) -> None:
    """Let the method refuse the run once, before the processes are started."""
    _refuse_stock_trainer(trainer_class)
    dataset_json = _dataset_json(dataset_folder, plans)
    trainer_class.check_request(plans, configuration, fold, dataset_json)
    trainer_class.check_processes(plans, configuration, number)


def _refuse_stock_trainer(trainer_class: type) -> None:
    if trainer_class.__name__ not in trainer_names():
        raise UsageError(
            f"{trainer_class.__name__} is nnU-Net's own: train it on several GPUs with nnUNetv2_train -num_gpus."
        )


@contextmanager
def _one_of_several(trainer_class: type, device: str | torch.device | None) -> Iterator[torch.device]:
    """Within the block, this process shares the training with those that were started along with it, if any were."""
    from lgssl_nnunet.engine.distributed import is_launched, process_group
    from lgssl_nnunet.inference.device import choose_device

    if is_launched():
        _refuse_stock_trainer(trainer_class)
    with process_group(choose_device(device)) as own_device:
        yield own_device


def _write_plans(dataset_folder: Path, plans: dict[str, Any], base_plans: dict[str, Any]) -> None:
    """Write derived plans; only once nothing refuses them any more."""
    if plans is not base_plans:
        write_json(plans, dataset_folder / f"{plans['plans_name']}.json")


def _plans_and_folder(
    base_plans: dict[str, Any], dataset_folder: Path, trainer_class: type, configuration: str, options: tuple[Any, ...]
) -> tuple[dict[str, Any], Path]:
    """Return the plans with the options of a training (those of `derive_plans`), and the model folder that it fills."""
    derived = derive_plans(base_plans, trainer_class, *options)
    name = f"{trainer_class.__name__}__{derived['plans_name']}__{configuration}"
    folder = Path(os.environ["nnUNet_results"]) / dataset_folder.name / name
    return with_text(derived, base_plans, folder), folder


def _check_model(
    model_folder: Path,
    fold: int | str,
    plans: Mapping[str, Any],
    continue_training: bool,
    only_validate: bool,
    validate_best: bool,
) -> None:
    """Refuse what the model folder does not allow, however many GPUs the run is for."""
    _check_run(model_folder / f"fold_{fold}", continue_training, only_validate, validate_best)
    _refuse_other_plans(model_folder, plans)


def _check_run(fold_folder: Path, continue_training: bool, only_validate: bool, validate_best: bool) -> None:
    existing = [name for name in CHECKPOINTS if (fold_folder / name).is_file()]
    if only_validate and FINAL_CHECKPOINT not in existing:
        raise CheckpointError(f"{fold_folder} has no {FINAL_CHECKPOINT}: train first, or finish the training with --c.")
    if only_validate and validate_best and BEST_CHECKPOINT not in existing:
        raise CheckpointError(
            f"{fold_folder} has no {BEST_CHECKPOINT}: leave out --val_best to validate the final one."
        )
    if existing and not (continue_training or only_validate):
        raise CheckpointError(
            f"{fold_folder} already holds {existing[0]}: continue it with --c, choose another --seed, or move the "
            "folder away."
        )


def _refuse_other_plans(model_folder: Path, plans: Mapping[str, Any]) -> None:
    """Refuse other plans than those of the folds that are there: split, spacing, text or network may differ."""
    file = model_folder / "plans.json"
    if not any((fold / name).is_file() for fold in model_folder.glob("fold_*") for name in CHECKPOINTS):
        return
    if file.is_file() and not are_of_one_training(read_json_if_valid(file), plans):
        raise CheckpointError(
            f"{file} differs from the present {plans['plans_name']}: the dataset was planned anew since these folds "
            "were trained. Move the model folder away to train again, or plan as before to go on with them."
        )


def _build(
    trainer_class: type,
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_folder: Path,
    continue_training: bool,
    device: torch.device,
) -> SemiSupervisedTrainer:
    if device.type == "cuda":
        import torch

        # As nnU-Net's own command: patches have one size, for which the fastest algorithm is found once.
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(device)
    dataset_json = _dataset_json(dataset_folder, plans)
    # nnU-Net takes this entry out of the plans that it is given.
    plans = {**plans, "continue_training": continue_training}
    return trainer_class(plans=plans, configuration=configuration, fold=fold, dataset_json=dataset_json, device=device)


def _algorithms(deterministic: bool) -> AbstractContextManager[None]:
    from lgssl_nnunet.engine.determinism import deterministic_algorithms

    return deterministic_algorithms() if deterministic else nullcontext()


def _load_weights(
    run: SemiSupervisedTrainer,
    continue_training: bool,
    only_validate: bool,
    pretrained_weights: Path | str | None,
    trust_checkpoint: bool = False,
) -> None:
    if pretrained_weights is not None:
        from lgssl_nnunet.engine.pretrained import load_pretrained

        run.initialize()
        # nnU-Net's own trainers have neither companions nor teacher.
        load_pretrained(run.network, pretrained_weights, trust_checkpoint, getattr(run, "parts", None))
        if getattr(run, "teacher", None) is not None:
            run.teacher.restart(run.plain_network)
        return
    if not (continue_training or only_validate):
        return
    from lgssl_nnunet.engine.checkpoints import newest_whole_checkpoint

    folder = Path(run.output_folder)
    checkpoint = folder / FINAL_CHECKPOINT if only_validate else newest_whole_checkpoint(folder)
    if checkpoint is None:
        logger.warning(
            "%s holds no checkpoint to continue from: starting a new training.%s", folder, _unfinished(folder)
        )
        return
    logger.info("%s %s", "Continuing from" if continue_training else "Validating", checkpoint)
    _load_checkpoint(run, checkpoint)


def _load_checkpoint(run: SemiSupervisedTrainer, checkpoint: Path) -> None:
    try:
        run.load_checkpoint(str(checkpoint))
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_WITHOUT_IT}") from error
    except LGSSLError:
        raise
    except Exception as error:  # weights that do not fit fail in as many ways as networks and optimisers have parts
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({reason}): it is of another network. {_WITHOUT_IT}"
        ) from error


def _unfinished(folder: Path) -> str:
    """Return a sentence on unfinished runs of the same trainer under other options, which may have been meant."""
    trainer = folder.parent.name.split("__")[0]
    folds = [file.parent for file in sorted(folder.parent.parent.glob(f"{trainer}__*/fold_*/{LATEST_CHECKPOINT}"))]
    names = [f"{fold.parent.name}/{fold.name}" for fold in folds if not (fold / FINAL_CHECKPOINT).exists()]
    return f" Unfinished are {', '.join(names)}; they continue with --c and their own options." if names else ""


def _run_training(run: SemiSupervisedTrainer, only_validate: bool) -> None:
    if only_validate:
        return
    if run.current_epoch >= run.num_epochs:
        _keep_final(run)
        return
    try:
        run.run_training()
    except KeyboardInterrupt:
        checkpoint = Path(run.output_folder) / LATEST_CHECKPOINT
        logger.warning(
            "Stopped in epoch %d of %d. %s",
            run.current_epoch + 1,
            run.num_epochs,
            f"What was saved last is {checkpoint}: the same command with --c goes on from it."
            if checkpoint.is_file()
            else "Nothing is saved yet: the same command begins anew.",
        )
        raise


def _keep_final(run: SemiSupervisedTrainer) -> None:
    """Write the final checkpoint of a finished training anew if it is damaged or gone."""
    from lgssl_nnunet.engine.checkpoints import is_whole

    final = Path(run.output_folder) / FINAL_CHECKPOINT
    if is_whole(final):
        logger.info("The training is finished: nothing to continue.")
        return
    run.save_checkpoint(str(final))
    logger.info("The training is finished; %s is written anew from its last state.", final)


def _validate(
    run: SemiSupervisedTrainer, fold: int | str, only_validate: bool, validate_best: bool, export_probabilities: bool
) -> None:
    if fold == "all" and not (only_validate or validate_best):
        logger.info("Fold all holds no case back: no final validation (--val runs it on the training cases).")
        return
    if validate_best:
        _load_checkpoint(run, Path(run.output_folder) / BEST_CHECKPOINT)
    run.perform_actual_validation(export_probabilities)
