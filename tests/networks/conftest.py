"""Tiny configurations and plans for the network tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

CLASSES, WIDTH = 3, 12


def configuration(
    patch=(16, 16, 16), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), residual_encoder=False, kernels=None
) -> ConfigurationManager:
    """A configuration with 4 base features, as a planner would write it."""
    stages, dimensions = len(strides), len(patch)
    name = "ResidualEncoderUNet" if residual_encoder else "PlainConvUNet"
    blocks = "n_blocks_per_stage" if residual_encoder else "n_conv_per_stage"
    return ConfigurationManager(
        {
            "patch_size": list(patch),
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
                "arch_kwargs": {
                    "n_stages": stages,
                    "features_per_stage": [4 * 2**stage for stage in range(stages)],
                    "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                    "kernel_sizes": [list(kernel) for kernel in (kernels or [[3] * dimensions] * stages)],
                    "strides": [list(stride) for stride in strides],
                    blocks: [1] * stages,
                    "n_conv_per_stage_decoder": [1] * (stages - 1),
                    "conv_bias": True,
                    "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    )


CONFIGURATIONS = {
    "3d": configuration(),
    "2d": configuration((16, 16), ((1, 1), (2, 2), (2, 2))),
    "anisotropic": configuration(
        (8, 16, 24), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3))
    ),
    "resenc": configuration(residual_encoder=True),
}


@pytest.fixture(params=CONFIGURATIONS, name="configuration_manager")
def every_configuration(request) -> ConfigurationManager:
    return CONFIGURATIONS[request.param]


@pytest.fixture
def configuration_3d() -> ConfigurationManager:
    return CONFIGURATIONS["3d"]


@pytest.fixture
def make_configuration():
    return configuration


@pytest.fixture
def make_plans():
    """Plans that hold nothing but prompt embeddings."""

    def make(classes: int = CLASSES, width: int = WIDTH) -> SimpleNamespace:
        rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(7)).tolist()
        return SimpleNamespace(plans={"plans_name": "LGSSLPlans", "lgssl": {"text": {"embeddings": rows}}})

    return make


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
