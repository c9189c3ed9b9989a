"""A trained model as it is stored, in a model folder or a bundle, and the network that is built from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from lgssl_nnunet.dataset_conversion.geometry import are_spatial_axes
from lgssl_nnunet.engine.checkpoints import read_checkpoint
from lgssl_nnunet.errors import CheckpointError, LGSSLError, UsageError
from lgssl_nnunet.inference.bundle_weights import unpack_weights
from lgssl_nnunet.inference.bundles import open_bundle, weights_member
from lgssl_nnunet.inference.cases import ImageRules
from lgssl_nnunet.inference.known_classes import known_reader, require_known_classes
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT, read_model_json
from lgssl_nnunet.plans.sidedness import LeftRight
from lgssl_nnunet.registry import find_trainer

_NEEDED = ("trainer_name", "init_args", "network_weights")


@dataclass(frozen=True)
class StoredModel:
    """What a model folder or a bundle says, after its plans have been found to name known classes only.

    Attributes:
        place: the folder or the bundle.
        plans_manager: the plans.
        configuration_manager: the trained configuration.
        configuration: its name.
        dataset_json: labels and channels.
        trainer: class name.
        mirroring_axes: of the first fold.
        weights: of each fold, in order, by where they come from.
    """

    place: Path
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    configuration: str
    dataset_json: dict[str, Any]
    trainer: str
    mirroring_axes: tuple[int, ...] | None
    weights: dict[str, dict[str, Tensor]]

    def build_network(self, trainer: str | None = None) -> nn.Module:
        """Return the network that a trainer predicts with, without the weights.

        Args:
            trainer: class name; None: the model's own.

        Raises:
            UsageError: there is no such trainer.
            CheckpointError: the plans do not make a network.
        """
        trainer_class = find_trainer(trainer or self.trainer)
        with _told_of_plans(self.place):
            return trainer_class.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                self.num_channels,
                self.plans_manager.get_label_manager(self.dataset_json).num_segmentation_heads,
                enable_deep_supervision=False,
            )

    @property
    def num_channels(self) -> int:
        """How many channels the network's input has."""
        return determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)

    def network_with_weights(self) -> nn.Module:
        """Return the network with the weights of the last fold, after those of every fold were found to fit.

        Raises:
            CheckpointError: weights do not fit, and as for `build_network`.
        """
        network = self.build_network()
        for origin, weights in self.weights.items():
            try:
                network.load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(
                    f"The weights in {origin} do not fit the network that its trainer builds from plans.json: two "
                    "models are mixed, or the versions differ from those of the training (lgssl_info shows yours). "
                    f"{error}"
                ) from error
            # Of the network, because a tensor of a file may claim any size that its memory does not have.
            broken = [name for name, tensor in network.state_dict().items() if not torch.isfinite(tensor).all()]
            if broken:
                raise CheckpointError(
                    f"The weights in {origin} are NaN or infinite in {broken[0]}, and would segment nothing: "
                    "choose another checkpoint with -chk, or get the model again from where it was trained."
                )
        return network


def read_stored_model(
    place: str | Path, folds: Sequence[int | str], checkpoint: str = FINAL_CHECKPOINT, trust: bool = False
) -> StoredModel:
    """Read folds of a model; nothing that it holds is run, unless a checkpoint is trusted.

    Args:
        place: a model folder of nnU-Net's layout, or a bundle.
        folds: the folds to read.
        checkpoint: the checkpoint's file name.
        trust: as for `read_checkpoint`.

    Raises:
        CheckpointError: a file is missing or damaged or holds more than numbers, or the plans name a class that is no
            network's.
        UsageError: the configuration is a cascade, or a bundle is to be trusted.
    """
    place = Path(place)
    return (_read_bundle if place.is_file() else _read_folder)(place, folds, checkpoint, trust)


def image_rules(plans: dict[str, Any], dataset_json: dict[str, Any], place: Path) -> ImageRules:
    """Return what a model expects of its images.

    Args:
        plans: of the model.
        dataset_json: of the model.
        place: its folder or bundle, for the message.

    Raises:
        CheckpointError: plans or dataset.json do not say it.
    """
    with _told_of_plans(place):
        channels = dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]
        names = tuple(channels[key] for key in sorted(channels, key=int))
        reader = known_reader(PlansManager(plans), place / "plans.json")
        return ImageRules(names, dataset_json["file_ending"], reader, _left_right(plans))


def _left_right(plans: dict[str, Any]) -> LeftRight | None:
    """Return how the training images lay; None if that was not planned, or training mirrored left and right."""
    block = plans.get("lgssl", {})
    lying, mirrored = block.get("left_right"), block.get("mirroring_axes")
    if lying is None or mirrored is None or plans["transpose_forward"].index(lying["axis"]) in mirrored:
        return None
    return LeftRight(**lying)


def _read_folder(folder: Path, folds: Sequence[int | str], checkpoint: str, trust: bool) -> StoredModel:
    dataset_json, plans = (read_model_json(folder, name) for name in ("dataset.json", "plans.json"))
    files = [folder / f"fold_{fold}" / checkpoint for fold in folds]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing; choose folds with -f or a checkpoint with -chk.")
    checkpoints = {str(file): read_checkpoint(file, *_NEEDED, trust=trust) for file in files}
    for file, content in checkpoints.items():
        _require_form(content, file)
    first = checkpoints[str(files[0])]
    return _stored(
        folder,
        plans,
        dataset_json,
        first["init_args"]["configuration"],
        trainer=first["trainer_name"],
        mirroring_axes=first.get("inference_allowed_mirroring_axes"),
        weights={file: content["network_weights"] for file, content in checkpoints.items()},
    )


def _require_form(checkpoint: dict[str, Any], file: str) -> None:
    """Refuse a checkpoint whose entries are not of the kind that nnU-Net writes."""
    arguments, weights = checkpoint["init_args"], checkpoint["network_weights"]
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    wrong = {
        "trainer_name": not isinstance(checkpoint["trainer_name"], str),
        "init_args": not (isinstance(arguments, dict) and isinstance(arguments.get("configuration"), str)),
        "network_weights": not (isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())),
        "inference_allowed_mirroring_axes": not (axes is None or are_spatial_axes(axes)),
    }
    if any(wrong.values()):
        names = " and ".join(name for name in wrong if wrong[name])
        raise CheckpointError(f"{file} has another {names} than nnU-Net writes; it is damaged or no checkpoint of it.")


def _read_bundle(file: Path, folds: Sequence[int | str], checkpoint: str, trust: bool) -> StoredModel:
    if trust:
        raise UsageError("--trust_checkpoint is for checkpoints; nothing in a bundle could be run, so leave it out.")
    bundle = open_bundle(file)
    members = [weights_member(str(fold), checkpoint) for fold in folds]
    missing = [member for member in members if member not in bundle.members]
    if missing:
        raise CheckpointError(f"{file} has no {missing[0]}; choose folds with -f or a checkpoint with -chk.")
    origins = {f"{file}, {member}": member for member in members}
    return _stored(
        file,
        bundle.read_json("plans.json"),
        bundle.read_json("dataset.json"),
        bundle.configuration,
        trainer=bundle.trainer,
        mirroring_axes=bundle.mirroring_axes,
        weights={origin: unpack_weights(bundle.read(member), origin) for origin, member in origins.items()},
    )


def _stored(
    place: Path, plans: dict[str, Any], dataset_json: dict[str, Any], configuration: str, **others: Any
) -> StoredModel:
    with _told_of_plans(place):
        plans_manager = PlansManager(plans)
        configuration_manager = _configuration(plans_manager, configuration, place)
        require_known_classes(plans_manager, configuration_manager, place / "plans.json")
    return StoredModel(place, plans_manager, configuration_manager, configuration, dataset_json, **others)


def _configuration(plans_manager: PlansManager, name: str, place: Path) -> ConfigurationManager:
    if name not in plans_manager.available_configurations:
        raise CheckpointError(
            f"{place / 'plans.json'} has no configuration {name!r}, which the checkpoint was trained with."
        )
    configuration = plans_manager.get_configuration(name)
    if configuration.previous_stage_name is not None:
        raise UsageError(
            f"{name} is the second stage of a cascade, which lgssl_predict does not run; predict with another "
            "configuration (-c), or with nnUNetv2_predict."
        )
    return configuration


@contextmanager
def _told_of_plans(place: Path) -> Iterator[None]:
    """Turn what nnU-Net raises on plans or labels that are not of its form into a sentence."""
    try:
        yield
    except LGSSLError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(
            f"plans.json and dataset.json of {place} do not make a model ({reason}): they are damaged, or of another "
            "version of nnU-Net; get the model again from where it was trained."
        ) from error
