"""Pseudo-labels on disk: which finished model writes them, and one label map per preprocessed unlabelled image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from tqdm import tqdm

from lgssl_nnunet.data.unlabeled import UnlabeledDataset, mark_outside
from lgssl_nnunet.errors import CheckpointError
from lgssl_nnunet.files import content_hash, read_json_if_valid, sha256, write_atomically, write_json
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT, TrainedModel, find_models, read_model_json
from lgssl_nnunet.inference.predictor import LGSSLPredictor, LogitsError
from lgssl_nnunet.plans.stored import planned_as, training_iterations, training_seed

logger = logging.getLogger(__name__)

SOURCE_RECORD = "source.json"


def models_of_same_data(
    dataset_results: Path,
    trainer: str,
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    accepts: Callable[[Mapping[str, Any]], bool] = lambda plans: True,
) -> list[TrainedModel]:
    """Return the finished models of a trainer that learnt from the same cases, preprocessed alike.

    The longest trained comes first, of equally long ones the newest.

    Args:
        dataset_results: the dataset's folder in `nnUNet_results`.
        trainer: class name.
        plans: plans of the run that asks; a model must have been planned as the same, with the same training seed. Its
            schedule and its options may differ.
        configuration: for example 3d_fullres.
        fold: the fold that must be finished, so that validation cases stay unseen.
        accepts: whether a model of these plans will do.
    """
    wanted = _data_of(plans)
    found = []
    for model in find_models(dataset_results.parent):
        asked = (dataset_results.name, trainer, configuration)
        if (model.dataset, model.trainer, model.configuration) == asked and str(fold) in model.finished_folds:
            theirs = read_model_json(model.folder, "plans.json")
            if _data_of(theirs) == wanted and accepts(theirs):
                written = model.checkpoint_file(str(fold)).stat().st_mtime_ns
                found.append((training_iterations(theirs), written, model))
    return [model for *_, model in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def _data_of(plans: Mapping[str, Any]) -> str:
    """Return a hash of everything in plans but name, schedule, options and text."""
    planned = {name: plans[name] for name in plans if name not in ("plans_name", "continue_training", "lgssl")}
    settings = {name: plans["lgssl"].get(name) for name in ("split", "twins")}
    return content_hash([planned, settings, planned_as(plans), training_seed(plans)])


def settle_source(folder: Path, models: Sequence[TrainedModel], fold: int | str) -> TrainedModel:
    """Return the model that writes the pseudo-labels of a folder: the recorded one, else the first, which is recorded.

    Args:
        folder: where the pseudo-labels lie or will lie.
        models: the finished models that come into question, one at least if there is no record.
        fold: the fold of the model.

    Raises:
        CheckpointError: the recorded model is not among them or was trained anew.
    """
    record = read_json_if_valid(folder / SOURCE_RECORD)
    if record is None:
        model = models[0]
        if len(models) > 1:
            logger.info(
                "Of %d finished models that fit, %s is the longest trained and newest and labels.",
                len(models),
                model.folder,
            )
        write_json({"model": model.folder.name, "fold": str(fold), **_signature(model, fold)}, folder / SOURCE_RECORD)
        return model
    model = next((model for model in models if model.folder.name == record["model"]), None)
    if model is None or not _signature(model, fold).items() <= record.items():
        raise CheckpointError(
            f"The pseudo-labels in {folder} are those of {record['model']}, which is no longer there as it was: put it "
            f"back to go on, or move {folder.parent} away to begin with another model."
        )
    return model


def _signature(model: TrainedModel, fold: int | str) -> dict[str, str]:
    return {"checkpoint": FINAL_CHECKPOINT, "sha256": sha256(model.checkpoint_file(str(fold)))}


def write_pseudo_labels(
    model: TrainedModel,
    fold: int | str,
    images: UnlabeledDataset,
    folder: Path,
    device: torch.device,
    hide_progress: bool | None = None,
) -> None:
    """Predict preprocessed images by sliding window and write a label map for each; what is there already stays.

    A case is two files, which `PseudoLabeledDataset` reads: `<case>.pkl` with the places of the classes, then
    `<case>.b2nd` with the label map (1, X, Y, Z), each whole or not at all. Overlapping regions are written as the
    label map that nnU-Net makes of them.

    Args:
        model: the model that predicts, mirroring as its checkpoint allows.
        fold: its fold.
        images: the preprocessed cases.
        folder: where the files go.
        device: where the network runs.
        hide_progress: tqdm's `disable`.

    Raises:
        LogitsError: the network gives no numbers for a case.
    """
    missing = [case for case in images.identifiers if not (folder / f"{case}.b2nd").is_file()]
    if not missing:
        return
    predictor = LGSSLPredictor(device, progress=False)
    predictor.load_model(model.folder, [fold])
    total = len(images.identifiers)
    with tqdm(
        desc="Pseudo-labels", unit="case", total=total, initial=total - len(missing), disable=hide_progress
    ) as progress:
        for case in missing:
            try:
                labels = _label_map(predictor, images.load_case(case)[0][:])
            except LogitsError:
                raise LogitsError(
                    f"{case}: {model.folder} gives NaN or infinity, of which no pseudo-labels can be made; look for "
                    "extreme values in the image, or train with another source."
                ) from None
            _write_case(folder, case, labels, predictor)
            progress.update()


def _label_map(predictor: LGSSLPredictor, image: np.ndarray) -> np.ndarray:
    """Return the label map (1, X, Y, Z) of a preprocessed image (M, X, Y, Z), -1 in the background around the body."""
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    labels = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits))
    labels = labels.astype(np.int8 if labels.max() < 128 else np.int16)
    mark_outside(labels, image[np.asarray(predictor.configuration_manager.use_mask_for_norm, dtype=bool)])
    return labels[None]


def _write_case(folder: Path, case: str, labels: np.ndarray, predictor: LGSSLPredictor) -> None:
    manager = predictor.label_manager
    classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    locations = DefaultPreprocessor._sample_foreground_locations(labels, classes)
    write_atomically(folder / f"{case}.pkl", lambda file: write_pickle({"class_locations": locations}, str(file)))
    patch_size = tuple(predictor.configuration_manager.patch_size)
    blocks, chunks = comp_blosc2_params(labels.shape, patch_size, labels.itemsize)
    write_atomically(
        folder / f"{case}.b2nd", lambda file: blosc2.asarray(labels, urlpath=str(file), chunks=chunks, blocks=blocks)
    )
