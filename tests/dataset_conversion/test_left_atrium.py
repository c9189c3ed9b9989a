"""Left Atrium: three layouts of the same scans, and what goes wrong with them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.datasets import convert_dataset
from lgssl_nnunet.dataset_conversion.left_atrium import convert_left_atrium
from lgssl_nnunet.errors import DatasetError

CODES = ("06SR5RBREL16DQ6M8LWS", "1D7CUD1955YZPGK8XHJX", "1GU15S0GJ6PFNARO469W")
SHAPE = (14, 12, 88)  # x, y, z


def scan(code: str) -> tuple[np.ndarray, np.ndarray]:
    """Return image (X, Y, Z) and mask of 0 and 1 of a made-up scan."""
    random = np.random.default_rng(sum(code.encode()))
    mask = np.zeros(SHAPE, np.uint8)
    corner = random.integers(1, 6, 3)
    mask[corner[0] : corner[0] + 5, corner[1] : corner[1] + 4, 30:60] = 1
    return (random.normal(0, 1, SHAPE) + 3 * mask).astype(np.float32), mask


def write(array: np.ndarray, path: Path, spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((spacing,) * 3)
    sitk.WriteImage(image, str(path), True)


def write_challenge_case(folder: Path, code: str, *, mask_value: int = 255, label: bool = True) -> None:
    image, mask = scan(code)
    scaled = np.clip(40 * image.transpose(2, 1, 0) + 60, 0, 255).astype(np.uint8)
    write(scaled, folder / code / "lgemri.nrrd")
    if label:
        write(mask.transpose(2, 1, 0) * np.uint8(mask_value), folder / code / "laendo.nrrd")


def write_nifti_case(folder: Path, code: str) -> None:
    image, mask = scan(code)  # written as if (X, Y, Z) were (Z, Y, X), as the published copies are
    write(image, folder / "DATASET" / code / "data.nii.gz")
    write(mask.astype(np.int16), folder / "DATASET" / code / "label.nii.gz")


def write_h5_case(folder: Path, code: str, shape: tuple[int, ...] | None = None) -> None:
    h5py = pytest.importorskip("h5py")
    image, mask = scan(code)
    path = folder / "2018LA_Seg_Training Set" / code / "mri_norm2.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = image.reshape(shape or image.shape)
        file["label"] = mask.reshape(shape or mask.shape)


def write_lists(folder: Path, train=CODES[:2], test=CODES[2:]) -> None:
    (folder / "train.list").write_text("\n".join(train) + "\n")
    (folder / "test.list").write_text("\n".join(test))


def convert(download: Path, output: Path, **options) -> Path:
    return convert_dataset("LA", download, output=output, num_processes=0, progress=False, **options)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture
def download(tmp_path: Path) -> Path:
    folder = tmp_path / "download"
    folder.mkdir()
    return folder


def test_the_challenge_becomes_training_and_test_cases_with_spacing_and_classes(download, tmp_path):
    write_challenge_case(download / "Training Set", CODES[0])
    write_challenge_case(download / "Training Set", CODES[1], label=False)
    write_challenge_case(download / "Testing Set", CODES[2])
    (download / "Training Set" / CODES[0] / "desktop.ini").write_text("x")
    target = convert(download, tmp_path / "raw")
    image = sitk.ReadImage(str(target / "imagesTr" / f"{CODES[0]}_0000.nii.gz"))
    label = sitk.ReadImage(str(target / "labelsTr" / f"{CODES[0]}.nii.gz"))
    assert image.GetSpacing() == label.GetSpacing() == pytest.approx((0.625,) * 3)
    assert label.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), scan(CODES[0])[1].transpose(2, 1, 0))
    assert (target / "imagesUn" / f"{CODES[1]}_0000.nii.gz").exists()
    assert (target / "labelsTs" / f"{CODES[2]}.nii.gz").exists()
    content = json.loads((target / "dataset.json").read_text())
    assert (content["channel_names"], content["numTraining"]) == ({"0": "MRI"}, 1)
    assert content["conversion"]["cases"] == {"train": 1, "test": 1, "unlabeled": 1}
    assert content["conversion"]["derived"] is False
    assert "0.625" in content["conversion"]["spacing"]
    assert content["conversion"]["changes"][CODES[0]][0] == "mask values 0 and 255 became 0 and 1"


def test_the_spacing_of_the_headers_is_kept_on_request_and_a_true_one_always(download, tmp_path):
    write_challenge_case(download, CODES[0])
    kept = convert(download, tmp_path / "kept", keep_spacing=True)
    path = f"imagesTr/{CODES[0]}_0000.nii.gz"
    assert sitk.ReadImage(str(kept / path)).GetSpacing() == (1, 1, 1)
    assert json.loads((kept / "dataset.json").read_text())["conversion"]["spacing"] == "from the headers"
    for name in ("lgemri.nrrd", "laendo.nrrd"):
        write(read(download / CODES[0] / name), download / CODES[0] / name, spacing=1.25)
    true = convert(download, tmp_path / "true")
    assert sitk.ReadImage(str(true / path)).GetSpacing() == pytest.approx((1.25,) * 3)


def test_h5_and_nifti_copies_of_a_case_give_the_same_voxels(download, tmp_path):
    for code in CODES:
        write_h5_case(download / "h5", code)
        write_nifti_case(download / "nifti", code)
    write_lists(download / "h5")
    write_lists(download / "nifti")
    one, other = convert(download / "h5", tmp_path / "a"), convert(download / "nifti", tmp_path / "b")
    files = sorted(path.relative_to(one) for path in one.rglob("*.nii.gz"))
    assert [path.as_posix() for path in files if "Ts" in path.as_posix()] == [
        f"imagesTs/{CODES[2]}_0000.nii.gz",
        f"labelsTs/{CODES[2]}.nii.gz",
    ]
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.nii.gz"))
    for path in files:
        first, second = sitk.ReadImage(str(one / path)), sitk.ReadImage(str(other / path))
        assert first.GetSize() == second.GetSize() == SHAPE
        assert first.GetSpacing() == second.GetSpacing() == pytest.approx((0.625,) * 3)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
    image = read(one / "imagesTr" / f"{CODES[0]}_0000.nii.gz")
    np.testing.assert_array_equal(image.transpose(2, 1, 0), scan(CODES[0])[0])


def test_derived_copies_say_what_was_done_to_them(download, tmp_path, caplog):
    write_nifti_case(download, CODES[0])
    with caplog.at_level(logging.WARNING, "lgssl_nnunet"):
        target = convert(download, tmp_path / "raw")
    assert "cropped in x and y around the true mask" in caplog.text
    assert "has lost its spacing" in caplog.text
    assert json.loads((target / "dataset.json").read_text())["conversion"]["derived"] is True


def test_cases_on_no_list_are_left_out_and_named(download, tmp_path, caplog):
    for code in CODES:
        write_nifti_case(download, code)
    write_lists(download, train=CODES[:1], test=CODES[1:2])
    target = convert(download, tmp_path / "raw")
    assert f"{CODES[2]} is left out: it is in none of the lists." in caplog.text
    assert list(json.loads((target / "dataset.json").read_text())["conversion"]["left_out"]) == [CODES[2]]
    assert not list(target.rglob(f"*{CODES[2]}*"))


def test_lists_that_do_not_fit_the_cases_are_refused_with_every_problem(download, tmp_path):
    write_nifti_case(download, CODES[0])
    write_lists(download, train=[*CODES[:1], "NOBODY"], test=CODES[:1])
    with pytest.raises(DatasetError, match="names NOBODY, which the download does not hold") as refused:
        convert(download, tmp_path / "raw")
    assert f"names {CODES[0]}, which is a train case" in str(refused.value)
    assert not (tmp_path / "raw").exists()


def test_mixed_layouts_and_unknown_ones_are_refused(download, tmp_path):
    with pytest.raises(DatasetError, match=r"no layout of LA was found; expected is <case>/lgemri\.nrrd"):
        convert(download, tmp_path / "raw")
    write_nifti_case(download, CODES[0])
    write_challenge_case(download / "Training Set", CODES[0])
    with pytest.raises(DatasetError, match=r"several layouts \(challenge NRRD \(1 cases\); Universal-Medical"):
        convert(download, tmp_path / "raw")


def test_the_same_case_twice_is_refused(download, tmp_path):
    write_challenge_case(download / "Training Set", CODES[0])
    write_challenge_case(download / "Testing Set", CODES[0])
    with pytest.raises(DatasetError, match="is the same case as"):
        convert(download, tmp_path / "raw")


@pytest.mark.parametrize(
    ("values", "message"),
    [([0, 1, 254], "holds the value 254, LA has 0 to 1"), ([0, 0.5], r"holds the value 0\.5, no whole number")],
)
def test_other_mask_values_are_refused(download, tmp_path, values, message):
    write_challenge_case(download, CODES[0])
    path = download / CODES[0] / "laendo.nrrd"
    mask = np.resize(np.asarray(values, np.float32), read(path).shape)
    write(mask, path)
    with pytest.raises(DatasetError, match=message):
        convert(download, tmp_path / "raw")


def test_a_copy_without_the_88_slices_is_refused(download, tmp_path):
    write_h5_case(download, CODES[0], shape=(88, 14, 12))
    with pytest.raises(DatasetError, match="is not the 88 slices"):
        convert(download, tmp_path / "raw")


def test_the_function_of_the_dataset_is_the_same_conversion(download, tmp_path):
    write_challenge_case(download, CODES[0])
    target = convert_left_atrium(download, output=tmp_path / "raw", num_processes=0, progress=False)
    assert target.name == "Dataset501_LeftAtrium"


@pytest.mark.real_data
def test_real_copies_of_a_case_are_equal_voxel_by_voxel(tmp_path):
    data = Path(os.environ.get("LGSSL_TEST_DATA", "../shared/data")).resolve()
    copies = {"h5": data / "uamt_h5", "nifti": data / "universal_medical_ssl" / "LA"}
    if not all(folder.is_dir() for folder in copies.values()):
        pytest.skip("the real left-atrium images are not here (LGSSL_TEST_DATA)")
    pytest.importorskip("h5py")
    code = "3DA0T2V6JJ2NLUAV6FWM"
    for name, folder in copies.items():
        source = next(path for path in folder.rglob(code) if path.is_dir())
        place = tmp_path / name / ("DATASET" if name == "nifti" else "")
        place.mkdir(parents=True)
        (place / code).symlink_to(source, target_is_directory=True)
    targets = [convert(tmp_path / name, tmp_path / f"raw_{name}") for name in copies]
    for file in (f"imagesTr/{code}_0000.nii.gz", f"labelsTr/{code}.nii.gz"):
        np.testing.assert_array_equal(read(targets[0] / file), read(targets[1] / file))
