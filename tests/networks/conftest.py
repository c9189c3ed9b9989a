"""Tiny configurations and plans for the network tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

CLASSES, WIDTH = 3, 12


CONFIGURATIONS = {
    "3d": {},
    "2d": {"patch": (16, 16), "strides": ((1, 1), (2, 2), (2, 2))},
    "anisotropic": {
        "patch": (8, 16, 24),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    },
    "resenc": {"residual_encoder": True},
}


@pytest.fixture(params=CONFIGURATIONS, name="configuration_manager")
def every_configuration(request, make_configuration) -> ConfigurationManager:
    return make_configuration(**CONFIGURATIONS[request.param])


@pytest.fixture
def configuration_3d(make_configuration) -> ConfigurationManager:
    return make_configuration()


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
