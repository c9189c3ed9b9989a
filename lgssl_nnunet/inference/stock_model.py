"""A zip file that nnU-Net itself installs and predicts with, for models whose network is the plans' network alone."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.files import read_json_if_valid
from lgssl_nnunet.inference.bundles import json_bytes, plain_entry
from lgssl_nnunet.inference.shareable import shareable_dataset_json, shareable_fingerprint
from lgssl_nnunet.inference.stored_model import StoredModel

logger = logging.getLogger(__name__)

STOCK_TRAINER = "nnUNetTrainer"
_FINGERPRINT = "dataset_fingerprint.json"


def write_stock_zip(file: Path, parts: Iterable[tuple[str, str, StoredModel]]) -> None:
    """Write folds of a model in nnU-Net's layout, as a model of nnUNetTrainer.

    The name of the plans is extended by that of the trainer, so that two methods on the same plans are installed side
    by side.

    Args:
        file: where the zip file goes.
        parts: fold, checkpoint and what was read of them, one at a time.

    Raises:
        UsageError: the method's network is more than the plans' network.
        CheckpointError: a name in the plans is no name of a folder.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (fold, checkpoint, stored) in enumerate(parts):
            plans = _stock_plans(stored)
            folder = _folder(plans, stored)
            if number == 0:
                for name, content in _descriptions(plans, stored).items():
                    archive.writestr(plain_entry(f"{folder}/{name}"), json_bytes(content), zipfile.ZIP_DEFLATED)
            archive.writestr(plain_entry(f"{folder}/fold_{fold}/{checkpoint}"), _stock_checkpoint(stored))
            logger.info("Fold %s, %s: nnU-Net's own network gives the same, and goes along", fold, checkpoint)


def _stock_plans(stored: StoredModel) -> dict[str, Any]:
    plans = {name: value for name, value in stored.plans_manager.plans.items() if name != "lgssl"}
    if stored.trainer != STOCK_TRAINER:
        plans["plans_name"] = f"{plans['plans_name']}_{stored.trainer}"
    return plans


def _folder(plans: Mapping[str, Any], stored: StoredModel) -> str:
    folders = plans["dataset_name"], f"{STOCK_TRAINER}__{plans['plans_name']}__{stored.configuration}"
    for name in folders:
        # Of the two kinds of paths, Windows' knows every separator.
        if not isinstance(name, str) or PureWindowsPath(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"The plans of {stored.place} name {name!r}, which is no name of a folder.")
    return "/".join(folders)


def _descriptions(plans: Mapping[str, Any], stored: StoredModel) -> dict[str, Mapping[str, Any]]:
    found = {"plans.json": plans, "dataset.json": shareable_dataset_json(stored.dataset_json)}
    fingerprint = read_json_if_valid(stored.place / _FINGERPRINT)
    return found if fingerprint is None else {**found, _FINGERPRINT: shareable_fingerprint(fingerprint)}


def _stock_checkpoint(stored: StoredModel) -> bytes:
    (weights,) = stored.weights.values()
    checkpoint = {
        "trainer_name": STOCK_TRAINER,
        "init_args": {"configuration": stored.configuration},
        "inference_allowed_mirroring_axes": stored.mirroring_axes or None,
        "network_weights": _plain_weights(stored, weights),
    }
    content = io.BytesIO()
    torch.save(checkpoint, content)
    return content.getvalue()


def _plain_weights(stored: StoredModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of nnU-Net's own network, if it predicts with them what the method's network predicts."""
    plain = stored.build_network(STOCK_TRAINER)
    kept = {name: weights[name] for name in plain.state_dict() if name in weights}
    try:
        plain.load_state_dict(kept)
    except RuntimeError as error:
        raise _refusal(stored) from error
    if not _predict_the_same(stored.network_with_weights(), plain, stored):
        raise _refusal(stored)
    return kept


def _predict_the_same(one: nn.Module, other: nn.Module, stored: StoredModel) -> bool:
    """Return whether two networks agree to the bit on a patch of noise."""
    shape = (1, stored.num_channels, *stored.configuration_manager.patch_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.equal(one.eval()(noise), other.eval()(noise))


def _refusal(stored: StoredModel) -> UsageError:
    return UsageError(
        f"--stock: {stored.trainer} predicts with more than the network that nnU-Net builds from the plans, so nnU-Net "
        "alone cannot run it: leave --stock out and predict from the bundle with lgssl_predict, or give nnU-Net the "
        "trainers of this package (nnUNet_extTrainer, see lgssl_info)."
    )
