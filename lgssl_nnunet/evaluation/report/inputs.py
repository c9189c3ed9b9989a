"""What a report is about: the files of each case, found from one folder, and the records that lie beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.evaluation.part import cases_of_group
from lgssl_nnunet.files import read_json, read_json_if_valid
from lgssl_nnunet.paths import data_folders, dataset_number

PREDICTION_RECORD = "lgssl_prediction.json"
SELECTION_MAPS = "selection_maps"
_NEEDED_IN_DATASET = ("labels", "file_ending")


@dataclass(frozen=True)
class ReportCase:
    """One case and its files; what is missing is None or empty.

    Attributes:
        name: case id.
        prediction: its predicted segmentation.
        reference: its reference segmentation.
        image: the first channel of its image.
        selection_maps: maps of what the network attended to, by name.
    """

    name: str
    prediction: Path
    reference: Path | None = None
    image: Path | None = None
    selection_maps: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportInputs:
    """Everything that a report is made from.

    Attributes:
        source: the folder that the user named.
        is_model: whether `source` is a model folder.
        model: the model folder, if there is one on this machine.
        dataset: name of the dataset, "" if unknown.
        dataset_json: description of the dataset.
        plans: the plans, None without them.
        prediction_record: what lgssl_predict wrote beside the segmentations, {} without it.
        reference_folder: folder of the references, None without any.
        cases: the cases that have a prediction.
        without_prediction: cases that have a reference only.
        group: the group of dataset.json that the cases belong to; None for all cases.
    """

    source: Path
    is_model: bool
    model: Path | None
    dataset: str
    dataset_json: dict[str, Any]
    plans: dict[str, Any] | None
    prediction_record: dict[str, Any]
    reference_folder: Path | None
    cases: tuple[ReportCase, ...]
    without_prediction: tuple[str, ...]
    group: str | None

    @property
    def folds(self) -> tuple[Path, ...]:
        """The fold folders of the model that the report is about."""
        if self.model is None:
            return ()
        used = self.prediction_record.get("model", {}).get("folds")
        folders = [self.model / f"fold_{fold}" for fold in used] if used else sorted(self.model.glob("fold_*"))
        return tuple(folder for folder in folders if folder.is_dir())

    @property
    def damaged(self) -> tuple[Path, ...]:
        """The records and checkpoints that are there but cannot be read; a checkpoint must be a whole zip archive."""
        records = [self.source / PREDICTION_RECORD, *(fold / "debug.json" for fold in self.folds)]
        checkpoints = [file for fold in self.folds for file in sorted(fold.glob("*.pth"))]
        return (
            *(file for file in records if file.is_file() and read_json_if_valid(file) is None),
            *(file for file in checkpoints if not is_zipfile(file)),
        )

    @property
    def written_classes(self) -> list[str] | None:
        """The classes that the predictions hold, None for all."""
        return self.prediction_record.get("settings", {}).get("classes")

    @property
    def measured(self) -> tuple[ReportCase, ...]:
        """The cases that have a reference."""
        return tuple(case for case in self.cases if case.reference)


def find_inputs(
    source: Path,
    *,
    reference: Path | None = None,
    images: Path | None = None,
    model_folder: Path | None = None,
    dataset_json: Path | None = None,
    group: str | None = None,
) -> ReportInputs:
    """Find the files of a report from a model folder or a folder of predictions.

    Without `reference` and `images` those folders of the dataset in nnUNet_raw are taken that hold most of the cases.

    Raises:
        DatasetError: a folder is missing, or nothing in it can be reported.
        UsageError: a model folder is given twice, or dataset.json has no such group.
    """
    _require_folders(source, reference, images, model_folder)
    is_model = any(folder.is_dir() for folder in source.glob("fold_*"))
    if is_model and model_folder is not None:
        raise UsageError(f"-m names the model of predictions, but {source} is a model itself; leave out -m.")
    prediction_record = {} if is_model else read_json_if_valid(source / PREDICTION_RECORD) or {}
    model = source if is_model else _model_of(source, model_folder, prediction_record)
    description = _description(dataset_json, source, model)
    plans = _first_json("plans.json", source, model)
    dataset = _dataset_name(plans, prediction_record, model, reference, images)
    ending = description["file_ending"]
    belongs = cases_of_group(description, group)
    predictions = {name: file for name, file in _predictions(source, is_model, ending).items() if belongs(name)}
    if group is not None and not predictions:
        raise DatasetError(f"{source} holds no prediction of a case of group {group}; predict them, or name another.")
    reference_folder = reference or _best(_reference_folders(dataset, is_model), predictions, ending)
    image_folder = images or _best(_image_folders(dataset, source), predictions, f"_0000{ending}")
    references = {name: file for name, file in _files(reference_folder, ending).items() if belongs(name)}
    _require_matches("-ref", reference, predictions, references)
    found_images = _files(image_folder, f"_0000{ending}")
    _require_matches("-i", images, predictions, found_images)
    cases = [
        ReportCase(name, file, references.get(name), found_images.get(name), _selection_maps(file.parent, name, ending))
        for name, file in predictions.items()
    ]
    return ReportInputs(
        source=source,
        is_model=is_model,
        model=model,
        dataset=dataset,
        dataset_json=description,
        plans=plans,
        prediction_record=prediction_record,
        reference_folder=reference_folder,
        cases=tuple(cases),
        without_prediction=() if is_model else tuple(name for name in references if name not in predictions),
        group=group,
    )


def _require_folders(source: Path, *others: Path | None) -> None:
    for folder in (source, *others):
        if folder is not None and not folder.is_dir():
            what = "is a file" if folder.is_file() else "does not exist"
            raise DatasetError(
                f"{folder} {what}; give a folder: of a model (with fold_*), of predictions, or of images."
            )
    if source.name.startswith("fold_"):
        raise DatasetError(f"{source} is one fold; give its model folder {source.parent}.")


def _require_matches(flag: str, named: Path | None, predictions: dict[str, Path], found: dict[str, Path]) -> None:
    """Refuse a folder that the user named and that fits no case."""
    if named is not None and predictions and not predictions.keys() & found.keys():
        raise DatasetError(
            f"{flag} {named} holds no file of the {len(predictions)} predicted cases ({min(predictions)}, ...); "
            "give the folder whose file names carry the same case names."
        )


def _model_of(source: Path, named: Path | None, prediction_record: dict[str, Any]) -> Path | None:
    """Return the model of a prediction: named, recorded by lgssl_predict, or the one whose validation folder it is."""
    if named is not None:
        return named
    recorded = prediction_record.get("model", {}).get("folder")
    candidates = [Path(recorded)] if recorded else []
    if source.name == "validation" and source.parent.name.startswith("fold_"):
        candidates.append(source.parent.parent)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _description(named: Path | None, *folders: Path | None) -> dict[str, Any]:
    description = read_json(named) if named else _first_json("dataset.json", *folders)
    if description is None:
        raise DatasetError(
            f"{folders[0]} holds no dataset.json, as models and predictions do; give such a folder, or with "
            "predictions from elsewhere name the dataset.json that says what the labels mean with -djfile."
        )
    missing = [key for key in _NEEDED_IN_DATASET if key not in description]
    if missing:
        raise DatasetError(f"dataset.json lacks {' and '.join(missing)}; name the one of the raw dataset with -djfile.")
    return description


def _first_json(name: str, *folders: Path | None) -> dict[str, Any] | None:
    file = next((folder / name for folder in folders if folder and (folder / name).is_file()), None)
    return read_json(file) if file else None


def _dataset_name(plans: dict[str, Any] | None, prediction_record: dict[str, Any], *folders: Path | None) -> str:
    """Return the dataset that plans or prediction name, else the one that a folder lies in, else ""."""
    recorded = (plans or {}).get("dataset_name") or prediction_record.get("model", {}).get("dataset")
    parents = [folder.resolve().parent.name for folder in folders if folder]
    return recorded or next((name for name in parents if dataset_number(name) is not None), "")


def _predictions(source: Path, is_model: bool, ending: str) -> dict[str, Path]:
    """Return the segmentations by case: those of a folder, or what the folds of a model wrote when validating."""
    if is_model:
        folders = sorted(source.glob("fold_*/validation"))
        return dict(sorted((name, file) for folder in folders for name, file in _files(folder, ending).items()))
    found = _files(source, ending)
    if not found:
        raise DatasetError(
            f"{source} is neither a model folder (no fold_*) nor a folder of predictions (no file ends in {ending}); "
            "give one of the two."
        )
    return found


def _reference_folders(dataset: str, is_model: bool) -> list[Path]:
    folders = data_folders()
    raw = folders["nnUNet_raw"].path / dataset
    prepared = folders["nnUNet_preprocessed"].path / dataset / "gt_segmentations"
    return [prepared, raw / "labelsTr", raw / "labelsTs"] if is_model else [raw / "labelsTs", raw / "labelsTr"]


def _image_folders(dataset: str, source: Path) -> list[Path]:
    """Return where the images may lie: where prediction read them, else in the raw dataset."""
    raw = data_folders()["nnUNet_raw"].path / dataset
    arguments = read_json_if_valid(source / "predict_from_raw_data_args.json") or {}
    read = arguments.get("list_of_lists_or_source_folder") or []
    read_from = [Path(read)] if isinstance(read, str) else [Path(files[0]).parent for files in read[:1] if files]
    return [*read_from, raw / "imagesTs", raw / "imagesTr", raw / "imagesUn"]


def _best(folders: Sequence[Path], predictions: dict[str, Path], ending: str) -> Path | None:
    """Return the folder with files of most of the predicted cases, the first of equals, None if there is none."""
    matches = {folder: len(_files(folder, ending).keys() & predictions.keys()) for folder in folders}
    best = max(matches, key=matches.__getitem__, default=None)
    return best if best is not None and matches[best] else None


def _files(folder: Path | None, ending: str) -> dict[str, Path]:
    """Return the files with an ending by what comes before it, in alphabetical order."""
    if folder is None or not folder.is_dir():
        return {}
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(ending))
    return {file.name.removesuffix(ending): file for file in files if not file.name.startswith(".")}


def _selection_maps(folder: Path, case: str, ending: str) -> dict[str, Path]:
    """Return selection_maps/CASE.nii.gz and selection_maps/CASE__NAME.nii.gz by name, {} without them."""
    found = _files(folder / SELECTION_MAPS, ending)
    return {
        name.removeprefix(case).removeprefix("__") or "selection map": file
        for name, file in found.items()
        if name == case or name.startswith(f"{case}__")
    }
