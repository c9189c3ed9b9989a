"""What a report says about where its numbers come from: data, method, budget, versions, commands."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lgssl_nnunet.evaluation.report.curves import hyperparameters, read_training_log
from lgssl_nnunet.evaluation.report.inputs import ReportInputs
from lgssl_nnunet.files import read_json_if_valid
from lgssl_nnunet.installation import installed_version
from lgssl_nnunet.paths import dataset_number

_PACKAGES = ("lgssl_nnunet", "nnunetv2", "torch", "numpy", "SimpleITK")
_NAMES_IN_FOLDER = ("trainer", "plans", "configuration")


@dataclass(frozen=True)
class Fact:
    """One line of the page's list: a name, a value, and longer details that can be unfolded."""

    name: str
    value: str
    details: str = ""


def collect_facts(inputs: ReportInputs, command: Sequence[str]) -> list[Fact]:
    """Return what is known about model, budget, prediction and versions; what is unknown is left out.

    Folders of this machine are named by their last part only, because reports are handed on.

    Args:
        inputs: the files of the report.
        command: the command line that makes this report.
    """
    model = _model_coordinates(inputs)
    facts = [Fact("Dataset", inputs.dataset)]
    facts += [Fact(name.capitalize(), model[name]) for name in _NAMES_IN_FOLDER if model.get(name)]
    facts += [Fact("Folds", ", ".join(fold.name.removeprefix("fold_") for fold in inputs.folds))]
    facts += _budget((inputs.plans or {}).get("lgssl", {}))
    facts += _training(inputs)
    facts += _prediction(inputs.prediction_record)
    facts += _versions(inputs.prediction_record)
    facts += _commands(inputs, model, command)
    return [fact for fact in facts if fact.value]


def class_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Return a name for each label value above 0; a value that belongs to several regions carries all their names."""
    names: dict[int, list[str]] = {}
    for name, values in dataset_json["labels"].items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            names.setdefault(int(value), []).append(name)
    return {value: " + ".join(found) for value, found in sorted(names.items()) if value > 0}


def foreground_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the names of classes or regions in the order of the dataset, without background and ignored voxels."""
    return [name for name, value in dataset_json["labels"].items() if value != 0 and name != "ignore"]


def ignored_label(dataset_json: Mapping[str, Any]) -> int | None:
    """Return the value of the label "ignore", None without one."""
    value = dataset_json["labels"].get("ignore")
    return None if value is None else int(value)


def _model_coordinates(inputs: ReportInputs) -> dict[str, str]:
    """Return trainer, plans and configuration, from the prediction's record or else from the model folder's name."""
    recorded = inputs.prediction_record.get("model", {})
    if recorded:
        return {name: str(recorded.get(name, "")) for name in _NAMES_IN_FOLDER}
    parts = inputs.model.name.split("__") if inputs.model else []
    if len(parts) == 3:
        return dict(zip(_NAMES_IN_FOLDER, parts, strict=True))
    return {"plans": (inputs.plans or {}).get("plans_name", "")}


def _budget(settings: Mapping[str, Any]) -> list[Fact]:
    split = settings.get("split", {})
    kinds = [(kind, split[kind]) for kind in ("labeled", "unlabeled", "validation", "test") if split.get(kind)]
    facts = [
        Fact(f"{kind.replace('labeled', 'labelled').capitalize()} cases", str(len(cases)), ", ".join(cases))
        for kind, cases in kinds
    ]
    return facts + ([Fact("Seed of the draw", str(settings["draw_seed"]))] if "draw_seed" in settings else [])


def _training(inputs: ReportInputs) -> list[Fact]:
    settings = (inputs.plans or {}).get("lgssl", {})
    schedule, training = settings.get("schedule", {}), settings.get("training", {})
    facts = []
    if "num_epochs" in schedule:
        steps = schedule["num_epochs"] * schedule["iterations_per_epoch"]
        length = f"{steps} iterations ({schedule['num_epochs']} epochs of {schedule['iterations_per_epoch']})"
        facts.append(Fact("Schedule", length, _pairs(schedule)))
    if settings:
        facts.append(Fact("Training seed", str(training.get("seed", 0))))
    values = hyperparameters(inputs.folds) or training.get("hyperparameters", {})
    if values:
        facts.append(Fact("Hyper-parameters", f"{len(values)} values", _pairs(values)))
    for fold in inputs.folds:
        seconds = read_training_log(fold, ()).seconds
        device = (read_json_if_valid(fold / "debug.json") or {}).get("device", "")
        where = f" on {device}" if device else ""
        if seconds:
            facts.append(Fact(f"Training time, {fold.name.replace('_', ' ')}", f"{seconds / 60:.0f} min{where}"))
    return facts


def _prediction(record: Mapping[str, Any]) -> list[Fact]:
    if not record:
        return []
    model, settings = record.get("model", {}), record.get("settings", {})
    checkpoint = " of ".join(filter(None, (model.get("checkpoint"), model.get("checkpoint_written"))))
    return [
        Fact("Checkpoint", checkpoint),
        Fact("Prediction", _pairs(settings) + (f", on {record['device']}" if record.get("device") else "")),
    ]


def _versions(record: Mapping[str, Any]) -> list[Fact]:
    here = {
        "python": platform.python_version(),
        **{name: installed_version(name) or "not installed" for name in _PACKAGES},
    }
    predicted = record.get("versions", {})
    if predicted == here:
        return [Fact("Versions", _pairs(here))]
    return [Fact("Versions, prediction", _pairs(predicted)), Fact("Versions, report", _pairs(here))]


def _commands(inputs: ReportInputs, model: Mapping[str, str], command: Sequence[str]) -> list[Fact]:
    facts = []
    number = dataset_number(inputs.dataset)
    if number is not None and all(model.get(name) for name in _NAMES_IN_FOLDER):
        planned = (inputs.plans or {}).get("lgssl", {}).get("training", {}).get("planned_as")
        folds = [fold.name.removeprefix("fold_") for fold in inputs.folds] or ["all"]
        where = f"-p {model['plans']}"
        training = f"lgssl_train {number} {model['configuration']} {model['trainer']} {where} -f {folds[0]}"
        origin = f"The plans are {planned} with the options that the name tells." if planned else ""
        facts.append(Fact("Training command", training, origin))
        predicting = f"lgssl_predict -d {number} -tr {model['trainer']} {where} -c {model['configuration']}"
        facts.append(Fact("Prediction command", f"{predicting} -f {' '.join(folds)} -i IMAGES -o SEGMENTATIONS"))
    return [*facts, Fact("Command of this report", shlex.join(command))]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
