from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

from lgssl_nnunet.errors import PlansError
from lgssl_nnunet.networks.families import as_plain, as_residual
from lgssl_nnunet.networks.unet import planned_unet

STRIDES_2D = ((1, 1), *[(2, 2)] * 5)


def test_both_families_come_from_either(configuration_manager):
    plain, residual = (planned_unet(family(configuration_manager), 1, 3) for family in (as_plain, as_residual))
    assert type(plain.encoder) is PlainConvEncoder
    assert type(residual.encoder) is ResidualEncoder
    image = torch.randn(1, 1, *configuration_manager.patch_size)
    assert [scale.shape for scale in plain(image)] == [scale.shape for scale in residual(image)]


def test_the_planned_family_stays_as_it_is(make_configuration):
    plain, residual = make_configuration(), make_configuration(residual_encoder=True)
    assert as_plain(plain) is plain
    assert as_residual(residual) is residual


@pytest.mark.parametrize("residual_encoder", [False, True])
def test_all_but_the_depths_is_kept_and_the_plans_stay_untouched(make_configuration, residual_encoder):
    kernels = ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    planned = make_configuration((8, 16, 16), strides, kernels=kernels, residual_encoder=residual_encoder)
    before = repr(planned)
    other = (as_plain if residual_encoder else as_residual)(planned)
    depths = {"n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"}
    kept = [
        {key: value for key, value in manager.network_arch_init_kwargs.items() if key not in depths}
        for manager in (planned, other)
    ]
    assert kept[0] == kept[1]
    assert other.patch_size == planned.patch_size
    assert repr(planned) == before


def test_depths_are_nnunets_presets(make_configuration):
    planned = [make_configuration((64, 64), STRIDES_2D, residual_encoder=residual) for residual in (False, True)]
    plain, residual = as_plain(planned[1]).network_arch_init_kwargs, as_residual(planned[0]).network_arch_init_kwargs
    assert (plain["n_conv_per_stage"], plain["n_conv_per_stage_decoder"]) == ([2] * 6, [2] * 5)
    assert (residual["n_blocks_per_stage"], residual["n_conv_per_stage_decoder"]) == ([1, 3, 4, 6, 6, 6], [1] * 5)


def test_what_only_one_family_knows_is_left_behind(make_configuration):
    planned = make_configuration(residual_encoder=True)
    planned.network_arch_init_kwargs["stem_channels"] = 8
    assert "stem_channels" not in as_plain(planned).network_arch_init_kwargs


def test_another_architecture_is_refused(make_configuration):
    planned = make_configuration()
    planned.configuration["architecture"]["network_class_name"] = "somewhere.SwinUNETR"
    for family in (as_plain, as_residual):
        with pytest.raises(PlansError, match="SwinUNETR is neither PlainConvUNet nor ResidualEncoderUNet; plan with"):
            family(planned)
