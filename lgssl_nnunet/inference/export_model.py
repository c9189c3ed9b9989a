"""Put a trained model into one file to hand on: the function behind `lgssl_export_model`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.files import write_atomically
from lgssl_nnunet.inference.bundle_weights import pack_weights
from lgssl_nnunet.inference.bundles import BundledWeights, BundleWriter, open_bundle, weights_member
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT, BundledModel, ChosenModel, select_model
from lgssl_nnunet.inference.shareable import shareable_dataset_json, shareable_plans
from lgssl_nnunet.inference.stock_model import write_stock_zip
from lgssl_nnunet.inference.stored_model import StoredModel, read_stored_model

logger = logging.getLogger(__name__)

_VERSIONS = ("lgssl_nnunet", "nnunetv2", "torch", "safetensors")


def export_model(
    output: str | Path,
    *,
    dataset: int | str | None = None,
    configuration: str | None = None,
    folds: Sequence[int | str] | None = None,
    plans: str | None = None,
    trainer: str | None = None,
    checkpoints: Sequence[str] = (FINAL_CHECKPOINT,),
    model_folder: str | Path | None = None,
    stock: bool = False,
    overwrite: bool = False,
    trust_checkpoint: bool = False,
) -> Path:
    """Write a model into one file: a bundle for lgssl_predict, or a zip file for nnU-Net itself.

    Neither holds names of cases, logs, states of the optimiser or paths. The model is chosen as `predict` chooses it.

    Args:
        output: the file.
        dataset: id or name; needed only if models of several datasets are there.
        configuration: for example 3d_fullres.
        folds: the folds that go along; by default all finished ones, or `all` alone where it is there.
        plans: plans identifier.
        trainer: trainer class name.
        checkpoints: file names of the checkpoints that go along.
        model_folder: use this model folder or bundle instead of looking in nnUNet_results.
        stock: write what nnUNetv2_install_pretrained_model_from_zip installs and nnU-Net predicts with, without this
            package; only for methods whose network is the plans' network alone.
        overwrite: replace `output`.
        trust_checkpoint: read a checkpoint that holds more than tensors and numbers, and run what it asks for.

    Returns:
        The file.

    Raises:
        UsageError: arguments that do not fit, an output that would be lost, or a method that `stock` cannot serve.
        CheckpointError: no finished model, a damaged one, or folds that do not belong together.
    """
    output = Path(output).expanduser()
    _check_output(output, overwrite)
    chosen = select_model(model_folder, dataset, trainer, plans, configuration, folds, checkpoints[0])
    logger.info("Model: %s", chosen)
    _require_checkpoints(chosen, checkpoints)
    if stock:
        parts = _parts(chosen, checkpoints, trust_checkpoint)
        write_atomically(output, lambda temporary: write_stock_zip(temporary, parts))
    else:
        write_atomically(output, lambda temporary: _write_bundle(temporary, chosen, checkpoints, trust_checkpoint))
    logger.info("%s has %.1f MB", output, output.stat().st_size / 1e6)
    return output


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise UsageError(f"-o {output} is a folder; give the file that the model goes into.")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} is there already; replace it with --overwrite, or give another name with -o.")


def _require_checkpoints(chosen: ChosenModel, checkpoints: Sequence[str]) -> None:
    for checkpoint in checkpoints:
        missing = [fold for fold in chosen.folds if fold not in chosen.model.folds_with(checkpoint)]
        if missing:
            raise CheckpointError(
                f"{chosen.folder} has no {checkpoint} of fold {' '.join(missing)}; leave it out of -chk, or name folds "
                "that have it with -f."
            )


def _parts(chosen: ChosenModel, checkpoints: Sequence[str], trust: bool) -> Iterator[tuple[str, str, StoredModel]]:
    """Yield fold, checkpoint and what they hold, one at a time, after they were found to be one model."""
    first = None
    for checkpoint in dict.fromkeys(checkpoints):
        for fold in chosen.folds:
            stored = read_stored_model(chosen.folder, [fold], checkpoint, trust)
            identity = stored.trainer, stored.configuration, tuple(stored.mirroring_axes or ())
            first = first or identity
            if identity != first:
                raise CheckpointError(
                    f"The folds of {chosen.folder} differ in trainer, configuration or mirroring ({checkpoint} of fold "
                    f"{fold} does), so they are not one model: choose folds with -f."
                )
            yield fold, checkpoint, stored


def _write_bundle(file: Path, chosen: ChosenModel, checkpoints: Sequence[str], trust: bool) -> None:
    written: list[BundledWeights] = []
    with BundleWriter(file) as bundle:
        for fold, checkpoint, stored in _parts(chosen, checkpoints, trust):
            if not written:
                bundle.add_json("plans.json", shareable_plans(stored.plans_manager.plans))
                bundle.add_json("dataset.json", shareable_dataset_json(stored.dataset_json))
            stored.network_with_weights()  # what does not predict here would not predict there
            ((origin, weights),) = stored.weights.items()
            bundle.add(weights_member(fold, checkpoint), pack_weights(weights, origin))
            written.append(BundledWeights(fold, checkpoint, _written(chosen, fold, checkpoint)))
            logger.info("Fold %s, %s: %d weights", fold, checkpoint, len(weights))
        model = {
            "dataset": stored.plans_manager.dataset_name,
            "trainer": stored.trainer,
            "plans": stored.plans_manager.plans_name,
            "configuration": stored.configuration,
        }
        versions = {name: version(name) for name in _VERSIONS}
        bundle.finish(model, tuple(stored.mirroring_axes or ()) or None, written, versions)
    open_bundle(file)


def _written(chosen: ChosenModel, fold: str, checkpoint: str) -> datetime:
    """Return when a checkpoint was written, to the second."""
    if isinstance(chosen.model, BundledModel):
        parts = chosen.model.bundle.weights
        return next(part.written for part in parts if (part.fold, part.checkpoint) == (fold, checkpoint))
    seconds = int(chosen.model.checkpoint_file(fold, checkpoint).stat().st_mtime)
    return datetime.fromtimestamp(seconds, tz=timezone.utc)
