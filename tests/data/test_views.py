"""Views of an unlabelled patch share their geometry and differ in intensity."""

from __future__ import annotations

import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from lgssl_nnunet.data.spatial import BoundaryInterpolation
from lgssl_nnunet.data.views import ViewsTransform, is_intensity_transform, make_deterministic, split_views

BOTH = ("weak", "strong")
SIZES = {"3d_fullres": (20, 24, 24), "2d": (24, 24)}


@pytest.fixture(scope="module")
def pipelines(build_trainer):
    """nnU-Net's training transforms for a configuration, as the trainer uses them."""
    made = {}

    def get(configuration: str = "3d_fullres") -> ComposeTransforms:
        if configuration not in made:
            trainer = build_trainer("SupervisedTrainer", configuration=configuration)
            trainer.on_train_start()
            made[configuration] = trainer.dataloader_train.data_loader.loaders["labeled"].transforms
        return made[configuration]

    return get


def patch(configuration: str = "3d_fullres", channels: int = 1) -> torch.Tensor:
    """A patch that is larger than the final one, as nnU-Net's loader cuts it."""
    size = [side + 8 for side in SIZES[configuration]]
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(0))


def without_intensities(pipeline: ComposeTransforms) -> ComposeTransforms:
    return ComposeTransforms([t for t in pipeline.transforms if not is_intensity_transform(t)])


def always(pipeline: ComposeTransforms) -> ComposeTransforms:
    """Apply every geometric and intensity step each time, so that no test depends on a lucky draw."""
    steps = []
    for transform in pipeline.transforms:
        if is_intensity_transform(transform):
            steps.append(RandomTransform(transform.transform, 1.0))
        else:
            steps.append(transform)
    return ComposeTransforms(steps)


@pytest.mark.parametrize("configuration", SIZES)
def test_nnunets_pipeline_is_sorted_into_geometry_and_intensity(configuration, pipelines):
    views = ViewsTransform(pipelines(configuration), BOTH)
    assert {BoundaryInterpolation, MirrorTransform} <= {type(t) for t in views.geometry.transforms}
    inner = [t.transform for t in views.intensity.transforms]
    assert len(inner) >= 6
    assert all(isinstance(t, ImageOnlyTransform) for t in inner)
    # Everything else in the pipeline works on the segmentation, which is not there.
    used = {id(t) for t in (*views.geometry.transforms, *views.intensity.transforms)}
    rest = {type(t).__name__ for t in pipelines(configuration).transforms if id(t) not in used}
    assert rest <= {"RemoveLabelTransform", "DownsampleSegForDSTransform"}


@pytest.mark.parametrize("configuration", SIZES)
def test_with_intensities_off_both_views_are_the_same(configuration, pipelines):
    views = ViewsTransform(without_intensities(pipelines(configuration)), BOTH)
    weak, strong = views(image=patch(configuration))["image"].chunk(2)
    assert weak.shape == (1, *SIZES[configuration])
    assert torch.equal(weak, strong)


@pytest.mark.parametrize("configuration", SIZES)
def test_the_weak_view_is_geometry_alone(configuration, pipelines):
    image = patch(configuration)
    pipeline = always(pipelines(configuration))
    torch.manual_seed(3)
    weak, strong = ViewsTransform(pipeline, BOTH)(image=image)["image"].chunk(2)
    torch.manual_seed(3)
    only = ViewsTransform(without_intensities(pipeline), ("weak",))(image=image)["image"]
    assert torch.equal(weak, only)
    assert not torch.equal(weak, strong)


def test_the_strong_view_does_not_write_into_the_weak_one():
    noise = RandomTransform(GaussianNoiseTransform((1.0, 1.0), p_per_channel=1.0, synchronize_channels=True), 1.0)
    image = torch.zeros(1, 8, 8, 8)
    weak, strong = ViewsTransform(ComposeTransforms([noise]), BOTH)(image=image)["image"].chunk(2)
    assert not weak.any()
    assert strong.any()


def test_each_strong_view_is_a_draw_of_its_own(pipelines):
    views = ViewsTransform(always(pipelines()), ("strong", "strong"))
    first, second = views(image=patch())["image"].chunk(2)
    assert not torch.equal(first, second)


def test_channels_that_are_masked_stay_zero_outside_the_image():
    noise = RandomTransform(GaussianNoiseTransform((1.0, 1.0), p_per_channel=1.0, synchronize_channels=True), 1.0)
    image = torch.ones(2, 8, 8, 8)
    image[:, :3] = 0
    strong = ViewsTransform(ComposeTransforms([noise]), ("strong",), masked_channels=[1])(image=image)["image"]
    assert strong[0, :3].any()
    assert not strong[1, :3].any()
    assert strong[1, 3:].any()


def test_masked_channels_of_the_plans_reach_the_views(build_trainer):
    def mask(plans) -> None:
        plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]

    trainer = build_trainer("LGSSLTrainer", changes=mask)
    trainer.on_train_start()
    assert trainer.dataloader_train.data_loader.loaders["unlabeled"].transforms.masked_channels == [0]


def test_the_loader_gets_no_segmentation(pipelines):
    made = ViewsTransform(pipelines(), BOTH)(image=patch(), segmentation=torch.full((1, 28, 32, 32), -1))
    assert made["image"].shape == (2, 20, 24, 24)
    assert made["segmentation"].numel() == 0


def test_splitting_undoes_the_stacking():
    stacked = torch.arange(2 * 6).reshape(2, 6, 1, 1)
    views = split_views(stacked, BOTH)
    assert list(views) == ["weak", "strong"]
    assert views["weak"][:, :, 0, 0].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert views["strong"][:, :, 0, 0].tolist() == [[3, 4, 5], [9, 10, 11]]


def test_blur_does_not_choose_its_algorithm_by_the_clock(pipelines):
    wrapped = RandomTransform(GaussianBlurTransform((0.5, 1.0), benchmark=True), 0.2)
    bare = GaussianBlurTransform((0.5, 1.0), benchmark=True)
    pipeline = ComposeTransforms([wrapped, bare])
    assert make_deterministic(pipeline) is pipeline
    assert wrapped.transform.benchmark is False
    assert bare.benchmark is False
    inner = [getattr(t, "transform", t) for t in pipelines().transforms]
    blurs = [t for t in inner if isinstance(t, GaussianBlurTransform)]
    assert blurs
    assert not any(blur.benchmark for blur in blurs)
