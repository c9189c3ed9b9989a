"""Which classes a plans file may name: nnU-Net looks up, and calls, whatever stands there."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from lgssl_nnunet.errors import CheckpointError

_NETWORKS = ("torch.nn.", "dynamic_network_architectures.")
_RESAMPLING = "nnunetv2.preprocessing.resampling."


def known_reader(plans_manager: PlansManager, file: Path) -> type[BaseReaderWriter]:
    """Return the reader of images that the plans name.

    Args:
        plans_manager: the plans.
        file: where they come from, for the message.

    Raises:
        CheckpointError: what they name is no reader of nnU-Net.
    """
    name = plans_manager.plans["image_reader_writer"]
    _refuse(file, "reads images with", [] if _is_a(_of_nnunet("imageio", name), BaseReaderWriter) else [name])
    return plans_manager.image_reader_writer_class


def require_known_classes(plans_manager: PlansManager, configuration_manager: ConfigurationManager, file: Path) -> None:
    """Refuse plans that name anything but networks, layers, and nnU-Net's own readers and steps of preprocessing.

    A name is judged by what it leads to, not by how it begins: torch.nn.functional.torch is all of torch.

    Raises:
        CheckpointError: with the names.
    """
    _refuse(file, "builds its network from", list(_foreign_layers(configuration_manager)))
    _refuse(file, "prepares images with", list(_foreign_steps(plans_manager, configuration_manager.configuration)))
    known_reader(plans_manager, file)


def _refuse(file: Path, what: str, names: list[Any]) -> None:
    if names:
        shown = ", ".join(str(name)[:100] for name in names)
        raise CheckpointError(
            f"{file} {what} {shown}, which is no class of torch.nn, dynamic_network_architectures or nnU-Net for that "
            "purpose: ask for a model that was planned by nnU-Net or lgssl_plan_and_preprocess."
        )


def _foreign_layers(configuration_manager: ConfigurationManager) -> Iterator[str]:
    """Yield the names, to be imported, of what is no module of a network."""
    options = configuration_manager.network_arch_init_kwargs
    layers = [options[key] for key in configuration_manager.network_arch_init_kwargs_req_import if options.get(key)]
    for name in map(str, (configuration_manager.network_arch_class_name, *layers)):
        if not name.startswith(_NETWORKS):
            yield name
            continue
        found = pydoc.locate(name)
        # For a class that is not there nnU-Net looks in dynamic_network_architectures itself.
        if found is not None and not (_is_a(found, nn.Module) and found.__module__.startswith(_NETWORKS)):
            yield name


def _foreign_steps(plans_manager: PlansManager, configuration: dict[str, Any]) -> Iterator[str]:
    labels = plans_manager.plans.get("label_manager", LabelManager.__name__)
    wanted: list[tuple[str, str, type]] = [
        (labels, "utilities/label_handling", LabelManager),
        (configuration["preprocessor_name"], "preprocessing", DefaultPreprocessor),
        *((name, "preprocessing/normalization", ImageNormalization) for name in configuration["normalization_schemes"]),
    ]
    yield from (name for name, folder, kind in wanted if not _is_a(_of_nnunet(folder, name), kind))
    for kind in ("data", "seg", "probabilities"):
        name = configuration[f"resampling_fn_{kind}"]
        if not _is_resampling(recursive_find_resampling_fn_by_name(name)):
            yield name


def _of_nnunet(folder: str, name: str) -> Any:
    """Return what nnU-Net finds under a name in the modules of one of its folders."""
    import nnunetv2

    return recursive_find_python_class(
        str(Path(nnunetv2.__path__[0]) / folder), name, f"nnunetv2.{folder.replace('/', '.')}"
    )


def _is_a(found: Any, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)


def _is_resampling(found: Callable) -> bool:
    return inspect.isfunction(found) and found.__module__.startswith(_RESAMPLING)
