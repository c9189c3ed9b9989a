"""Which trained models there are, and which of them predicts when the user names few or none of its parts.

Reads folder names, files and manifests of bundles only: no torch, no nnU-Net.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.files import parse_json
from lgssl_nnunet.inference.bundles import Bundle, open_bundle
from lgssl_nnunet.paths import FINAL_CHECKPOINT, data_folders, dataset_number, is_dataset
from lgssl_nnunet.registry import trainer_names

BASELINE = "SupervisedTrainer"


@dataclass(frozen=True)
class TrainedModel:
    """One model folder of nnU-Net's layout: `<dataset>/<trainer>__<plans>__<configuration>/fold_*`.

    In a folder with another name trainer, plans and configuration are empty.
    """

    dataset: str
    trainer: str
    plans: str
    configuration: str
    folder: Path
    folds: tuple[str, ...]

    def folds_with(self, checkpoint: str = FINAL_CHECKPOINT) -> tuple[str, ...]:
        """Return the folds that hold this checkpoint file."""
        return tuple(fold for fold in self.folds if self.checkpoint_file(fold, checkpoint).is_file())

    @property
    def finished_folds(self) -> tuple[str, ...]:
        """The folds whose training is complete."""
        return self.folds_with(FINAL_CHECKPOINT)

    def checkpoint_file(self, fold: str, checkpoint: str = FINAL_CHECKPOINT) -> Path:
        """Return where the checkpoint of a fold lies, whether or not it exists."""
        return self.folder / f"fold_{fold}" / checkpoint

    def modified(self, checkpoint: str = FINAL_CHECKPOINT) -> float:
        """Return when the newest of the checkpoints was written, in seconds since 1970; 0 without any."""
        files = [self.checkpoint_file(fold, checkpoint) for fold in self.folds_with(checkpoint)]
        return max((file.stat().st_mtime for file in files), default=0.0)

    def read_json(self, name: str) -> dict:
        """Return `plans.json` or `dataset.json`.

        Raises:
            CheckpointError: the file is missing or no JSON.
        """
        return read_model_json(self.folder, name)

    def __str__(self) -> str:
        if not self.trainer:
            return str(self.folder)
        return f"{self.dataset} {self.trainer} {self.plans} {self.configuration}"


@dataclass(frozen=True)
class BundledModel(TrainedModel):
    """A model in a bundle, whose file stands for the folder."""

    bundle: Bundle

    def folds_with(self, checkpoint: str = FINAL_CHECKPOINT) -> tuple[str, ...]:
        """Return the folds whose weights of this checkpoint are in the bundle."""
        return tuple(part.fold for part in self.bundle.weights if part.checkpoint == checkpoint)

    def modified(self, checkpoint: str = FINAL_CHECKPOINT) -> float:
        """Return when the newest of the checkpoints was written, before it went into the bundle."""
        times = [part.written.timestamp() for part in self.bundle.weights if part.checkpoint == checkpoint]
        return max(times, default=0.0)

    def read_json(self, name: str) -> dict:
        """Return `plans.json` or `dataset.json`."""
        return self.bundle.read_json(name)


@dataclass(frozen=True)
class ChosenModel:
    """The model, folds and checkpoint that predict, and why in words."""

    model: TrainedModel
    folds: tuple[str, ...]
    checkpoint: str
    reason: str

    @property
    def folder(self) -> Path:
        """The model folder, or the bundle."""
        return self.model.folder

    def __str__(self) -> str:
        trained = datetime.fromtimestamp(self.model.modified(self.checkpoint)).strftime("%Y-%m-%d %H:%M")
        folds = " ".join(self.folds)
        return f"{self.model}, fold {folds}, {self.checkpoint} of {trained} ({self.reason})"


def find_models(results: str | Path) -> list[TrainedModel]:
    """List the models in a results folder, finished or not, in order of their folders' names.

    Args:
        results: the folder in `nnUNet_results`.

    Returns:
        One entry per model folder that has at least one `fold_*` folder; empty if the results folder is missing.
    """
    datasets = [folder for folder in _subfolders(Path(results)) if dataset_number(folder.name) is not None]
    folders = [folder for dataset in datasets for folder in _subfolders(dataset)]
    return [model for folder in folders if (model := _read_model(folder)) is not None and model.folds]


def model_from_folder(
    folder: str | Path, folds: Sequence[int | str] | None = None, checkpoint: str = FINAL_CHECKPOINT
) -> ChosenModel:
    """Return the model of a named folder or bundle, with all its folds that hold the checkpoint unless folds are given.

    Raises:
        CheckpointError: the folder is no model folder, the file no bundle, or a checkpoint is not there.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        return _model_from_bundle(folder, folds, checkpoint)
    if not folder.is_dir():
        raise CheckpointError(
            f"The model folder {folder} is missing; give the folder that holds plans.json and fold_*, or a bundle."
        )
    if folder.name.startswith("fold_"):
        raise CheckpointError(f"{folder} is one fold; give the model folder {folder.parent} and the fold with -f.")
    model = _read_model(folder) or TrainedModel(
        dataset=folder.parent.name, trainer="", plans="", configuration="", folder=folder, folds=_folds(folder)
    )
    return ChosenModel(model, _choose_folds(model, folds, checkpoint), checkpoint, "named with -m")


def _model_from_bundle(file: Path, folds: Sequence[int | str] | None, checkpoint: str) -> ChosenModel:
    bundle = open_bundle(file)
    parts = (bundle.dataset, bundle.trainer, bundle.plans, bundle.configuration)
    model = BundledModel(*parts, folder=file, folds=tuple({part.fold: None for part in bundle.weights}), bundle=bundle)
    if not _has_folds(model, folds, checkpoint):
        wanted = f"{checkpoint} of fold {' '.join(map(str, folds))}" if folds else checkpoint
        there = ", ".join(f"{part.checkpoint} of fold {part.fold}" for part in bundle.weights)
        raise CheckpointError(f"{file} has no {wanted}: choose with -f and -chk among what it holds, {there}.")
    return ChosenModel(model, _choose_folds(model, folds, checkpoint), checkpoint, "bundle named with -m")


def select_model(
    model_folder: str | Path | None,
    dataset: int | str | None,
    trainer: str | None,
    plans: str | None,
    configuration: str | None,
    folds: Sequence[int | str] | None,
    checkpoint: str,
) -> ChosenModel:
    """Return the model of a named folder or bundle, or the one in nnUNet_results that fits the other arguments.

    Raises:
        UsageError: both are given, and as for `choose_model`.
        CheckpointError: as for `model_from_folder` and `choose_model`.
    """
    if model_folder is None:
        return choose_model(
            find_models(data_folders()["nnUNet_results"].path),
            dataset=dataset,
            trainer=trainer,
            plans=plans,
            configuration=configuration,
            folds=folds,
            checkpoint=checkpoint,
        )
    if any(part is not None for part in (dataset, trainer, plans, configuration)):
        raise UsageError("-m names the model folder or the bundle, so leave out -d, -tr, -p and -c.")
    return model_from_folder(model_folder, folds, checkpoint)


def choose_model(
    models: Sequence[TrainedModel],
    *,
    dataset: int | str | None = None,
    trainer: str | None = None,
    plans: str | None = None,
    configuration: str | None = None,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
) -> ChosenModel:
    """Choose one model among those found, by nnU-Net's five coordinates as far as they are given.

    Of the models that fit and hold the checkpoint, a semi-supervised one of this package goes before all others,
    and then the newest. The folds are all those that hold the checkpoint, `fold_all` alone where it is there.

    Args:
        models: what `find_models` returned.
        dataset: id (501) or name (Dataset501_Liver).
        trainer: class name.
        plans: plans identifier.
        configuration: for example 3d_fullres.
        folds: the folds to average.
        checkpoint: file name of the checkpoint.

    Raises:
        UsageError: a coordinate fits no model, or several datasets have models and none is named.
        CheckpointError: there are no models, or none is finished.
    """
    if not models:
        raise CheckpointError("There is no trained model in nnUNet_results: train one first with lgssl_train.")
    fitting = _keep(list(models), "dataset", "-d", _dataset_name(models, dataset))
    for attribute, flag, value in (
        ("trainer", "-tr", trainer),
        ("plans", "-p", plans),
        ("configuration", "-c", configuration),
    ):
        fitting = _keep(fitting, attribute, flag, value)
    finished = [model for model in fitting if _has_folds(model, folds, checkpoint)]
    if not finished:
        raise CheckpointError(_unfinished_message(fitting, folds, checkpoint))
    datasets = sorted({model.dataset for model in finished})
    if len(datasets) > 1:
        listing = "\n".join(f"  -d {dataset_number(name)}   {name}" for name in datasets)
        raise UsageError(f"There are models of {len(datasets)} datasets, so name one with -d:\n{listing}")
    best = min(finished, key=lambda model: (not _is_semi_supervised(model), -model.modified(checkpoint)))
    return ChosenModel(best, _choose_folds(best, folds, checkpoint), checkpoint, _reason(best, finished))


def _reason(best: TrainedModel, finished: Sequence[TrainedModel]) -> str:
    if len(finished) == 1:
        return "the only finished one that fits"
    kind = "the newest semi-supervised one" if _is_semi_supervised(best) else "the newest"
    return f"{kind} of {len(finished)} finished ones that fit; choose another with -tr, -p, -c"


def _is_semi_supervised(model: TrainedModel) -> bool:
    return model.trainer != BASELINE and model.trainer in trainer_names()


def _keep(models: list[TrainedModel], attribute: str, flag: str, value: str | None) -> list[TrainedModel]:
    """Return the models with this coordinate, or say which values there are."""
    if value is None:
        return models
    kept = [model for model in models if getattr(model, attribute) == value]
    if not kept:
        known = sorted({getattr(model, attribute) for model in models})
        near = difflib.get_close_matches(value, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        one = attribute != "dataset" and len({model.dataset for model in models}) == 1
        where = models[0].dataset if one else "nnUNet_results"
        raise UsageError(f"{flag} {value}: no trained model in {where} has it; {hint}There is {', '.join(known)}.")
    return kept


def _dataset_name(models: Sequence[TrainedModel], dataset: int | str | None) -> str | None:
    """Return the full dataset name for an id or a name; unknown ones are returned as given."""
    if dataset is None:
        return None
    names = sorted({model.dataset for model in models if is_dataset(model.dataset, dataset)})
    if len(names) > 1:
        raise UsageError(f"-d {dataset} fits several datasets: {', '.join(names)}; give the full name.")
    return names[0] if names else str(dataset)


def _has_folds(model: TrainedModel, folds: Sequence[int | str] | None, checkpoint: str) -> bool:
    available = model.folds_with(checkpoint)
    return bool(available) and all(str(fold) in available for fold in folds or ())


def _choose_folds(model: TrainedModel, folds: Sequence[int | str] | None, checkpoint: str) -> tuple[str, ...]:
    available = model.folds_with(checkpoint)
    if not available or not _has_folds(model, folds, checkpoint):
        raise CheckpointError(_unfinished_message([model], folds, checkpoint))
    if folds:
        return tuple(dict.fromkeys(str(fold) for fold in folds))
    return ("all",) if "all" in available else available


def _unfinished_message(models: Sequence[TrainedModel], folds: Sequence[int | str] | None, checkpoint: str) -> str:
    wanted = f"{checkpoint} in fold {' '.join(map(str, folds))}" if folds else checkpoint
    lines = []
    for model in models:
        present = sorted({file.name for fold in model.folds for file in (model.folder / f"fold_{fold}").glob("*.pth")})
        folds_there = " ".join(model.folds) or "none"
        folds_with = " ".join(model.folds_with(checkpoint)) or "none"
        lines.append(
            f"  {model.folder}: folds {folds_there}, with {checkpoint} {folds_with}; "
            f"checkpoints {', '.join(present) or 'none'}"
        )
    trained = {fold for model in models for fold in model.folds}
    untrained = [str(fold) for fold in folds or () if str(fold) not in trained]
    if untrained:
        remedy = f"fold {' '.join(untrained)} was never trained; train it, or choose among those below with -f"
    else:
        remedy = "finish the training with lgssl_train ... --c, or name a checkpoint with -chk or folds with -f"
    return f"No model has {wanted}: {remedy}. Looked at\n" + "\n".join(lines)


def _read_model(folder: Path) -> TrainedModel | None:
    """Return the model in a folder named `<trainer>__<plans>__<configuration>`, None for other folders."""
    parts = folder.name.split("__")
    if len(parts) != 3 or not all(parts):
        return None
    return TrainedModel(folder.parent.name, *parts, folder=folder, folds=_folds(folder))


def _folds(folder: Path) -> tuple[str, ...]:
    names = [sub.name.removeprefix("fold_") for sub in _subfolders(folder) if sub.name.startswith("fold_")]
    return tuple(sorted((n for n in names if n == "all" or n.isdigit()), key=lambda n: (n == "all", n.zfill(4))))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def read_model_json(folder: Path, name: str) -> dict:
    """Return `plans.json` or `dataset.json` of a model folder.

    Raises:
        CheckpointError: the file is missing or no JSON.
    """
    file = folder / name
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} is missing, so {folder} is not a complete model folder; copy it there."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not readable as JSON ({error}); copy it again from the trained model."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; copy it again from the trained model.")
    return content
