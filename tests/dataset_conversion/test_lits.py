"""LiTS: the official batches, and every trap of datasets.md 5.2."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.datasets import convert_dataset
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.lits import convert_lits
from lgssl_nnunet.errors import DatasetError

SHAPE = (16, 32, 32)  # z to the head, y to the back, x to the patient's left
SPACING = (0.75, 0.75, 1.5)
ORIENTATIONS = {"LPS": (1, 1, 1), "LAS": (1, -1, 1), "RAS": (-1, -1, 1)}
LIVER, TUMOUR, FAT = 100, 60, -100
UNKNOWN = "spacing unknown: the header says 1 mm and no orientation"


def scan() -> tuple[np.ndarray, np.ndarray]:
    """Return a CT in HU and its liver (1) with a tumour (2), which lies right, in front and high."""
    image, label = np.full(SHAPE, -1000, dtype=np.int16), np.zeros(SHAPE, dtype=np.int16)
    image[:, 3:29, 3:29] = FAT
    image[7:15, 5:15, 5:17], label[7:15, 5:15, 5:17] = LIVER, 1
    image[9:12, 8:11, 7:11], label[9:12, 8:11, 7:11] = TUMOUR, 2
    return image, label


def save(array: np.ndarray, path: Path, orientation="RAS", spacing=SPACING, origin=(-12.5, 7, -300)) -> None:
    """Write an array (Z, Y, X) of `SHAPE`'s orientation as a scanner of another one would have stored it."""
    signs = ORIENTATIONS[orientation]
    stored = array[tuple(slice(None, None, sign) for sign in reversed(signs))]
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored))
    image.SetDirection(np.diag(signs).astype(float).ravel())
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def save_without_geometry(array: np.ndarray, path: Path, offset: float = 0) -> None:
    """Write the voxels of `save(array, path)` with an identity affine, as LiTS did."""
    affine = np.eye(4)
    affine[:3, 3] = offset
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array[:, ::-1, ::-1].transpose(2, 1, 0), affine), path)


class Download:
    """The two training batches and the test set, with as many cases as a test adds."""

    def __init__(self, root: Path) -> None:
        self.root = root / "LiTS"

    def file(self, kind: str, number: int) -> Path:
        batch = "test" if kind.startswith("test") else f"Training Batch {1 if number < 28 else 2}"
        return self.root / batch / f"{kind}-{number}.nii"

    def add(self, number: int, image=None, label=None, **geometry) -> None:
        save(scan()[0] if image is None else image, self.file("volume", number), **geometry)
        save(scan()[1] if label is None else label, self.file("segmentation", number), **geometry)

    def add_test(self, number: int) -> None:
        save(scan()[0], self.file("test-volume", number))


@pytest.fixture
def download(tmp_path):
    return Download(tmp_path)


@pytest.fixture
def convert(tmp_path, download):
    def run(**options) -> Path:
        options = {"output": tmp_path / "nnUNet_raw", "num_processes": 0, "progress": False, **options}
        return convert_dataset("LiTS", download.root, **options)

    return run


def read(path: Path) -> tuple[Geometry, np.ndarray]:
    image = sitk.ReadImage(str(path))
    return Geometry.of(image), sitk.GetArrayFromImage(image)


def record(target: Path) -> dict:
    return json.loads((target / "dataset.json").read_text())["conversion"]


def names(target: Path, folder: str) -> list[str]:
    return sorted(file.name for file in (target / folder).glob("*"))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_two_batches_and_the_test_set_convert_voxel_by_voxel(convert, download, caplog, orientation):
    for number in (2, 10, 100):
        download.add(number, orientation=orientation)
    download.add_test(7)
    caplog.set_level("INFO")
    target = convert()
    assert target.name == "Dataset504_LiTS"
    assert names(target, "labelsTr") == ["liver_002.nii.gz", "liver_010.nii.gz", "liver_100.nii.gz"]
    assert names(target, "imagesUn") == ["liver_test_007_0000.nii.gz"]
    for number in (2, 10, 100):
        for source, result in (
            (download.file("volume", number), target / "imagesTr" / f"liver_{number:03d}_0000.nii.gz"),
            (download.file("segmentation", number), target / "labelsTr" / f"liver_{number:03d}.nii.gz"),
        ):
            (geometry, voxels), (expected_geometry, expected) = read(result), read(source)
            assert geometry == expected_geometry
            np.testing.assert_array_equal(voxels, expected)
    description = json.loads((target / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": 1, "liver tumour": 2}
    assert (description["channel_names"], description["numTraining"]) == ({"0": "CT"}, 3)
    assert record(target)["layout"] == "challenge NIfTI"
    assert record(target)["cases"] == {"train": 3, "test": 0, "unlabeled": 1}
    assert (record(target)["changes"], record(target)["warnings"]) == ({}, {})
    assert "The download lacks 128 of 131 training cases: 0, 1, 3 to " in caplog.text
    assert "found the layout challenge NIfTI with 3 train cases, 1 unlabeled cases" in caplog.text


def test_the_function_of_the_module_takes_compressed_files(download, tmp_path):
    save(scan()[0], download.root / "ct" / "volume-0.nii.gz")
    save(scan()[1], download.root / "seg" / "segmentation-0.nii.gz")
    target = convert_lits(download.root, output=tmp_path / "raw", num_processes=0, progress=False)
    assert names(target, "imagesTr") == ["liver_000_0000.nii.gz"]


def test_a_download_of_the_test_set_alone_is_unlabelled(convert, download):
    download.add_test(0)
    assert record(convert())["cases"] == {"train": 0, "test": 0, "unlabeled": 1}


def test_a_volume_without_segmentation_is_unlabelled_and_named(convert, download, caplog):
    download.add(0)
    download.add(3)
    download.file("segmentation", 3).unlink()
    target = convert()
    assert (names(target, "imagesUn"), names(target, "labelsTr")) == (["liver_003_0000.nii.gz"], ["liver_000.nii.gz"])
    assert "Training cases without a segmentation become unlabelled: 3." in caplog.text


def test_what_does_not_belong_together_is_refused_at_once(convert, download):
    download.add(0)
    download.add(131)
    save(scan()[0], download.root / "copy" / "volume-0.nii.gz")
    save(scan()[1], download.file("segmentation", 5))
    with pytest.raises(DatasetError) as error:
        convert()
    message = str(error.value)
    assert "copy/volume-0.nii.gz: is the same case as" in message
    assert "segmentation-5.nii: has no image" in message
    assert "holds the volumes 131, which LiTS does not have (0 to 130)" in message


@pytest.mark.parametrize("no_code", [False, True], ids=["identity", "no matrix"])
def test_volumes_that_lost_their_geometry_are_converted_with_a_warning(convert, download, caplog, no_code):
    download.add(27)
    for number, array in (("volume", scan()[0]), ("segmentation", scan()[1])):
        save_without_geometry(array, download.file(number, 28))
        if no_code:
            image = nib.Nifti1Image(np.asarray(nib.load(download.file(number, 28), mmap=False).dataobj), None)
            nib.save(image, download.file(number, 28))
    target = convert()
    assert record(target)["warnings"] == {"liver_028": [record(target)["warnings"]["liver_028"][0]]}
    assert record(target)["warnings"]["liver_028"][0].startswith(UNKNOWN)
    assert "Spacing and orientation of 1 cases are unknown" in caplog.text
    assert "leave them out of results in mm: liver_028." in caplog.text
    assert f"liver_028: {UNKNOWN}" in caplog.text
    assert read(target / "imagesTr" / "liver_028_0000.nii.gz")[0].spacing == (1, 1, 1)
    np.testing.assert_array_equal(
        read(target / "labelsTr" / "liver_028.nii.gz")[1], read(download.file("segmentation", 28))[1]
    )


def test_a_segmentation_that_lost_its_geometry_gets_that_of_its_volume(convert, download):
    download.add(53)
    save_without_geometry(scan()[1], download.file("segmentation", 53), offset=1)
    target = convert()
    image, label = read(target / "imagesTr" / "liver_053_0000.nii.gz"), read(target / "labelsTr" / "liver_053.nii.gz")
    assert image[0] == label[0] == read(download.file("volume", 53))[0]
    np.testing.assert_array_equal(label[1] > 0, image[1] >= TUMOUR)
    (change,) = record(target)["changes"]["liver_053"]
    assert "header said nothing (spacing 1); it got the image's geometry, in which 100% of it" in change


@pytest.mark.parametrize("axis", [0, 1])
def test_a_segmentation_without_geometry_that_fits_only_mirrored_is_refused(convert, download, axis):
    download.add(53)
    save_without_geometry(np.flip(scan()[1], axis), download.file("segmentation", 53))
    name = "zy"[axis]
    with pytest.raises(DatasetError, match=rf"segmentation-53.nii: .*soft tissue.*\(.*flipped along {name} 1.00"):
        convert()


@pytest.mark.parametrize(
    ("array", "geometry", "message"),
    [
        (scan()[1], {"spacing": (0.75, 0.75, 2)}, "segmentation-53.nii: has spacing"),
        (scan()[1], {"origin": (0, 0, 0)}, "segmentation-53.nii: has origin"),
        (scan()[1], {"orientation": "LAS"}, "segmentation-53.nii: has direction"),
        (scan()[1][1:], {"spacing": (1, 1, 1)}, "segmentation-53.nii: has shape"),
        (scan()[1] * 0, {"spacing": (1, 1, 1)}, "segmentation-53.nii: has spacing"),
        (scan()[1] * 3, {}, "segmentation-53.nii: holds the value 3, 6, LiTS has 0 to 2"),
    ],
)
def test_other_disagreement_is_refused(convert, download, array, geometry, message):
    download.add(53)
    save(array, download.file("segmentation", 53), **geometry)
    with pytest.raises(DatasetError, match=message):
        convert()


def test_extreme_intensities_are_kept_and_named(convert, download):
    image = scan()[0]
    image[0, 0, 0], image[0, 0, 1] = -10522, 27572
    download.add(0, image=image)
    download.add(1, image=np.clip(image, -1100, 3100))
    target = convert()
    assert read(target / "imagesTr" / "liver_000_0000.nii.gz")[1].min() == -10522
    (warning,) = record(target)["warnings"].pop("liver_000")
    assert warning.startswith("intensities from -10522 to 27572")
    assert list(record(target)["warnings"]) == ["liver_000"]


def test_a_case_may_have_no_tumour(convert, download):
    download.add(32, label=np.minimum(scan()[1], 1))
    assert record(convert())["warnings"] == {}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_liver_in_the_left_half_of_the_body_is_named(convert, download, orientation):
    download.add(0, *(array[..., ::-1] for array in scan()), orientation=orientation)
    (warning,) = record(convert())["warnings"]["liver_000"]
    assert warning.startswith("by its header the liver lies in the left half of the body")


def test_links_stand_for_uncompressed_files_and_changed_segmentations_are_written(convert, download):
    for number in (0, 1, 53):
        download.add(number)
    save((scan()[1] * 1.000001).astype(np.float32), download.file("segmentation", 1))
    save_without_geometry(scan()[1], download.file("segmentation", 53))
    download.add_test(0)
    target = convert(link=True)
    assert json.loads((target / "dataset.json").read_text())["file_ending"] == ".nii"
    images = [target / "imagesTr" / f"liver_{number:03d}_0000.nii" for number in (0, 1, 53)]
    for link in (*images, target / "imagesUn" / "liver_test_000_0000.nii"):
        assert link.is_symlink()
        assert link.exists()
    assert (target / "labelsTr" / "liver_000.nii").resolve() == download.file("segmentation", 0).resolve()
    for name, image in (("liver_001.nii", images[1]), ("liver_053.nii", images[2])):
        geometry, voxels = read(target / "labelsTr" / name)
        assert not (target / "labelsTr" / name).is_symlink()
        assert (voxels.dtype, geometry) == (np.uint8, read(image)[0])
        np.testing.assert_array_equal(voxels > 0, read(image)[1] >= TUMOUR)


def test_a_fourth_axis_of_length_one_is_dropped_and_more_refused(convert, download):
    download.add(0)
    for kind in ("volume", "segmentation"):
        stored = nib.load(download.file(kind, 0), mmap=False)
        array = np.asarray(stored.dataobj)[..., None]
        nib.save(nib.Nifti1Image(array, stored.affine), download.file(kind, 0))
    target = convert(link=True)
    for name in ("imagesTr/liver_000_0000.nii", "labelsTr/liver_000.nii"):
        assert not (target / name).is_symlink()
        assert nib.load(target / name).shape == SHAPE[::-1]
    stored = nib.load(download.file("volume", 0), mmap=False)
    nib.save(nib.Nifti1Image(np.asarray(stored.dataobj).repeat(2, 3), stored.affine), download.file("volume", 0))
    with pytest.raises(DatasetError, match=r"volume-0.nii: size and channels \[32, 32, 16, 2, 1\]"):
        convert(link=True)


@pytest.mark.parametrize("kept", [0.9, 0.001], ids=["voxels", "header"])
def test_a_file_that_is_cut_off_is_refused(convert, download, kept):
    download.add(0)
    file = download.file("volume", 0)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DatasetError, match=r"volume-0.nii: cannot be read \(.*download or copy it again"):
        convert()


def test_plans_have_the_median_spacing_and_ct_normalisation(convert, download, tmp_path, monkeypatch):
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    image = scan()[0]
    image[0, 0, 0] = 27572  # outside the organ: must not count
    for number, spacing in zip((0, 1, 2, 3, 50), (0.8, 1, 1, 1.5, 2), strict=True):
        download.add(number, image=image, spacing=(0.75, 0.75, spacing))
    download.add_test(0)
    (file,) = plan_and_preprocess(
        convert(output=None).name, planner="LGSSLPlannerCPU", num_processes=0, num_processes_fingerprint=0,
        configurations=["3d_fullres"], preprocess=False, progress=False,
    )  # fmt: skip
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [1.25, 0.75, 0.75]  # the median, the 1.5 mm of the test volume included
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    intensities = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (intensities["percentile_00_5"], intensities["percentile_99_5"]) == (TUMOUR, LIVER)
    split = plans["lgssl"]["split"]
    assert (len(split["labeled"]), split["unlabeled"]) == (5, ["liver_test_000"])
