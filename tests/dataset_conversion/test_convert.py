"""What all conversions share: targets, resuming, space, links, damaged files, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import lgssl_nnunet
from lgssl_nnunet.cli.convert_dataset import main
from lgssl_nnunet.dataset_conversion import convert as conversion
from lgssl_nnunet.dataset_conversion import datasets
from lgssl_nnunet.dataset_conversion.dataset import TRAIN, ConvertibleDataset, Layout, PreparedCase, SourceCase
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.volumes import find_files, read_volume
from lgssl_nnunet.errors import DatasetError, LGSSLError, UsageError

SIZE = (8, 9, 10)  # x, y, z


def find_layouts(download: Path):
    images = sorted(download.glob("image_*"))
    cases = [SourceCase(image.name.split(".")[0][6:], image, label_of(image), TRAIN) for image in images]
    return ([Layout("plain files", tuple(cases), prepare)] if cases else []), []


def label_of(image: Path) -> Path | None:
    label = image.with_name(image.name.replace("image_", "label_"))
    return label if label.exists() else None


def prepare(case, options):
    label = None if case.label is None else read_volume(case.label)
    return PreparedCase(read_volume(case.image), label, image_as_is=True, label_as_is=True)


PLAIN = ConvertibleDataset(
    key="Plain",
    number=601,
    name="Plain",
    channel="CT",
    derived_channel="CT windowed",
    labels={"background": 0, "liver": 1, "tumour": 2},
    optional_labels=frozenset({"tumour"}),
    prompts={},
    licence="free.",
    reference="nobody",
    find_layouts=find_layouts,
    download="image_*.nii.gz",
)


def volume(seed: int, *, label: bool, dtype=None, spacing=(1.5, 1.5, 3), origin=(5, -6, 7)) -> sitk.Image:
    random = np.random.default_rng(seed)
    array = random.integers(-1000, 1000, SIZE[::-1]).astype(np.int16)
    if label:
        array = (array > 0).astype(np.uint8)
    image = sitk.GetImageFromArray(array if dtype is None else array.astype(dtype))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    return image


@pytest.fixture
def download(tmp_path: Path) -> Path:
    folder = tmp_path / "download"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        sitk.WriteImage(volume(seed, label=False), str(folder / f"image_{name}.nii.gz"))
        sitk.WriteImage(volume(seed, label=True), str(folder / f"label_{name}.nii.gz"))
    return folder


def content(target: Path) -> dict:
    return json.loads((target / "dataset.json").read_text())


def test_images_and_labels_keep_voxels_and_geometry(convert, download):
    target = convert()
    assert target.name == "Dataset601_Plain"
    for kind, name in (("image", "imagesTr/a_0000"), ("label", "labelsTr/a")):
        source, result = (sitk.ReadImage(str(p)) for p in (download / f"{kind}_a.nii.gz", target / f"{name}.nii.gz"))
        assert Geometry.of(result) == Geometry.of(source)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(result), sitk.GetArrayFromImage(source))
    record = content(target)["conversion"]
    assert record["tool"] == f"lgssl_nnunet {lgssl_nnunet.__version__}"
    assert (record["layout"], record["cases"]["train"], record["spacing"]) == ("plain files", 3, "from the headers")


def test_links_replace_copies_where_no_voxel_changes(convert, download):
    drifted = volume(0, label=True, origin=(5.01, -6, 7))
    sitk.WriteImage(drifted, str(download / "label_a.nii.gz"))
    target = convert(link=True)
    assert (target / "imagesTr" / "a_0000.nii.gz").resolve() == download / "image_a.nii.gz"
    assert (target / "labelsTr" / "b.nii.gz").resolve() == download / "label_b.nii.gz"
    snapped = target / "labelsTr" / "a.nii.gz"
    assert not snapped.is_symlink()
    assert Geometry.of(sitk.ReadImage(str(snapped))) == Geometry.of(sitk.ReadImage(str(download / "image_a.nii.gz")))


def test_links_to_uncompressed_files_keep_their_ending(convert, download):
    for file in sorted(download.iterdir()):
        sitk.WriteImage(sitk.ReadImage(str(file)), str(file).removesuffix(".gz"))
        file.unlink()
    sitk.WriteImage(volume(0, label=True, dtype=np.float32), str(download / "label_a.nii"))
    assert content(convert())["file_ending"] == ".nii.gz"
    target = convert(link=True, dataset_id=602)
    assert content(target)["file_ending"] == ".nii"
    assert (target / "imagesTr" / "a_0000.nii").is_symlink()
    assert (target / "labelsTr" / "a.nii").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": (1.5, 1.5, 4)}, r"label_b.nii.gz: has spacing \[1.5, 1.5, 4.0\] mm and image_b"),
        ({"origin": (9, -6, 7)}, "label_b.nii.gz: has origin"),
        ({"dtype": np.float32}, None),
    ],
)
def test_labels_off_the_grid_of_their_image_are_refused(convert, download, change, message):
    sitk.WriteImage(volume(1, label=True, **change), str(download / "label_b.nii.gz"))
    if message is None:
        convert()
        return
    with pytest.raises(DatasetError, match=message):
        convert()


def test_every_bad_case_is_named_and_the_others_are_kept(convert, download, tmp_path):
    whole = (download / "image_a.nii.gz").read_bytes()
    (download / "image_a.nii.gz").write_bytes(whole[: len(whole) // 2])
    sitk.WriteImage(volume(1, label=True) * 5, str(download / "label_b.nii.gz"))
    with pytest.raises(DatasetError, match="2 of 3 cases were not converted") as refused:
        convert()
    assert "image_a.nii.gz: cannot be read" in str(refused.value)
    assert "label_b.nii.gz: holds the value 5, Plain has 0 to 2; correct the file." in str(refused.value)
    target = tmp_path / "raw" / "Dataset601_Plain"
    assert [path.name for path in (target / "imagesTr").iterdir()] == ["c_0000.nii.gz"]
    assert not (target / "dataset.json").exists()
    assert not list(target.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("image", lambda: volume(0, label=False, dtype=np.float32) * float("nan"), "720 voxels are NaN"),
        ("label", lambda: volume(0, label=True) * 0, "nothing is segmented"),
        ("label", lambda: volume(0, label=True)[:-1], r"has shape \[7, 9, 10\] and image_a.nii.gz has \[8, 9, 10\]"),
        ("image", lambda: sitk.JoinSeries([volume(0, label=False)] * 2), r"are not those of one volume"),
    ],
)
def test_unusable_voxels_are_refused(convert, download, kind, make, message):
    sitk.WriteImage(make(), str(download / f"{kind}_a.nii.gz"))
    with pytest.raises(DatasetError, match=message):
        convert()


def test_a_fourth_axis_of_one_is_dropped(convert, download):
    sitk.WriteImage(sitk.JoinSeries([volume(0, label=False)]), str(download / "image_a.nii.gz"))
    target = convert(link=True)
    assert sitk.ReadImage(str(target / "imagesTr" / "a_0000.nii.gz")).GetSize() == SIZE


def test_a_second_call_repeats_only_what_changed(convert, download, monkeypatch):
    target = convert()
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*.nii.gz")}
    sitk.WriteImage(volume(9, label=False), str(download / "image_b.nii.gz"))
    (target / "imagesTr" / "c_0000.nii.gz").unlink()
    called = []
    whole = conversion.convert_case
    monkeypatch.setattr(conversion, "convert_case", lambda case, *rest: called.append(case) or whole(case, *rest))
    convert()
    assert sorted(case.identifier for case in called) == ["b", "c"]
    unchanged = [path for path in before if path.name.startswith("a")]
    assert all(path.stat().st_mtime_ns == before[path] for path in unchanged)
    assert content(target)["conversion"]["cases"]["train"] == 3


def test_an_interrupted_conversion_continues(convert, monkeypatch, tmp_path):
    whole, calls = conversion.convert_case, []

    def interrupted(case, *rest):
        calls.append(case.identifier)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(case, *rest)

    monkeypatch.setattr(conversion, "convert_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert()
    calls.clear()
    calls.extend("..")
    convert()
    assert calls[2:] == ["b", "c"]


def test_a_case_that_changes_its_part_leaves_no_file_behind(convert, download, monkeypatch):
    target = convert()
    (download / "label_a.nii.gz").unlink()
    convert()
    assert not (target / "labelsTr" / "a.nii.gz").exists()
    assert content(target)["numTraining"] == 2


def test_further_images_become_unlabelled_cases(convert, tmp_path):
    extra = tmp_path / "extra"
    (extra / "site 1").mkdir(parents=True)
    sitk.WriteImage(volume(7, label=False), str(extra / "site 1" / "scan.nrrd"))
    target = convert(unlabeled=extra)
    assert [path.name for path in (target / "imagesUn").iterdir()] == ["site_1_scan_0000.nii.gz"]
    assert content(target)["conversion"]["cases"]["unlabeled"] == 1


def test_further_images_must_exist_and_be_new(convert, tmp_path):
    extra = tmp_path / "extra"
    with pytest.raises(UsageError, match="this folder does not exist"):
        convert(unlabeled=extra)
    extra.mkdir()
    with pytest.raises(DatasetError, match="holds no volume"):
        convert(unlabeled=extra)
    sitk.WriteImage(volume(7, label=False), str(extra / "a_0000.nii.gz"))
    with pytest.raises(DatasetError, match="is the same case as"):
        convert(unlabeled=extra)


def test_a_folder_with_another_dataset_is_not_touched(convert, tmp_path):
    foreign = tmp_path / "raw" / "Dataset601_Plain"
    foreign.mkdir(parents=True)
    (foreign / "dataset.json").write_text("{}")
    with pytest.raises(UsageError, match="holds another dataset"):
        convert()
    foreign.rename(foreign.with_name("Dataset601_Other"))
    with pytest.raises(UsageError, match="has the id 601 already"):
        convert()
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["Dataset601_Other"]


def test_another_layout_does_not_mix_with_the_first(convert, monkeypatch):
    convert()

    def renamed(download):
        (layout,), problems = find_layouts(download)
        return [Layout("other files", layout.cases, prepare)], problems

    monkeypatch.setitem(PLAIN.__dict__, "find_layouts", renamed)
    with pytest.raises(UsageError, match=r"was converted from another layout \(plain files\)"):
        convert()


@pytest.mark.parametrize("number", [0, -3])
def test_an_id_that_is_no_positive_number_is_refused(convert, number):
    with pytest.raises(UsageError, match=f"-d {number}: give a positive number, such as 601"):
        convert(dataset_id=number)


def test_a_full_disk_is_noticed_before_anything_is_written(convert, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(LGSSLError, match=r"0.0 GB are free and about 0.0 GB are needed; make room"):
        convert()
    assert {file.suffix for file in (tmp_path / "raw").iterdir()} == {".lock"}
    convert(link=True)


def test_twins_are_reported_and_recorded(convert, download, caplog):
    label = volume(1, label=True)
    random = np.random.default_rng(0)
    nearly = sitk.GetImageFromArray(
        (1.2 * sitk.GetArrayFromImage(volume(1, label=False)) + random.normal(0, 40, SIZE[::-1])).astype(np.int16)
    )
    nearly.CopyInformation(label)
    sitk.WriteImage(nearly, str(download / "image_d.nii.gz"))
    sitk.WriteImage(label, str(download / "label_d.nii.gz"))
    target = convert()
    assert "b and d (equal labels) are probably the same scan." in caplog.text
    assert content(target)["conversion"]["twins"] == ["b and d (equal labels)"]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "a.nii.gz").touch()
    (tmp_path / "disk" / "deep" / "back").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert find_files(tmp_path / "given", "*.nii.gz") == [tmp_path / "given" / "link" / "deep" / "a.nii.gz"]


def test_worker_processes_give_the_same_dataset(convert, tmp_path):
    here, workers = convert(), convert(output=tmp_path / "other", num_processes=2)
    files = sorted(path.relative_to(here) for path in here.rglob("*.nii.gz"))
    assert len(files) == 6
    assert all((here / file).read_bytes() == (workers / file).read_bytes() for file in files)


def test_the_command_passes_its_flags_on(monkeypatch, capsys, tmp_path):
    noted = {}
    monkeypatch.setattr(datasets, "convert_dataset", lambda *a, **k: noted.update(k, args=a) or tmp_path)
    words = "LiTS -i in -o out -d 7 --unlabeled more --link --keep_spacing -np 3 --no_pbar"
    assert main(words.split()) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert noted == {
        "args": ("LiTS", "in"), "output": "out", "dataset_id": 7, "unlabeled": "more", "link": True,
        "keep_spacing": True, "num_processes": 3, "progress": False,
    }  # fmt: skip


def test_unknown_datasets_and_missing_folders_are_refused(capsys, tmp_path):
    assert main(["la", "-i", str(tmp_path / "nowhere"), "-o", str(tmp_path)]) == 2
    assert "this folder does not exist; give the folder of the download" in capsys.readouterr().err
    assert main(["LTS", "-i", str(tmp_path)]) == 2
    assert "There is no converter for LTS; there are LA, Pancreas, BTCV, LiTS. Did you mean" in capsys.readouterr().err
