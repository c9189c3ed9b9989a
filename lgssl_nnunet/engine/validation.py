"""Validation during and after training where cases annotate only some of the classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import load_summary_json, save_summary_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from lgssl_nnunet.engine.labels import annotated, one_hot
from lgssl_nnunet.files import write_atomically


def hard_counts(predicted: Tensor, target: Tensor, known: Tensor, label_manager: LabelManager) -> dict[str, np.ndarray]:
    """Return the voxels behind nnU-Net's pseudo Dice, in which a patch counts for the classes that it annotates.

    Args:
        predicted: (B, C, *S) in 0 and 1.
        target: see `lgssl_nnunet.engine.labels.one_hot`.
        known: (B, C), whether the patch's case annotates a channel.
        label_manager: of the plans.

    Returns:
        `tp_hard`, `fp_hard` and `fn_hard`, a number per foreground channel.
    """
    truth, counted = one_hot(target, label_manager), annotated(target, label_manager)
    first = 0 if label_manager.has_regions else 1
    found = {
        "tp_hard": predicted * truth,
        "fp_hard": predicted * (1 - truth),
        "fn_hard": (1 - predicted) * truth,
    }
    return {
        name: ((voxels * counted).flatten(2).sum(dim=2) * known).sum(dim=0)[first:].cpu().numpy()
        for name, voxels in found.items()
    }


def leave_out_of_summary(
    file: Path, file_ending: str, hides: Mapping[str, Callable[[Any], bool]]
) -> tuple[dict[Any, float], float]:
    """Take the classes that a case does not annotate out of nnU-Net's summary.json.

    Args:
        file: the summary; nan stands for what is taken out, as nnU-Net writes what it cannot measure.
        file_ending: of segmentations.
        hides: by case, whether it leaves a label or region unannotated; other cases annotate all.

    Returns:
        Mean Dice of each class, and over the classes.
    """
    summary = load_summary_json(str(file))
    cases = [entry["metrics"] for entry in summary["metric_per_case"]]
    for entry, metrics in zip(summary["metric_per_case"], cases, strict=True):
        hidden = hides.get(Path(entry["prediction_file"]).name.removesuffix(file_ending), lambda key: False)
        metrics.update({key: dict.fromkeys(values, np.nan) for key, values in metrics.items() if hidden(key)})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # nan says that no case has the class
        summary["mean"] = {
            key: {name: float(np.nanmean([metrics[key][name] for metrics in cases])) for name in values}
            for key, values in summary["mean"].items()
        }
    # nnU-Net counts voxels in every case, so a class without a count is annotated in none.
    means = [mean for mean in summary["mean"].values() if not np.isnan(mean["TP"])]
    summary["foreground_mean"] = {name: float(np.mean([mean[name] for mean in means])) for name in means[0]}
    write_atomically(file, lambda temporary: save_summary_json(summary, str(temporary)))
    return {key: mean["Dice"] for key, mean in summary["mean"].items()}, summary["foreground_mean"]["Dice"]
