"""Conversion when something goes wrong: a worker killed, a full disk, a second command, files damaged since."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion import convert as conversion
from lgssl_nnunet.dataset_conversion.dataset import TRAIN, ConvertibleDataset, Layout, PreparedCase, SourceCase
from lgssl_nnunet.dataset_conversion.volumes import read_volume
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.locks import FolderBusyError

DEATHS = "LGSSL_TEST_DEATHS"


def find_layouts(download: Path):
    cases = [SourceCase(file.name.split(".")[0], file, None, TRAIN) for file in sorted(download.glob("*.mha"))]
    return [Layout("plain files", tuple(cases), prepare)], []


def prepare(case, options):
    notes = case.image.with_name("deaths")
    deaths = len(notes.read_text()) if notes.exists() else 0
    if case.identifier == "b" and deaths < int(os.environ.get(DEATHS, 0)):
        notes.write_text("x" * (deaths + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return PreparedCase(read_volume(case.image), None)


PLAIN = ConvertibleDataset(
    key="Plain",
    number=601,
    name="Plain",
    channel="CT",
    derived_channel="CT windowed",
    labels={"background": 0, "liver": 1},
    optional_labels=frozenset(),
    prompts={},
    licence="free.",
    reference="nobody",
    find_layouts=find_layouts,
    download="*.mha",
)


@pytest.fixture
def download(tmp_path: Path) -> Path:
    folder = tmp_path / "download"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        array = np.random.default_rng(seed).integers(-1000, 1000, (10, 9, 8)).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"{name}.mha"))
    return folder


def images(tmp_path: Path) -> list[str]:
    return sorted(file.name[0] for file in (tmp_path / "raw" / "Dataset601_Plain" / "imagesTr").glob("*_0000.nii.gz"))


@pytest.mark.slow
def test_a_worker_killed_once_costs_nothing(convert, tmp_path, monkeypatch):
    monkeypatch.setenv(DEATHS, "1")
    convert(num_processes=2)
    assert images(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / "raw" / "Dataset601_Plain" / "dataset.json").is_file()


@pytest.mark.slow
def test_a_worker_killed_twice_is_named_and_the_others_are_converted(convert, tmp_path, monkeypatch):
    monkeypatch.setenv(DEATHS, "9")
    with pytest.raises(DatasetError, match=r"1 of 3 cases were not converted(.|\n)*  b: .*killed twice"):
        convert(num_processes=2)
    assert images(tmp_path) == ["a", "c"]
    monkeypatch.setenv(DEATHS, "0")
    convert()
    assert images(tmp_path) == ["a", "b", "c"]


def test_a_second_command_is_refused_and_changes_nothing(convert, tmp_path, held_elsewhere, files_below, download):
    convert()
    before = files_below(tmp_path / "raw")
    (download / "a.mha").touch()
    with (
        held_elsewhere(tmp_path / "raw" / ".Dataset601_Plain.conversion.lock"),
        pytest.raises(FolderBusyError, match="Dataset601_Plain: another process is writing there"),
    ):
        convert()
    assert files_below(tmp_path / "raw") == before


@pytest.mark.parametrize("damage", [lambda whole: whole[:-50], lambda whole: whole[:-9] + bytes(9)])
def test_a_damaged_image_is_converted_again(damage, convert, caplog):
    file = convert() / "imagesTr" / "b_0000.nii.gz"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    convert()
    assert file.read_bytes() == whole
    assert "b: imagesTr/b_0000.nii.gz is missing or not as written; converted again." in caplog.text


def test_records_of_the_first_version_are_still_good(convert, monkeypatch):
    target = convert()
    for file in (target / conversion.RECORDS).glob("[abc].json"):
        record = conversion.read_json_if_valid(file)
        conversion.write_json({**record, "files": list(record["files"])}, file)
    monkeypatch.setattr(conversion, "convert_case", lambda *_: pytest.fail("converted again"))
    convert()


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_leaves_no_half_image(size, convert, tmp_path, full_disk, monkeypatch):
    """ITK writes the beginning of a NIfTI file to a full disk and reports no error."""
    write = conversion._write

    def on_full_disk(*arguments):
        with full_disk(size):
            return write(*arguments)

    monkeypatch.setattr(conversion, "_write", on_full_disk)
    with pytest.raises(DatasetError, match="3 of 3 cases were not converted"):
        convert()
    assert list((tmp_path / "raw" / "Dataset601_Plain" / "imagesTr").iterdir()) == []
    monkeypatch.setattr(conversion, "_write", write)
    convert()
    assert images(tmp_path) == ["a", "b", "c"]


def test_what_a_killed_conversion_left_is_removed(convert):
    folder = convert() / "imagesTr"
    (folder / ".b_0000.nii.gz.17.tmp.nii.gz").touch()
    convert()
    assert sorted(file.name for file in folder.iterdir()) == [f"{name}_0000.nii.gz" for name in "abc"]
