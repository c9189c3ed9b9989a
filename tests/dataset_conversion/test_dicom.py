"""A DICOM series becomes a volume in HU, or is refused with what is wrong with its slices."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.dicom import read_series
from lgssl_nnunet.errors import DatasetError

RESCALE_SLOPE = b"\x28\x00\x53\x10"
ORIGIN, SPACING = (-120.0, -90.0, -310.5), (0.75, 0.75, 1.0)


def positions(count: int, step: float = 1.0, lateral: float = 0.0) -> list[tuple[float, float, float]]:
    return [(ORIGIN[0], ORIGIN[1] + lateral * index, ORIGIN[2] + step * index) for index in range(count)]


def replace_bytes(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert raw.count(old) == 1
    file.write_bytes(raw.replace(old, new))


@pytest.fixture
def image(abdomen) -> np.ndarray:
    return abdomen(0).image


def test_slices_are_stacked_by_position_below_nested_folders(image, write_series, tmp_path):
    write_series(image, tmp_path / "1.3.6" / "1.3.6.1")
    series = read_series(tmp_path)
    assert np.array_equal(sitk.GetArrayFromImage(series.image), image)
    assert series.image.GetPixelID() == sitk.sitkInt16
    assert series.image.GetSpacing() == pytest.approx(SPACING)
    assert series.image.GetOrigin() == pytest.approx(ORIGIN)
    assert series.image.GetDirection() == pytest.approx(np.eye(3).ravel())
    assert series.instance_order == 1


def test_slope_and_intercept_of_the_tags_are_applied(image, write_series, tmp_path):
    image = image // 2 * 2
    files = write_series(image, tmp_path, slope=2, intercept=-1024)
    stored = np.frombuffer(files[3].read_bytes()[-image[3].nbytes :], "<i2").reshape(image[3].shape)
    assert np.array_equal(stored, (image[3] + 1024) // 2)
    assert np.array_equal(sitk.GetArrayFromImage(read_series(tmp_path).image), image)


def test_values_between_whole_numbers_stay(image, write_series, tmp_path):
    stored = np.clip(image, -50, 250)
    files = write_series(stored, tmp_path, slope=1, intercept=0)
    for file in files:
        replace_bytes(file, RESCALE_SLOPE + b"\x02\x00\x00\x001 ", RESCALE_SLOPE + b"\x02\x00\x00\x00.5")
    result = read_series(tmp_path).image
    assert result.GetPixelID() == sitk.sitkFloat32
    assert np.array_equal(sitk.GetArrayFromImage(result), stored / 2)


def test_instance_numbers_tell_the_order_in_which_labels_are_drawn(image, write_series, tmp_path):
    count = len(image)
    write_series(image, tmp_path / "down", instances=range(count, 0, -1))
    assert read_series(tmp_path / "down").instance_order == -1
    write_series(image, tmp_path / "gaps", instances=range(0, 3 * count, 3))
    assert read_series(tmp_path / "gaps").instance_order == 1
    write_series(image, tmp_path / "mixed", instances=[2, 1, *range(3, count + 1)])
    assert read_series(tmp_path / "mixed").instance_ranks[:3] == (1, 0, 2)
    assert read_series(tmp_path / "mixed").instance_order == 0
    write_series(image, tmp_path / "none", instances=[7] * count)
    assert (read_series(tmp_path / "none").instance_ranks, read_series(tmp_path / "none").instance_order) == ((), 0)


def test_slices_along_another_direction_ascend_along_their_normal(image, write_series, tmp_path):
    places = [(-100.0 - index, -90.0, 40.0) for index in range(len(image))]
    write_series(image, tmp_path, orientation="0\\1\\0\\0\\0\\-1", positions=places)
    series = read_series(tmp_path)
    assert np.array_equal(sitk.GetArrayFromImage(series.image), image)
    assert series.image.TransformIndexToPhysicalPoint((0, 0, 5)) == pytest.approx((-105, -90, 40))


def test_a_missing_slice_is_refused(image, write_series, tmp_path):
    write_series(image, tmp_path)[10].unlink()
    with pytest.raises(DatasetError, match=r"1 of 22 distances .* not 1.000 mm, .* 2.000 mm between 1-015.dcm and"):
        read_series(tmp_path)


def test_a_slice_that_is_there_twice_is_refused(image, write_series, tmp_path):
    files = write_series(image, tmp_path)
    shutil.copy(files[4], tmp_path / "copy.dcm")
    with pytest.raises(DatasetError, match=r"0.000 mm between .* missing or double"):
        read_series(tmp_path)


def test_uneven_slices_are_refused_and_rounded_positions_are_not(image, write_series, tmp_path):
    uneven = positions(len(image))
    uneven[7:] = [(x, y, z + 0.03) for x, y, z in uneven[7:]]
    write_series(image, tmp_path / "uneven", positions=uneven)
    with pytest.raises(DatasetError, match="1 of 23 distances"):
        read_series(tmp_path / "uneven")
    rounded = [(x, y, round(z, 2)) for x, y, z in positions(len(image), step=0.703)]
    write_series(image, tmp_path / "rounded", positions=rounded)
    assert read_series(tmp_path / "rounded").image.GetSpacing()[2] == pytest.approx(0.703, abs=1e-3)


def test_a_gantry_tilt_is_refused(image, write_series, tmp_path):
    write_series(image, tmp_path, positions=positions(len(image), lateral=0.2))
    with pytest.raises(DatasetError, match=r"by up to 4.60 mm .* tilt of 11.3 degrees"):
        read_series(tmp_path)


def test_several_series_are_refused_with_their_number(image, write_series, tmp_path):
    write_series(image, tmp_path / "a", series="1.2.3")
    write_series(image, tmp_path / "b", series="1.2.4")
    with pytest.raises(DatasetError, match=r"holds 2 CT series \(1.2.3, 1.2.4\)"):
        read_series(tmp_path)


def test_other_modalities_are_left_aside(image, write_series, tmp_path, caplog):
    write_series(image, tmp_path)
    write_series(image[:2], tmp_path, series="1.9", modality="OT")
    with caplog.at_level(logging.INFO):
        assert read_series(tmp_path).image.GetSize() == image.shape[::-1]
    assert "2 files of modality OT are not read" in caplog.text


def test_a_damaged_file_is_named(image, write_series, tmp_path):
    file = write_series(image, tmp_path)[5]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=rf"{file.name}: cannot be read .* download it again"):
        read_series(tmp_path)


def test_a_slice_without_position_is_named(image, write_series, tmp_path):
    file = write_series(image, tmp_path)[5]
    replace_bytes(file, b"\x20\x00\x32\x00", b"\x20\x00\x35\x00")
    with pytest.raises(DatasetError, match=rf"{file.name}: has no position"):
        read_series(tmp_path)


def test_slices_of_different_size_or_direction_are_refused(image, write_series, tmp_path):
    write_series(image, tmp_path / "size")
    write_series(image[:1, :20], tmp_path / "size" / "more")
    with pytest.raises(DatasetError, match=r"\[32, 20, 1, 1\].*only the slices of one volume"):
        read_series(tmp_path / "size")
    write_series(image, tmp_path / "scout")
    write_series(image[:1], tmp_path / "scout" / "more", orientation="1\\0\\0\\0\\0\\-1")
    with pytest.raises(DatasetError, match="lie in different directions"):
        read_series(tmp_path / "scout")


def test_folders_without_a_volume_are_refused(image, write_series, tmp_path):
    with pytest.raises(DatasetError, match="holds 0 CT slices"):
        read_series(tmp_path)
    write_series(image[:1], tmp_path)
    with pytest.raises(DatasetError, match="holds 1 CT slices"):
        read_series(tmp_path)


def test_files_that_macos_leaves_behind_are_ignored(image, write_series, tmp_path):
    write_series(image, tmp_path)
    (tmp_path / "._1-001.dcm").write_bytes(b"finder")
    assert read_series(tmp_path).image.GetSize() == image.shape[::-1]
