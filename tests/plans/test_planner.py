from __future__ import annotations

import os
from pathlib import Path

import pytest

from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.planner import PLANNERS, LGSSLPlanner, LGSSLPlannerCPU, find_planner, make_plans


def fingerprint(shape, spacing, number=100):
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
    return {
        "spacings": [list(spacing)] * number,
        "shapes_after_crop": [list(shape)] * number,
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }


@pytest.fixture
def plan(raw_dataset):
    """Plan as if the dataset's images had the given shape and spacing."""
    raw_dataset(labeled=1, unlabeled=0, in_images_un=0, test=0)
    dataset = load_raw_dataset(901)

    def run(shape, spacing, planner=LGSSLPlanner, **options):
        return make_plans(dataset, fingerprint(shape, spacing), planner, "Name", **options)

    return run


def volume(plans, configuration="3d_fullres") -> int:
    patch = plans["configurations"][configuration]["patch_size"]
    return patch[0] * patch[1] * patch[2]


def test_the_cpu_planner_takes_small_images_whole(plan):
    planned = plan((36, 51, 35), (1.0, 1.0, 1.0), LGSSLPlannerCPU)["configurations"]["3d_fullres"]
    assert planned["patch_size"] == [40, 56, 40]
    assert planned["batch_size"] == 2
    assert planned["architecture"]["arch_kwargs"]["features_per_stage"][0] == 8


def test_the_cpu_planner_bounds_the_voxels_of_a_patch(plan):
    spacing = (1.25, 1.25, 1.25)
    left_atrium = plan((88, 155, 200), (0.625,) * 3, LGSSLPlannerCPU, overwrite_target_spacing=spacing)
    assert left_atrium["configurations"]["3d_fullres"]["patch_size"] == [48, 80, 96]
    large = plan((300, 512, 512), (1.0, 0.8, 0.8), LGSSLPlannerCPU)
    assert 0.5 * LGSSLPlannerCPU.max_voxels_3d < volume(large) <= LGSSLPlannerCPU.max_voxels_3d
    assert max(large["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]) <= 128


def test_a_gpu_patch_leaves_room_for_two_streams_and_two_decoders(plan):
    shape, spacing = (200, 300, 300), (1.0, 1.0, 1.0)
    mine = plan(shape, spacing)
    stock = 128**3  # what nnU-Net plans for one stream and one decoder
    assert mine["configurations"]["3d_fullres"]["batch_size"] == 2
    assert 0.2 < volume(mine) / stock < 0.5
    assert volume(plan(shape, spacing, gpu_memory_target=24)) > 2 * volume(mine)


def test_the_estimate_counts_two_patches_one_encoder_and_two_decoders(plan):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    planned = plan((64, 64, 64), (1.0, 1.0, 1.0))["configurations"]["3d_fullres"]
    network = planned["architecture"]
    arguments = (network["network_class_name"], network["arch_kwargs"], network["_kw_requires_import"])
    built = get_network_from_plans(*arguments, 1, 2, allow_init=False)
    patch = planned["patch_size"]
    once, decoder = built.compute_conv_feature_map_size(patch), built.decoder.compute_conv_feature_map_size(patch)
    assert LGSSLPlanner.static_estimate_VRAM_usage(patch, 1, 2, *arguments) == 2 * (once + decoder)


def test_the_five_percent_rule_counts_all_images(raw_dataset):
    raw_dataset(labeled=1, unlabeled=9, in_images_un=0)
    dataset = load_raw_dataset(901)
    few = make_plans(dataset, fingerprint((32,) * 3, (1.0,) * 3), LGSSLPlanner, "Few")
    dataset.unlabeled.update({f"u{index}": dataset.unlabeled["unl_00"] for index in range(190)})
    many = make_plans(dataset, fingerprint((32,) * 3, (1.0,) * 3), LGSSLPlanner, "Many")
    assert few["configurations"]["3d_fullres"]["batch_size"] == 2
    assert many["configurations"]["3d_fullres"]["batch_size"] > 5


def test_the_cascade_is_dropped_and_said_to_be(plan, caplog):
    caplog.set_level("INFO")
    plans = plan((400, 400, 400), (1.0, 1.0, 1.0))
    assert set(plans["configurations"]) == {"2d", "3d_fullres", "3d_lowres"}
    assert "next_stage" not in plans["configurations"]["3d_lowres"]
    assert "not supported" in caplog.text


@pytest.mark.parametrize("name", list(PLANNERS))
def test_every_planner_keeps_its_own_folders_and_the_environment(plan, name):
    before = dict(os.environ)
    plans = plan((40, 40, 40), (1.0, 1.0, 1.0), find_planner(name))
    assert dict(os.environ) == before
    assert not list(Path(before["nnUNet_preprocessed"]).iterdir())
    assert not list(Path(before["nnUNet_raw"]).glob("*/splits*"))
    for configuration, planned in plans["configurations"].items():
        assert planned["data_identifier"] == f"Name_{configuration}"
    assert plans["experiment_planner_used"] == find_planner(name).__name__


def test_two_dimensional_images_get_the_two_dimensional_configuration_alone(plan):
    plans = plan((1, 128, 160), (999.0, 1.0, 1.0), LGSSLPlannerCPU)
    assert list(plans["configurations"]) == ["2d"]
    assert plans["configurations"]["2d"]["patch_size"] == [128, 160]


def test_an_unknown_planner_is_refused_with_the_nearest_names():
    with pytest.raises(UsageError, match="LGSSLPlannerCPU"):
        find_planner("LGSSLPlanerCPU")
    with pytest.raises(UsageError, match="nnUNetPlannerResEncM"):
        find_planner("ResEncM")


@pytest.mark.parametrize("gigabytes", [0.01, 1e-7])
def test_too_little_memory_is_refused(plan, gigabytes):
    with pytest.raises(PlansError, match="too small"):
        plan((80, 80, 80), (1.0, 1.0, 1.0), gpu_memory_target=gigabytes)
