"""BTCV: the official archive, copies of it, and every trap of datasets.md 4.2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.btcv import convert_btcv
from lgssl_nnunet.dataset_conversion.datasets import convert_dataset, find_dataset
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.text.encoders import embed_prompts
from lgssl_nnunet.text.prompts import build_prompts

SHAPE = (16, 32, 32)  # z to the head, y to the back, x to the patient's left
SPACING = (0.8, 0.8, 3.0)
ORIENTATIONS = {"LPS": (1, 1, 1), "LAS": (1, -1, 1), "RAS": (-1, -1, 1)}
ORGANS = (  # box (z, z, y, y, x, x) and HU, in the order of the values
    ((9, 13, 20, 25, 24, 28), 116),
    ((4, 9, 20, 25, 6, 10), 169),
    ((4, 9, 20, 25, 22, 26), 168),
    ((6, 8, 8, 10, 10, 12), 52),
    ((13, 15, 18, 20, 16, 18), 60),
    ((9, 14, 8, 18, 5, 14), 122),
    ((9, 13, 8, 13, 18, 24), 70),
    ((2, 12, 20, 23, 16, 18), 170),
    ((2, 12, 19, 21, 13, 15), 146),
    ((7, 9, 15, 17, 11, 19), 172),
    ((5, 7, 13, 16, 12, 20), 98),
    ((9, 11, 21, 23, 9, 11), 40),
    ((9, 11, 21, 23, 20, 22), 44),
)


def organs(number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a CT in HU and the values of its 13 organs; other numbers are other people, so that none are twins."""
    image, label = np.full(SHAPE, -1000, dtype=np.int16), np.zeros(SHAPE, dtype=np.int16)
    fat = image[:, 3:29, 3:29]
    fat[:] = np.random.default_rng(number).integers(-900, -60, fat.shape)
    for value, ((z, z_end, y, y_end, x, x_end), intensity) in enumerate(ORGANS, start=1):
        box = slice(z, z_end), slice(y, y_end), slice(x, x_end)
        image[box], label[box] = intensity, value
    label.flat[np.flatnonzero(label == 6)[number]] = 0
    return image, label


def save(array: np.ndarray, path: Path, orientation="LAS", spacing=SPACING, origin=(-12.5, 7, -300)) -> None:
    """Write an array (Z, Y, X) of `SHAPE`'s orientation as a scanner of another one would have stored it."""
    signs = ORIENTATIONS[orientation]
    stored = array[tuple(slice(None, None, sign) for sign in reversed(signs))]
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored))
    image.SetDirection(np.diag(signs).astype(float).ravel())
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)


class Download:
    """RawData of Synapse, with as many cases as a test adds."""

    def __init__(self, root: Path) -> None:
        self.root = root / "RawData"

    def image_file(self, number: int) -> Path:
        return self.root / ("Training" if number < 61 else "Testing") / "img" / f"img{number:04d}.nii.gz"

    def label_file(self, number: int) -> Path:
        return self.root / "Training" / "label" / f"label{number:04d}.nii.gz"

    def add(self, number: int, image=None, label=None, **geometry) -> None:
        own_image, own_label = organs(number)
        image, label = own_image if image is None else image, own_label if label is None else label
        save(image, self.image_file(number), **geometry)
        if number < 61:
            save(label, self.label_file(number), **geometry)


@pytest.fixture
def download(tmp_path):
    return Download(tmp_path)


@pytest.fixture
def convert(tmp_path, download):
    def run(folder: Path | None = None, **options) -> Path:
        options = {"output": tmp_path / "nnUNet_raw", "num_processes": 0, "progress": False, **options}
        return convert_dataset("BTCV", folder or download.root, **options)

    return run


def read(path: Path) -> tuple[Geometry, np.ndarray]:
    image = sitk.ReadImage(str(path))
    return Geometry.of(image), sitk.GetArrayFromImage(image)


def content(target: Path) -> dict:
    return json.loads((target / "dataset.json").read_text())


def names(target: Path, folder: str) -> list[str]:
    return sorted(file.name for file in (target / folder).glob("*"))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_official_archive_converts_voxel_by_voxel(convert, download, caplog, orientation):
    download.add(1, orientation=orientation)
    download.add(40, orientation=orientation, spacing=(0.7, 0.7, 5))
    download.add(61, orientation=orientation)
    target = convert()
    assert target.name == "Dataset503_BTCV"
    assert names(target, "imagesTr") == ["btcv_0001_0000.nii.gz", "btcv_0040_0000.nii.gz"]
    assert names(target, "labelsTr") == ["btcv_0001.nii.gz", "btcv_0040.nii.gz"]
    assert (names(target, "imagesTs"), names(target, "labelsTs")) == (["btcv_0061_0000.nii.gz"], [])
    for number in (1, 40):
        for source, result in (
            (download.image_file(number), target / "imagesTr" / f"btcv_{number:04d}_0000.nii.gz"),
            (download.label_file(number), target / "labelsTr" / f"btcv_{number:04d}.nii.gz"),
        ):
            (geometry, voxels), (expected_geometry, expected) = read(result), read(source)
            assert geometry == expected_geometry
            np.testing.assert_array_equal(voxels, expected)
    description = content(target)
    assert list(description["labels"]) == [
        "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
    ]  # fmt: skip
    assert list(description["labels"].values()) == list(range(14))
    assert (description["channel_names"], description["numTraining"]) == ({"0": "CT"}, 2)
    record = description["conversion"]
    assert (record["layout"], record["cases"]) == ("Synapse RawData", {"train": 2, "test": 1, "unlabeled": 0})
    assert (record["warnings"], record["changes"]) == ({}, {})
    assert "The download lacks 28 of 30 training cases: 0002 to " in caplog.text
    assert read(target / "labelsTr" / "btcv_0001.nii.gz")[1].dtype == np.uint8


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("imagesTr/img0003.nii.gz", "labelsTr/label0003.nii.gz"),
        ("img/0003/img0003.nii.gz", "label/0003/label0003.nii.gz"),
        ("img/img0003.nii.gz/img0003.nii.gz", "label/label0003.nii.gz/label0003.nii.gz"),
        ("img0003.nii", "label0003.nii"),
    ],
)
def test_copies_in_other_folders_are_found(convert, tmp_path, image, label):
    save(organs()[0], tmp_path / "copy" / image)
    save(organs()[1], tmp_path / "copy" / label)
    target = convert(tmp_path / "copy")
    np.testing.assert_array_equal(read(target / "labelsTr" / "btcv_0003.nii.gz")[1], read(tmp_path / "copy" / label)[1])


def test_all_30_and_20_official_cases_give_no_warning(convert, download, caplog):
    for number in (*range(1, 11), *range(21, 41), *range(61, 81)):
        download.add(number)
    assert content(convert())["conversion"]["cases"] == {"train": 30, "test": 20, "unlabeled": 0}
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_the_function_of_the_module_does_the_same(download, tmp_path):
    download.add(2)
    target = convert_btcv(download.root, output=tmp_path / "raw", num_processes=0, progress=False)
    assert names(target, "imagesTr") == ["btcv_0002_0000.nii.gz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: np.where(label == 1, 14, label), "label0002.nii.gz: holds the value 14 .*Zenodo 1169361"),
        (lambda label: np.where(label > 8, 0, label), "label0002.nii.gz: holds no value above 8.*two orders"),
        (lambda label: np.where(label == 1, 15, label), "label0002.nii.gz: holds the value 15, BTCV has 0 to 13"),
        (lambda label: label * 0, "label0002.nii.gz: nothing is segmented"),
        (lambda label: label * 0.75, "label0002.nii.gz: holds the value .*, no whole number"),
    ],
)
def test_other_sets_of_classes_are_refused(convert, download, change, message):
    download.add(1)
    download.add(2, label=change(organs()[1]))
    with pytest.raises(DatasetError, match=message):
        convert()


def test_a_case_may_lack_the_gallbladder_and_is_named_if_it_lacks_another_organ(convert, download):
    label = organs()[1]
    download.add(1, label=np.where(label == 4, 0, label))
    download.add(2, label=np.where(np.isin(label, (4, 7)), 0, label))
    warnings = content(convert())["conversion"]["warnings"]
    assert warnings == {"btcv_0002": ["the segmentation lacks stomach"]}


def test_float_values_near_whole_numbers_are_rounded(convert, download):
    download.add(1, label=(organs()[1] * 1.000001).astype(np.float32))
    target = convert()
    voxels = read(target / "labelsTr" / "btcv_0001.nii.gz")[1]
    assert voxels.dtype == np.uint8
    np.testing.assert_array_equal(voxels, np.round(read(download.label_file(1))[1]))


def test_renumbered_copies_are_refused(convert, download):
    for number in (1, 11, 20):
        download.add(number)
    with pytest.raises(DatasetError, match=r"holds the cases 0011, 0020, .* how is not published"):
        convert()


def test_an_image_without_a_label_becomes_unlabelled(convert, download, caplog):
    download.add(1)
    download.add(2)
    download.label_file(2).unlink()
    target = convert()
    assert names(target, "imagesUn") == ["btcv_0002_0000.nii.gz"]
    assert names(target, "imagesTr") == ["btcv_0001_0000.nii.gz"]
    assert "Training cases without a segmentation become unlabelled: 0002." in caplog.text


@pytest.mark.parametrize("number", [2, 62])
def test_a_label_without_an_image_is_a_problem(convert, download, number):
    download.add(1)
    save(organs()[1], download.label_file(number))
    with pytest.raises(DatasetError, match=f"label{number:04d}.nii.gz: has no image"):
        convert()


def test_a_label_of_a_test_case_is_kept_and_questioned(convert, download, caplog):
    download.add(1)
    download.add(61)
    save(organs()[1], download.label_file(61))
    target = convert()
    assert names(target, "labelsTs") == ["btcv_0061.nii.gz"]
    assert "publishes no segmentations of test cases; find out where these are from: 0061." in caplog.text


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_case_that_is_there_twice_is_refused(convert, download, kind):
    download.add(1)
    file = download.image_file(1) if kind == "image" else download.label_file(1)
    save(organs()[0], download.root / "copy" / file.name)
    with pytest.raises(DatasetError, match=f"copy/{file.name}: is the same case as"):
        convert()


def test_other_files_are_named_and_ignored(convert, download, caplog):
    download.add(1)
    save(organs()[0], download.root / "RegData" / "img0001-0002.nii.gz")
    (download.image_file(1).parent / "._img0001.nii.gz").write_bytes(b"of macOS")
    assert names(convert(), "imagesTr") == ["btcv_0001_0000.nii.gz"]
    assert "Files with names of another kind are ignored: img0001-0002.nii.gz." in caplog.text


def test_a_folder_with_nothing_of_btcv_says_what_is_expected(convert, tmp_path):
    save(organs()[1], tmp_path / "other" / "label0001.nii.gz")  # Pancreas-CT calls its segmentations so, too
    with pytest.raises(DatasetError, match=r"no layout of BTCV was found; expected is RawData/Training/img/img0001"):
        convert(tmp_path / "other")


def exchanged(label: np.ndarray, first: int, second: int) -> np.ndarray:
    return np.where(label == first, second, np.where(label == second, first, label))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (organs()[0][..., ::-1], organs()[1][..., ::-1], "the right kidney lies to the left of the left kidney"),
        (None, organs()[1][..., ::-1], "the right kidney lies to the left of the left kidney"),
        (None, exchanged(organs()[1], 2, 3), "the right kidney lies to the left of the left kidney"),
        (None, exchanged(organs()[1], 1, 6), "the liver lies to the left of the spleen"),
    ],
    ids=["both arrays", "label", "kidneys", "liver and spleen"],
)
def test_organs_on_the_wrong_side_are_refused(convert, download, orientation, image, label, message):
    download.add(2)
    download.add(1, image=image, label=label, orientation=orientation)
    with pytest.raises(DatasetError, match=f"1 of 2 cases.*\n.*label0001.nii.gz: by its header {message}"):
        convert()


def test_sides_need_both_organs(convert, download):
    label = organs()[1]
    download.add(1, label=np.where(np.isin(label, (3, 6)), 0, label))
    assert content(convert())["conversion"]["warnings"] == {"btcv_0001": ["the segmentation lacks left kidney, liver"]}


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"spacing": (0.8, 0.8, 3.3)}, "label0001.nii.gz: has spacing"),
        ({"origin": (0, 7, -300)}, "label0001.nii.gz: has origin"),
        ({"orientation": "RAS"}, "label0001.nii.gz: has direction"),
    ],
)
def test_a_label_whose_header_differs_is_refused(convert, download, geometry, message):
    download.add(1)
    save(organs()[1], download.label_file(1), **geometry)
    with pytest.raises(DatasetError, match=message):
        convert()


def test_a_label_header_that_was_rounded_gets_the_geometry_of_the_image(convert, download):
    download.add(1)
    save(organs()[1], download.label_file(1), origin=(-12.51, 7, -300))
    target = convert(link=True)
    written = target / "labelsTr" / "btcv_0001.nii.gz"
    assert not written.is_symlink()
    assert read(written)[0] == read(download.image_file(1))[0]


def test_links_stand_for_files_of_which_no_voxel_changes(convert, download):
    download.add(1)
    download.add(2, label=organs()[1].astype(np.float32))
    download.add(61)
    target = convert(link=True)
    for number, folder in ((1, "imagesTr"), (2, "imagesTr"), (61, "imagesTs")):
        link = target / folder / f"btcv_{number:04d}_0000.nii.gz"
        assert link.is_symlink()
        assert link.resolve() == download.image_file(number).resolve()
    assert (target / "labelsTr" / "btcv_0001.nii.gz").resolve() == download.label_file(1).resolve()
    assert not (target / "labelsTr" / "btcv_0002.nii.gz").is_symlink()
    assert read(target / "labelsTr" / "btcv_0002.nii.gz")[1].dtype == np.uint8


def test_a_damaged_file_is_refused_and_the_other_cases_are_kept(convert, download):
    download.add(1)
    download.add(2)
    file = download.image_file(2)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"1 of 2 cases.*\n.*img0002.nii.gz: cannot be read"):
        convert()
    download.add(2)
    assert names(convert(), "labelsTr") == ["btcv_0001.nii.gz", "btcv_0002.nii.gz"]


@pytest.mark.parametrize("name", ["LA", "BTCV", "LiTS"])
def test_the_shipped_bank_knows_every_class(name):
    dataset = find_dataset(name)
    description = {"channel_names": {"0": dataset.channel}, "labels": dataset.labels, "prompts": dataset.prompts}
    embedded = embed_prompts(build_prompts(description), "bank")
    assert len(embedded.prompts) == len(set(embedded.prompts)) == len(dataset.labels)
    sources = [text.source for (text,) in embedded.texts]
    assert all(source.startswith("bank, by ") for source in sources)
    assert not any(source.endswith("synonym") for source in sources)


def test_plans_have_the_median_spacing_ct_normalisation_and_no_left_right_mirroring(
    convert, download, tmp_path, monkeypatch
):
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for number, spacing in zip((1, 2, 3, 4, 5), (2.5, 3, 3, 5, 2.5), strict=True):
        download.add(number, spacing=(spacing / 4, spacing / 4, spacing))
    download.add(61)
    (file,) = plan_and_preprocess(
        convert(output=None).name, planner="LGSSLPlannerCPU", num_processes=0, num_processes_fingerprint=0,
        configurations=["3d_fullres"], preprocess=False, progress=False,
    )  # fmt: skip
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [3, 0.75, 0.75]
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    intensities = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (intensities["min"], intensities["max"]) == (40, 172)
    assert plans["lgssl"]["mirroring_axes"] == [0, 1]
    assert plans["lgssl"]["split"]["test"] == ["btcv_0061"]
