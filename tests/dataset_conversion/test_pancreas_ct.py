"""Pancreas-CT: three layouts of the same scans, labels that lie the wrong way round, and what goes wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.datasets import convert_dataset
from lgssl_nnunet.dataset_conversion.pancreas_ct import DATASET, convert_pancreas_ct
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.text.prompts import build_prompts

ORIGIN, SPACING = (-120.0, -90.0, -310.5), (0.75, 0.75, 1.0)


def convert(download: Path, output: Path, **options) -> Path:
    return convert_dataset("Pancreas", download, output=output, num_processes=0, progress=False, **options)


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def dataset_json(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def written(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.glob("*/*.nii.gz"))


def add_nifti(folder: Path, number: int, abdomen, write_nifti, *, name: str = "image{:04d}", **label) -> None:
    phantom = abdomen(number)
    flip = label.pop("flip", ())
    write_nifti(phantom.image, folder / f"{name.format(number)}.nii.gz")
    write_nifti(np.flip(phantom.mask, flip), folder / f"label{number:04d}.nii.gz", **label)


def write_h5(folder: Path, number: int, abdomen, label=None) -> tuple[np.ndarray, np.ndarray]:
    h5py = pytest.importorskip("h5py")
    phantom = abdomen(number)
    image = (np.clip(phantom.image, -125, 275) / 100).astype(np.float32).transpose(2, 1, 0)
    mask = phantom.mask.astype(np.float32).transpose(2, 1, 0) if label is None else label
    path = folder / "Pancreas_h5" / f"image{number:04d}_norm.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, mask
    return image, mask


@pytest.mark.parametrize("flip", [(), (1,), (0,), (0, 1)])
def test_dicom_labels_get_the_voxels_and_geometry_of_the_series_whichever_way_they_lie(tcia, abdomen, tmp_path, flip):
    tcia.add(1, flip)
    folder = convert(tcia.folder, tmp_path)
    assert folder.name == "Dataset502_PancreasCT"
    assert written(folder) == ["imagesTr/pancreas_0001_0000.nii.gz", "labelsTr/pancreas_0001.nii.gz"]
    image_file, label_file = folder / "imagesTr" / "pancreas_0001_0000.nii.gz", folder / "labelsTr/pancreas_0001.nii.gz"
    assert np.array_equal(voxels(image_file), abdomen(1).image)
    assert np.array_equal(voxels(label_file), abdomen(1).mask)
    for image in (sitk.ReadImage(str(image_file)), sitk.ReadImage(str(label_file))):
        assert image.GetSpacing() == pytest.approx(SPACING)
        assert image.GetOrigin() == pytest.approx(ORIGIN)
    changes = dataset_json(folder)["conversion"]["changes"]["pancreas_0001"]
    assert any("header of the segmentation replaced" in change for change in changes)
    named = [change for change in changes if "flipped" in change.split("(")[0]]
    assert bool(named) == bool(flip)
    if flip:
        assert f"flipped along {' and '.join('zy'[axis] for axis in sorted(flip, reverse=True))} (share of" in named[0]


def test_instance_numbers_against_the_position_make_the_flipped_label_the_expected_one(tcia, abdomen, tmp_path):
    """Lead 0.07 of the right version: too little for a surprise, enough for what the instance numbers announce."""
    image = abdomen(1).image.copy()
    mask = abdomen(1).mask
    image[np.flip(mask, 0)] = np.where(np.arange(mask.sum()) % 14 == 0, -100, 40)
    phantom = type(abdomen(1))(image, mask)
    tcia.add_image(1, phantom)
    tcia.add_label(1, (0,))
    with pytest.raises(DatasetError, match="it is unclear how it lies"):
        convert(tcia.folder, tmp_path)
    shutil.rmtree(tcia.series_folder(1))
    tcia.add_image(1, phantom, instances=range(len(image), 0, -1))
    assert np.array_equal(voxels(convert(tcia.folder, tmp_path) / "labelsTr" / "pancreas_0001.nii.gz"), mask)


def test_a_label_that_fits_no_way_round_is_refused_with_the_measurements(tcia, tmp_path):
    tcia.add(1)
    air = np.zeros((24, 32, 32), bool)
    air[4:8, 0:3, 4:8] = True
    tcia.add_image(2)
    tcia.add_label(2, mask=air)
    with pytest.raises(DatasetError, match=r"1 of 2 cases .*\n.*label0002.nii.gz: it is unclear .* as stored 0.00"):
        convert(tcia.folder, tmp_path)
    assert (tmp_path / "Dataset502_PancreasCT" / "labelsTr" / "pancreas_0001.nii.gz").exists()
    assert not (tmp_path / "Dataset502_PancreasCT" / "imagesTr" / "pancreas_0002_0000.nii.gz").exists()


def test_a_uniform_image_is_ambiguous_and_refused(tcia, abdomen, tmp_path):
    phantom = abdomen(1)
    tcia.add_image(1, type(phantom)(np.full_like(phantom.image, 40), phantom.mask))
    tcia.add_label(1)
    with pytest.raises(DatasetError, match="it is unclear how it lies"):
        convert(tcia.folder, tmp_path)


@pytest.mark.parametrize(
    ("tags", "message"),
    [({"positions": "tilted"}, "gantry tilt"), ({"positions": "gap"}, "slices are missing or double")],
)
def test_series_that_are_no_regular_stack_are_refused_by_name(tcia, tmp_path, tags, message):
    tilt, gap = (0.2, 0) if tags["positions"] == "tilted" else (0, 1)
    places = [(ORIGIN[0], ORIGIN[1] + tilt * z, ORIGIN[2] + z + gap * (z > 9)) for z in range(24)]
    tcia.add(3, positions=places)
    with pytest.raises(DatasetError, match=rf"pancreas_0003: .*PANCREAS_0003: .*{message}"):
        convert(tcia.folder, tmp_path)


def test_two_series_of_one_case_are_refused(tcia, tmp_path):
    tcia.add(3)
    tcia.add_image(3, series="1.2.3")
    shutil.copytree(tcia.series_folder(3), tcia.series_folder(3).with_name("second"))
    tcia.add_image(3)
    with pytest.raises(DatasetError, match="PANCREAS_0003: holds 2 CT series"):
        convert(tcia.folder, tmp_path)


def test_different_sizes_are_refused_with_both(tcia, abdomen, tmp_path):
    tcia.add_image(1)
    tcia.add_label(1, mask=abdomen(1).mask[:-1])
    with pytest.raises(DatasetError, match=r"\[32, 32, 23\], PANCREAS_0001 has \[32, 32, 24\]"):
        convert(tcia.folder, tmp_path)


def test_withdrawn_cases_and_labels_without_image_are_left_out_and_named(tcia, tmp_path, caplog):
    for number in (1, 2, 25):
        tcia.add(number)
    for number in (33, 70):
        tcia.add_label(number)
    with caplog.at_level(logging.WARNING):
        folder = convert(tcia.folder, tmp_path)
    left_out = dataset_json(folder)["conversion"]["left_out"]
    assert left_out == {
        "pancreas_0025": "TCIA withdrew case 25, the same scan as pancreas_0002",
        "pancreas_0070": "TCIA withdrew case 70, the same scan as pancreas_0002",
        "pancreas_0033": "the download holds its label label0033.nii.gz but no image",
    }
    assert "pancreas_0025 is left out: TCIA withdrew" in caplog.text
    assert [name for name in written(folder) if "labels" in name] == [
        "labelsTr/pancreas_0001.nii.gz", "labelsTr/pancreas_0002.nii.gz"
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["dicom", "nifti"])
def test_images_without_label_become_unlabelled(tcia, abdomen, write_nifti, tmp_path, caplog, layout):
    if layout == "dicom":
        tcia.add(1)
        tcia.add_image(4)
    else:
        add_nifti(tcia.folder, 1, abdomen, write_nifti)
        write_nifti(abdomen(4).image, tcia.folder / "image0004.nii.gz")
    folder = convert(tcia.folder, tmp_path)
    assert (folder / "imagesUn" / "pancreas_0004_0000.nii.gz").exists()
    assert "no label and become unlabelled images: pancreas_0004." in caplog.text
    assert dataset_json(folder)["conversion"]["cases"] == {"train": 1, "test": 0, "unlabeled": 1}


def test_a_download_without_any_label_is_refused(tcia, tmp_path):
    tcia.add_image(1)
    with pytest.raises(DatasetError, match=r"1 images and no label0001.nii.gz .*TCIA_pancreas_labels-02-05-2017.zip"):
        convert(tcia.folder, tmp_path)


@pytest.mark.parametrize("name", ["image{:04d}", "PANCREAS_{:04d}"])
def test_nifti_pairs_that_fit_are_linked_unchanged(abdomen, write_nifti, tmp_path, name):
    download = tmp_path / "download"
    for number in (1, 2):
        add_nifti(download, number, abdomen, write_nifti, name=name)
    folder = convert(download, tmp_path, link=True)
    image, label = folder / "imagesTr" / "pancreas_0002_0000.nii.gz", folder / "labelsTr" / "pancreas_0002.nii.gz"
    assert os.readlink(image) == str(download / f"{name.format(2)}.nii.gz")
    assert os.readlink(label) == str(download / "label0002.nii.gz")
    assert dataset_json(folder)["conversion"]["layout"] == "NIfTI"
    assert dataset_json(folder)["conversion"]["changes"] == {}


@pytest.mark.parametrize("flip", [(1,), (0,)])
def test_a_mirrored_nifti_label_under_a_copied_header_is_mirrored_back(abdomen, write_nifti, tmp_path, flip):
    download = tmp_path / "download"
    add_nifti(download, 1, abdomen, write_nifti, flip=flip)
    folder = convert(download, tmp_path, link=True)
    image, label = folder / "imagesTr" / "pancreas_0001_0000.nii.gz", folder / "labelsTr" / "pancreas_0001.nii.gz"
    assert image.is_symlink()
    assert not label.is_symlink()
    assert np.array_equal(voxels(label), abdomen(1).mask)
    assert "segmentation flipped along" in dataset_json(folder)["conversion"]["changes"]["pancreas_0001"][0]


def test_a_label_header_that_differs_is_replaced_where_the_voxels_fit(abdomen, write_nifti, tmp_path):
    download = tmp_path / "download"
    add_nifti(download, 1, abdomen, write_nifti, origin=(0, 0, 0))
    add_nifti(download, 2, abdomen, write_nifti, flip=(1, 2), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    folder = convert(download, tmp_path)
    changes = dataset_json(folder)["conversion"]["changes"]
    assert changes["pancreas_0001"] == [
        "header of the segmentation replaced by that of the image: it has origin [0.0, 0.0, 0.0] and the "
        "image has [-120.0, -90.0, -310.5]"
    ]
    assert "segmentation flipped along x and y" in changes["pancreas_0002"][0]
    for number in (1, 2):
        label = sitk.ReadImage(str(folder / "labelsTr" / f"pancreas_000{number}.nii.gz"))
        assert np.array_equal(sitk.GetArrayFromImage(label), abdomen(number).mask)
        assert label.GetOrigin() == pytest.approx(ORIGIN)


def test_float_labels_become_whole_numbers_and_negative_ones_are_refused(abdomen, write_nifti, tmp_path):
    download = tmp_path / "download"
    write_nifti(abdomen(1).image, download / "image0001.nii.gz")
    write_nifti(abdomen(1).mask * np.float32(1.0000001), download / "label0001.nii.gz")
    label = convert(download, tmp_path) / "labelsTr" / "pancreas_0001.nii.gz"
    assert voxels(label).dtype == np.uint8
    assert np.array_equal(voxels(label), abdomen(1).mask)
    signed = abdomen(1).mask.astype(np.int16)
    signed[0, 0, 0] = -1
    write_nifti(signed, download / "label0001.nii.gz")
    with pytest.raises(DatasetError, match="holds the value -1"):
        convert(download, tmp_path)


def test_an_empty_label_is_refused(tcia, abdomen, tmp_path):
    tcia.add_image(1)
    tcia.add_label(1, mask=np.zeros_like(abdomen(1).mask))
    with pytest.raises(DatasetError, match="nothing is segmented"):
        convert(tcia.folder, tmp_path)


def test_the_multi_organ_labels_of_zenodo_are_refused_by_name(abdomen, write_nifti, tmp_path):
    download = tmp_path / "download"
    write_nifti(abdomen(1).image, download / "image0001.nii.gz")
    write_nifti(abdomen(1).mask * np.uint8(11), download / "label0001.nii.gz")
    with pytest.raises(DatasetError, match="values up to 11, as the multi-organ labels of Zenodo 1169361"):
        convert(download, tmp_path)


def test_h5_copies_keep_their_voxels_and_get_the_documented_spacing(abdomen, tmp_path, caplog):
    download = tmp_path / "download"
    arrays = {number: write_h5(download, number, abdomen) for number in (1, 2, 25)}
    folder = convert(download, tmp_path)
    content = dataset_json(folder)
    assert content["channel_names"] == {"0": "CT windowed"}
    assert content["conversion"]["derived"] is True
    assert "cropped in x and y around the true mask" in content["conversion"]["processing"]
    assert list(content["conversion"]["left_out"]) == ["pancreas_0025"]
    image = sitk.ReadImage(str(folder / "imagesTr" / "pancreas_0002_0000.nii.gz"))
    assert image.GetSpacing() == (1, 1, 1)
    assert np.array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), arrays[2][0])
    assert np.array_equal(
        voxels(folder / "labelsTr" / "pancreas_0002.nii.gz").transpose(2, 1, 0), arrays[2][1].astype(np.uint8)
    )


def test_h5_copies_of_other_labels_are_refused(abdomen, tmp_path):
    write_h5(tmp_path / "download", 1, abdomen, label=11 * abdomen(1).mask.transpose(2, 1, 0).astype(np.float32))
    with pytest.raises(DatasetError, match="Zenodo 1169361"):
        convert(tmp_path / "download", tmp_path)


def test_windowed_copies_are_ct_for_prompts_and_not_for_the_normalisation():
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    schemes = [get_normalization_scheme(name).__name__ for name in (DATASET.channel, DATASET.derived_channel)]
    assert schemes == ["CTNormalization", "ZScoreNormalization"]
    for channel in (DATASET.channel, DATASET.derived_channel):
        prompts = build_prompts({"channel_names": {"0": channel}, "labels": dict(DATASET.labels)}, DATASET.prompts)
        assert [prompt.sentence for prompt in prompts][1] == "A computerized tomography of a pancreas"


def test_mixed_layouts_are_refused(tcia, abdomen, write_nifti, tmp_path):
    tcia.add(1)
    add_nifti(tcia.folder / "nifti", 2, abdomen, write_nifti)
    with pytest.raises(DatasetError, match=r"several layouts \(TCIA DICOM \(1 cases\); NIfTI \(1 cases\)\)"):
        convert(tcia.folder, tmp_path)


def test_images_and_labels_that_are_there_twice_are_refused(tcia, abdomen, write_nifti, tmp_path):
    tcia.add(1)
    shutil.copytree(tcia.folder / "Pancreas-CT", tcia.folder / "DOI")
    shutil.copy(tcia.label_file(1), tcia.folder / "Label0001.nii.gz")
    with pytest.raises(DatasetError, match=r"2 problems(.|\n)*PANCREAS_0001: is the same case as (.|\n)*remove one"):
        convert(tcia.folder, tmp_path)


def test_older_and_flat_folders_are_found(abdomen, write_series, tcia, tmp_path):
    write_series(abdomen(1).image, tcia.folder / "DOI" / "Pancreas_0001")
    tcia.add_label(1)
    (tcia.folder / "DOI" / "PANCREAS_0070").mkdir()
    folder = convert_pancreas_ct(tcia.folder, output=tmp_path, num_processes=0, progress=False)
    assert np.array_equal(voxels(folder / "labelsTr" / "pancreas_0001.nii.gz"), abdomen(1).mask)
    assert dataset_json(folder)["conversion"]["left_out"] == {}


def test_a_folder_of_something_else_is_refused_with_what_is_expected(tmp_path):
    (tmp_path / "download").mkdir()
    with pytest.raises(DatasetError, match=r"no layout of Pancreas was found; expected is PANCREAS_00XX"):
        convert(tmp_path / "download", tmp_path)


def test_a_second_run_reads_nothing_again(tcia, tmp_path, caplog):
    tcia.add(1)
    label = convert(tcia.folder, tmp_path) / "labelsTr" / "pancreas_0001.nii.gz"
    before = label.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        convert(tcia.folder, tmp_path)
    assert "1 cases are converted already" in caplog.text
    assert label.stat().st_mtime_ns == before


def test_a_converted_download_is_planned_with_its_spacing_and_ct_normalisation(tcia, tmp_path, monkeypatch):
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for number in range(1, 7):
        tcia.add(number)
    convert(tcia.folder, None)
    (file,) = plan_and_preprocess(
        502,
        planner="LGSSLPlannerCPU",
        configurations=["3d_fullres"],
        preprocess=False,
        num_processes=0,
        num_processes_fingerprint=0,
        progress=False,
    )
    configuration = json.loads(Path(file).read_text())["configurations"]["3d_fullres"]
    assert configuration["spacing"] == pytest.approx([1.0, 0.75, 0.75])
    assert configuration["median_image_size_in_voxels"] == pytest.approx([24, 32, 32])
    assert configuration["normalization_schemes"] == ["CTNormalization"]
