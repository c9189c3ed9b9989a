"""A made-up model and its predictions for the tests of the report: three small cases, written in a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

DATASET = "Dataset903_Blocks"
MODEL = "LGSSLTrainer__LGSSLPlans_labeled2__3d_fullres"
LABELS = {"background": 0, "liver": 1, "tumour": 2}
SHAPE = (10, 14, 12)
SPACING = (2.0, 1.0, 1.0)  # along the axes of the array


def save(file: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING, direction=None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


def block(label: int, *box: slice) -> np.ndarray:
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[box] = label
    return array


def write_report_data(root: Path, ending: str = ".nii.gz") -> dict[str, Path]:
    """Write a dataset, a model with curves, and predictions of three cases: a is right, b half right, c empty."""
    raw, model = root / "nnUNet_raw" / DATASET, root / "nnUNet_results" / DATASET / MODEL
    predictions = root / "predictions"
    liver = block(1, slice(2, 8), slice(3, 11), slice(3, 9))
    predicted = {"a": liver, "b": block(1, slice(2, 8), slice(3, 7), slice(3, 9)), "c": np.zeros_like(liver)}
    noise = np.random.default_rng(0)
    for case, array in predicted.items():
        save(raw / "imagesTs" / f"{case}_0000{ending}", (noise.random(SHAPE) * 50 + 100 * liver).astype(np.float32))
        save(raw / "labelsTs" / f"{case}{ending}", liver)
        save(predictions / f"{case}{ending}", array)
    description = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ending}
    split = {"labeled": ["t1", "t2"], "unlabeled": ["u1", "u2", "u3"], "validation": [], "test": ["a", "b", "c"]}
    schedule = {"num_epochs": 3, "iterations_per_epoch": 5, "initial_lr": 0.01}
    settings = {"split": split, "draw_seed": 0, "schedule": schedule}
    plans = {"dataset_name": DATASET, "plans_name": "LGSSLPlans_labeled2", "lgssl": settings}
    for folder in (raw, model, predictions):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(description))
    (model / "plans.json").write_text(json.dumps(plans))
    _write_fold(model / "fold_all")
    made_by = dict(zip(("trainer", "plans", "configuration"), MODEL.split("__"), strict=True))
    made_by |= {"folder": str(model), "dataset": DATASET, "folds": ["all"], "checkpoint": "checkpoint_final.pth"}
    record = {"model": made_by, "settings": {"precision": "stock"}, "device": "cpu", "versions": {"python": "3.0"}}
    (predictions / "lgssl_prediction.json").write_text(json.dumps(record))
    return {"raw": raw, "model": model, "predictions": predictions}


def _write_fold(fold: Path) -> None:
    fold.mkdir(parents=True)
    (fold / "lgssl_terms.csv").write_text(
        "epoch,supervised,consistency,weight of consistency\n0,0.5,0.2,0.01\n1,0.25,0.15,0.05\n2,-0.125,0.1,0.1\n"
    )
    lines = ["2030-01-01 00:00:00.000000: Hyper-parameters: LGSSLHyperparameters(dropout=0.5, modes=(1, 2))"]
    for epoch, (loss, dice) in enumerate([(0.5, 0.1), (0.2, 0.6), (-0.1, 0.8)]):
        stamp = "2030-01-01 00:00:00.000000"
        lines += [f"{stamp}: Epoch {epoch} ", f"{stamp}: Current learning rate: 0.01 ", f"{stamp}: train_loss {loss} "]
        lines += [f"{stamp}: val_loss {loss + 0.1} ", f"{stamp}: Pseudo dice [np.float32({dice}), nan] "]
        lines += [f"{stamp}: Epoch time: 30.0 s"]
    (fold / "training_log_2030_01_01.txt").write_text("\n".join(lines))
