"""The plans' U-Net in nnU-Net's other family: plain convolutions or a residual encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lgssl_nnunet.errors import PlansError

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

# nnU-Net's presets: depth of each encoder stage (the last one repeats) and of every decoder stage.
_FAMILIES = {
    "PlainConvUNet": ("n_conv_per_stage", (2,), 2),
    "ResidualEncoderUNet": ("n_blocks_per_stage", (1, 3, 4, 6), 1),
}
_OF_BOTH = (
    "n_stages",
    "features_per_stage",
    "conv_op",
    "kernel_sizes",
    "strides",
    "conv_bias",
    "norm_op",
    "norm_op_kwargs",
    "dropout_op",
    "dropout_op_kwargs",
    "nonlin",
    "nonlin_kwargs",
)


def as_plain(configuration_manager: ConfigurationManager) -> ConfigurationManager:
    """Return the configuration with a U-Net of plain convolutions; as it is if it has one.

    Raises:
        PlansError: the architecture is none of nnU-Net's two U-Nets.
    """
    return _as_family(configuration_manager, "PlainConvUNet")


def as_residual(configuration_manager: ConfigurationManager) -> ConfigurationManager:
    """Return the configuration with a residual-encoder U-Net; as it is if it has one.

    Raises:
        PlansError: the architecture is none of nnU-Net's two U-Nets.
    """
    return _as_family(configuration_manager, "ResidualEncoderUNet")


def _as_family(configuration_manager: ConfigurationManager, family: str) -> ConfigurationManager:
    """Keep features, strides, kernels and normalisation, and take the depths of the family's presets."""
    planned = configuration_manager.network_arch_class_name.rsplit(".", 1)[-1]
    if planned == family:
        return configuration_manager
    if planned not in _FAMILIES:
        raise PlansError(
            f"The plans' network {planned} is neither {' nor '.join(_FAMILIES)}; plan with a default or ResEnc planner."
        )
    kwargs = configuration_manager.network_arch_init_kwargs
    stages = kwargs["n_stages"]
    name, depths, decoder_depth = _FAMILIES[family]
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{family}",
        "arch_kwargs": {key: kwargs[key] for key in _OF_BOTH if key in kwargs}
        | {
            name: [*depths, *depths[-1:] * stages][:stages],
            "n_conv_per_stage_decoder": [decoder_depth] * (stages - 1),
        },
        "_kw_requires_import": [
            key for key in configuration_manager.network_arch_init_kwargs_req_import if key in _OF_BOTH
        ],
    }
    return type(configuration_manager)({**configuration_manager.configuration, "architecture": architecture})
