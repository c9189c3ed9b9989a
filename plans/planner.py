"""Planners: nnU-Net's rules, sized for the step of LGSSLTrainer.

A step passes n labelled and n unlabelled patches through one encoder and two decoders, n being the planned batch size.
The GPU planners therefore count twice the feature maps of encoder plus two decoders against nnU-Net's reference for
`-gpu_memory_target`; everything else (spacing, topology, normalisation, 5 % rule) is nnU-Net's.

On a CPU, time and not memory limits a step. `LGSSLPlannerCPU` sizes patches by their number of voxels.

nnU-Net's planner reads and writes fixed folders and merges what it writes with what is there. It runs here in a staging
folder: the plans depend on the dataset and the budget alone, and existing files are replaced whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.files import environment, read_json, write_json
from lgssl_nnunet.plans.cases import RawDataset
from lgssl_nnunet.plans.merged_planning import fingerprint_to_plan_for
from lgssl_nnunet.plans.protocol import LITERATURE_CONFIGURATION, Protocol

logger = logging.getLogger(__name__)

STREAMS = 2
"""Labelled and unlabelled patches in one step, as many of the one as of the other."""
DECODERS = 2
"""Decoders of LGSSLTrainer's network."""

_MIN_PATCH_EDGE = 16
_UNLIMITED_POOLING = 999_999
"""As nnU-Net's planner passes it."""

GPU_SCHEDULE = {
    "optimizer": "sgd",
    "initial_lr": 1e-2,
    "weight_decay": 3e-5,
    "lr_schedule": "poly",
    "num_epochs": 1000,
    "iterations_per_epoch": 250,
    "val_iterations_per_epoch": 50,
}
"""nnU-Net's own schedule."""

CPU_SCHEDULE = {
    "optimizer": "adamw",
    "initial_lr": 2e-3,
    "weight_decay": 1e-2,
    "lr_schedule": "cosine",
    "num_epochs": 20,
    "iterations_per_epoch": 50,
    "val_iterations_per_epoch": 4,
}
"""1,000 iterations: with nnU-Net's SGD so short a run measures the optimisation, not the labels."""


class LGSSLPlanningMixin:
    """What every planner of this package changes in nnU-Net's; stands before nnU-Net's class in the bases."""

    plans_prefix: ClassVar[str] = "LGSSLPlans"
    schedule: ClassVar[dict[str, Any]] = GPU_SCHEDULE
    accepts_memory_target: ClassVar[bool] = True

    @staticmethod
    def static_estimate_VRAM_usage(  # noqa: N802 (nnU-Net's name)
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> float:
        """Count the feature map elements of one step per planned patch: two patches, one encoder, two decoders."""
        if min(patch_size) < 1:
            _refuse_memory_target("no patch fits")
        with torch.device("meta"):  # only the shapes matter: no memory is taken and no weight drawn
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        encoder = network.encoder.compute_conv_feature_map_size(patch_size)
        decoder = network.decoder.compute_conv_feature_map_size(patch_size)
        return float(STREAMS * (encoder + DECODERS * decoder))

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Return the preprocessed folder's name: never shared with nnU-Net, whose folders hold other cases."""
        return f"{self.plans_identifier}_{configuration_name}"

    def with_patch_size(self, configuration: dict[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
        """Return a copy of a 3D configuration with another patch size and nnU-Net's network for it.

        Args:
            configuration: a planned configuration.
            patch_size: exactly this patch, in the order of the preprocessed array's axes; memory is not looked at.
        """
        planned = copy.deepcopy(configuration)
        strides, kernels = _topology(planned["spacing"], patch_size, self.UNet_featuremap_min_edge_length)
        stages = len(strides)
        network = planned["architecture"]["arch_kwargs"]
        encoder_depths = "n_blocks_per_stage" if "n_blocks_per_stage" in network else "n_conv_per_stage"
        network |= {
            "n_stages": stages,
            "features_per_stage": [
                min(self.UNet_max_features_3d, self.UNet_base_num_features * 2**stage) for stage in range(stages)
            ],
            "kernel_sizes": kernels,
            "strides": strides,
            encoder_depths: list(self.UNet_blocks_per_stage_encoder[:stages]),
            "n_conv_per_stage_decoder": list(self.UNet_blocks_per_stage_decoder[: stages - 1]),
        }
        return planned | {"patch_size": [int(length) for length in patch_size]}


class LGSSLPlanner(LGSSLPlanningMixin, ExperimentPlanner):
    """nnU-Net's default planner for LGSSLTrainer's step on a GPU (8 GB unless `-gpu_memory_target` says otherwise)."""


class LGSSLPlannerResEncM(LGSSLPlanningMixin, nnUNetPlannerResEncM):
    """nnU-Net's residual encoder preset M (8 GB) for LGSSLTrainer's step."""

    plans_prefix = "LGSSLResEncMPlans"


class LGSSLPlannerResEncL(LGSSLPlanningMixin, nnUNetPlannerResEncL):
    """nnU-Net's residual encoder preset L (24 GB) for LGSSLTrainer's step."""

    plans_prefix = "LGSSLResEncLPlans"


class LGSSLPlannerResEncXL(LGSSLPlanningMixin, nnUNetPlannerResEncXL):
    """nnU-Net's residual encoder preset XL (40 GB) for LGSSLTrainer's step."""

    plans_prefix = "LGSSLResEncXLPlans"


class LGSSLPlannerCPU(LGSSLPlanningMixin, ExperimentPlanner):
    """Small networks, patches and batches for a machine without a GPU, and a schedule of 1,000 iterations.

    The time of a step grows with the voxels of a patch, so these are bounded: 400,000 voxels in 3D (a cube of 74, about
    a fifth of nnU-Net's 128 cubed), and in 2D 256 x 256 pixels, at four times the batch size. nnU-Net's rules shrink
    larger patches towards the shape of the images. Feature maps start at 8 channels, a quarter of nnU-Net's.
    """

    plans_prefix = "LGSSLCPUPlans"
    schedule = CPU_SCHEDULE
    accepts_memory_target = False

    max_voxels_3d: ClassVar[int] = 400_000
    max_pixels_2d: ClassVar[int] = 256 * 256
    batch_size_3d: ClassVar[int] = 2
    batch_size_2d: ClassVar[int] = 8

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.UNet_base_num_features = 8
        self.UNet_max_features_3d = 128
        self.UNet_max_features_2d = 128
        self.UNet_reference_val_3d = self.max_voxels_3d
        self.UNet_reference_val_2d = self.max_pixels_2d
        # nnU-Net compares estimate / reference batch size * 2 with the reference: with 2 it is the patch that counts.
        self.UNet_reference_val_corresp_bs_3d = 2
        self.UNet_reference_val_corresp_bs_2d = 2

    @staticmethod
    def static_estimate_VRAM_usage(patch_size: Sequence[int], *args: Any, **kwargs: Any) -> float:  # noqa: N802
        """Return the voxels of a patch, which bound the time of a step."""
        return float(np.prod(patch_size))

    def get_plans_for_configuration(self, spacing: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plan one configuration; a patch smaller than the bound makes the step faster, not the batch larger."""
        configuration = super().get_plans_for_configuration(spacing, *args, **kwargs)
        configuration["batch_size"] = self.batch_size_2d if len(spacing) == 2 else self.batch_size_3d
        return configuration


PLANNERS: dict[str, type[LGSSLPlanningMixin]] = {
    "LGSSLPlanner": LGSSLPlanner,
    "LGSSLPlannerCPU": LGSSLPlannerCPU,
    "nnUNetPlannerResEncM": LGSSLPlannerResEncM,
    "nnUNetPlannerResEncL": LGSSLPlannerResEncL,
    "nnUNetPlannerResEncXL": LGSSLPlannerResEncXL,
}
"""Planner by the name that `-pl` takes; nnU-Net's presets keep the name under which they are known."""


def find_planner(name: str) -> type[LGSSLPlanningMixin]:
    """Return the planner class that `-pl` names.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name in PLANNERS:
        return PLANNERS[name]
    near = difflib.get_close_matches(name, PLANNERS, n=3, cutoff=0.4) or list(PLANNERS)
    raise UsageError(f"No planner is called {name!r}; did you mean {' or '.join(near)}?")


def make_plans(
    dataset: RawDataset,
    fingerprint: dict[str, Any],
    planner: type[LGSSLPlanningMixin],
    plans_name: str,
    *,
    preprocessor_name: str = "DefaultPreprocessor",
    gpu_memory_target: float | None = None,
    overwrite_target_spacing: Sequence[float] | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Run a planner and return nnU-Net's plans, without the block of this package and without writing anything.

    Args:
        dataset: the raw dataset.
        fingerprint: its fingerprint.
        planner: a class of `PLANNERS`.
        plans_name: name of the plans.
        preprocessor_name: nnU-Net's preprocessor class.
        gpu_memory_target: memory in GB that LGSSLTrainer's step may take; None for the planner's default.
        overwrite_target_spacing: spacing in mm of 3d_fullres, in the order of the array axes.
        protocol: adds 3d_literature with its published patch and batch size, if it has them.

    Raises:
        PlansError: no patch fits the memory target.
    """
    options: dict[str, Any] = {} if gpu_memory_target is None else {"gpu_memory_target_in_gb": float(gpu_memory_target)}
    if overwrite_target_spacing is not None:
        options["overwrite_target_spacing"] = [float(length) for length in overwrite_target_spacing]
    with tempfile.TemporaryDirectory(prefix="lgssl_planning_") as folder:
        raw, preprocessed = Path(folder, "raw"), Path(folder, "preprocessed")
        write_json(_staged_dataset_json(dataset), raw / dataset.name / "dataset.json")
        images = fingerprint_to_plan_for(dataset, fingerprint)
        write_json(images, preprocessed / dataset.name / "dataset_fingerprint.json")
        output = io.StringIO()
        with (
            environment({"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(preprocessed)}),
            contextlib.redirect_stdout(output),
        ):
            planning = planner(dataset.name, preprocessor_name=preprocessor_name, plans_name=plans_name, **options)
            planning.plan_experiment()
        logger.debug("nnU-Net's planner says:\n%s", output.getvalue())
        plans = read_json(preprocessed / dataset.name / f"{plans_name}.json")
    _drop_cascade(plans)
    _require_patches(plans, gpu_memory_target)
    if protocol is not None:
        _add_literature_configuration(plans, planning, protocol)
    return plans


def _add_literature_configuration(plans: dict[str, Any], planning: LGSSLPlanningMixin, protocol: Protocol) -> None:
    """Add 3d_fullres with the published patch and batch size; both use the same preprocessed cases."""
    fullres = plans["configurations"].get("3d_fullres")
    if protocol.patch_size is None or fullres is None:
        reason = "publications do not agree on a patch size" if fullres else "the plans have no 3d_fullres"
        logger.info("%s: no configuration %s, because %s.", protocol.name, LITERATURE_CONFIGURATION, reason)
        return
    in_array_order = protocol.patch_size[::-1]  # publications count x, y, z; arrays are z, y, x before nnU-Net's turn
    patch_size = [in_array_order[axis] for axis in plans["transpose_forward"]]
    literature = planning.with_patch_size(fullres, patch_size)
    literature["batch_size"] = protocol.batch_size or fullres["batch_size"]
    plans["configurations"][LITERATURE_CONFIGURATION] = literature


def _topology(
    spacing: Sequence[float], patch_size: Sequence[int], min_edge_length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return strides and kernel sizes of nnU-Net's network for a patch, as deep as the patch goes without padding."""
    pooling = _UNLIMITED_POOLING
    while True:
        pools, strides, kernels, padded, _ = get_pool_and_conv_props(spacing, patch_size, min_edge_length, pooling)
        if [int(length) for length in padded] == list(patch_size):
            return [list(stride) for stride in strides], [list(kernel) for kernel in kernels]
        pooling = max(pools) - 1


def _staged_dataset_json(dataset: RawDataset) -> dict[str, Any]:
    """Return a dataset.json that lists all training images and no label.

    The explicit list spares nnU-Net a search of the raw folder, and the number of training cases is what its 5 % rule
    (no step sees more than 5 % of the data) counts: all images.
    """
    listed = {
        name: {"images": [str(path.absolute()) for path in case.images], "label": "none"}
        for name, case in dataset.cases.items()
    }
    return {**dataset.dataset_json, "dataset": listed, "numTraining": len(listed)}


def _drop_cascade(plans: dict[str, Any]) -> None:
    if plans["configurations"].pop("3d_cascade_fullres", None) is None:
        return
    plans["configurations"]["3d_lowres"].pop("next_stage", None)
    logger.info("The images are large; nnU-Net would add 3d_cascade_fullres, which is not supported here yet.")


def _require_patches(plans: dict[str, Any], gpu_memory_target: float | None) -> None:
    """Refuse patches below 16 voxels an axis that are due to the memory target and not to small images."""
    for name, configuration in plans["configurations"].items():
        smallest = np.minimum(configuration["median_image_size_in_voxels"], _MIN_PATCH_EDGE)
        if gpu_memory_target is not None and np.prod(configuration["patch_size"]) < np.prod(smallest):
            _refuse_memory_target(f"{name} would get patches of {configuration['patch_size']} voxels")


def _refuse_memory_target(consequence: str) -> NoReturn:
    raise PlansError(f"-gpu_memory_target is too small: {consequence}; give more GB or use LGSSLPlannerCPU.")
