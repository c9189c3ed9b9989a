"""Annotations of two slices on disk and in a batch: label and distance of a voxel stay together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from lgssl_nnunet.data.sparse import (
    OrthogonalDataset,
    annotation_file,
    follow_nearest,
    stored_locations,
    stored_origin,
    write_annotation,
)
from lgssl_nnunet.engine.seeding import seed_everything

SHAPE = (4, 12, 14, 16)


@pytest.fixture
def file(tmp_path):
    return annotation_file(tmp_path / "Plans_3d_fullres", "case_1")


@pytest.fixture
def values():
    return np.random.default_rng(0).integers(-1, 90, SHAPE).astype(np.int16)


def test_the_file_lies_in_a_folder_of_its_own_beside_the_case(file, tmp_path):
    assert file == tmp_path / "Plans_3d_fullres_orthogonal" / "case_1.b2nd"


def test_what_is_written_is_read_again(file, values):
    import blosc2

    locations = {2: np.arange(8).reshape(2, 4), 1: np.zeros((0, 4), int)}
    write_annotation(file, values, "made so", locations, (8, 8, 8))
    assert np.array_equal(blosc2.open(str(file), mode="r")[:], values)
    assert stored_origin(file) == "made so"
    found = stored_locations(file)
    assert list(found) == [1, 2]
    assert found[1].shape == (0, 4)
    assert np.array_equal(found[2], locations[2])
    assert [f.name for f in file.parent.iterdir()] == ["case_1.b2nd"]


def test_the_same_annotation_is_the_same_bytes(file, values):
    contents = []
    for _ in range(2):
        write_annotation(file, values, "made so", {}, (8, 8, 8))
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_damaged_or_missing_file_has_no_origin(share, file, values):
    assert stored_origin(file) is None
    write_annotation(file, values, "made so", {}, (8, 8, 8))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert stored_origin(file) is None


def test_a_failed_writing_leaves_the_old_file(file, values):
    write_annotation(file, values, "made so", {}, (8, 8, 8))
    with pytest.raises(ValueError, match="four"):
        write_annotation(file, values, "anew", {1: np.array(["four"])}, (8, 8, 8))
    assert stored_origin(file) == "made so"
    assert [f.name for f in file.parent.iterdir()] == ["case_1.b2nd"]


def test_the_dataset_hands_out_the_annotation_and_the_places_on_the_slices(file, values, tmp_path):
    import blosc2
    from batchgenerators.utilities.file_and_folder_operations import write_pickle

    folder = tmp_path / "Plans_3d_fullres"
    folder.mkdir()
    blosc2.asarray(np.ones((1, *SHAPE[1:]), np.float32), urlpath=str(folder / "case_1.b2nd"))
    write_pickle({"spacing": 1, "class_locations": {1: "of the whole label"}}, str(folder / "case_1.pkl"))
    write_annotation(file, values, "made so", {1: np.arange(4)[None]}, (8, 8, 8))
    image, annotation, previous, properties = OrthogonalDataset(str(folder), ["case_1"]).load_case("case_1")
    assert image.shape == (1, *SHAPE[1:])
    assert np.array_equal(annotation[:], values)
    assert previous is None
    assert properties["spacing"] == 1
    assert {label: where.tolist() for label, where in properties["class_locations"].items()} == {1: [[0, 1, 2, 3]]}


def rotation(shape=(12, 14, 16)):
    """nnU-Net's spatial step, with a rotation and a scaling every time."""
    return SpatialTransform(
        shape,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=1,
        rotation=(-0.5, 0.5),
        p_scaling=1,
        scaling=(0.7, 1.4),
        border_mode_seg="constant",
        padding_value_seg=-1,
    )


def transformed(pipeline, annotation):
    seed_everything(0)
    return pipeline(image=torch.zeros(1, *SHAPE[1:]), segmentation=annotation)["segmentation"]


def numbered_voxels():
    """Channels of which each tells the place of the voxel, as labels and distances of any coarseness."""
    number = torch.arange(12 * 14 * 16, dtype=torch.int16).reshape(SHAPE[1:])
    return torch.stack([number % 3, number % 5, number, number // 7])


def test_every_channel_follows_the_spatial_transform_to_the_same_voxel():
    found = transformed(follow_nearest(ComposeTransforms([rotation()])), numbered_voxels())
    inside = found[2] >= 0
    assert found.dtype == torch.int16
    assert 0.3 < inside.float().mean() < 1
    assert not torch.equal(found[2], numbered_voxels()[2])
    for channel, expected in ((0, found[2] % 3), (1, found[2] % 5), (3, found[2] // 7)):
        assert torch.equal(found[channel][inside], expected[inside])
        assert (found[channel][~inside] == -1).all()


def test_nnunets_own_interpolation_would_tear_label_and_distance_apart():
    annotation = numbered_voxels()
    annotation[2] //= 20  # few enough labels for its loop
    found = transformed(ComposeTransforms([rotation()]), annotation)
    nearest = transformed(follow_nearest(ComposeTransforms([rotation()])), annotation)
    assert not torch.equal(found, nearest)
