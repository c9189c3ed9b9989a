"""Planning when something goes wrong: a worker killed, a full disk, a second command, files damaged since."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.locks import FolderBusyError
from lgssl_nnunet.plans import preprocessing
from lgssl_nnunet.plans.preprocessing import unprepared_cases

DEATHS = "LGSSL_TEST_DEATHS"
PREPROCESS = preprocessing.preprocess_case


def deadly_preprocess_case(case, folders, *rest):
    notes = folders.manifest.with_name("deaths")
    deaths = len(notes.read_text()) if notes.exists() else 0
    if case.identifier == "lab_01" and deaths < int(os.environ[DEATHS]):
        notes.write_text("x" * (deaths + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return PREPROCESS(case, folders, *rest)


@pytest.fixture
def preprocessed(data_root):
    return data_root / "nnUNet_preprocessed" / "Dataset901_Tiny"


@pytest.fixture
def redone(monkeypatch):
    """The cases that were preprocessed, in order."""
    names = []
    monkeypatch.setattr(
        preprocessing, "preprocess_case", lambda case, *rest: names.append(case.identifier) or PREPROCESS(case, *rest)
    )
    return names


def cases_in(preprocessed) -> list[str]:
    return sorted(file.stem for file in (preprocessed / "LGSSLCPUPlans_3d_fullres").glob("*.pkl"))


@pytest.mark.slow
def test_a_worker_killed_once_costs_nothing(raw_dataset, plan_tiny, preprocessed, monkeypatch, caplog):
    raw_dataset(labeled=3, unlabeled=0, in_images_un=0)
    monkeypatch.setattr(preprocessing, "preprocess_case", deadly_preprocess_case)
    monkeypatch.setenv(DEATHS, "1")
    plan_tiny(num_processes=2)
    assert cases_in(preprocessed) == ["lab_00", "lab_01", "lab_02"]
    assert "lab_01: its worker process was killed" in caplog.text


@pytest.mark.slow
def test_a_worker_killed_twice_is_named_and_the_others_are_kept(
    raw_dataset, plan_tiny, preprocessed, monkeypatch, redone
):
    raw_dataset(labeled=3, unlabeled=0, in_images_un=0)
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "preprocess_case", deadly_preprocess_case)
        patch.setenv(DEATHS, "9")
        with pytest.raises(DatasetError, match=r"has 1 problem:\n  lab_01: .*killed twice"):
            plan_tiny(num_processes=2)
    assert cases_in(preprocessed) == ["lab_00", "lab_02"]
    plan_tiny()
    assert redone == ["lab_01"]


def test_a_second_command_is_refused_and_changes_nothing(
    raw_dataset, plan_tiny, data_root, held_elsewhere, files_below
):
    raw_dataset(labeled=2, unlabeled=0)
    plan_tiny()
    folder = data_root / "nnUNet_preprocessed"
    before = files_below(folder)
    with (
        held_elsewhere(folder / ".Dataset901_Tiny.planning.lock"),
        pytest.raises(FolderBusyError, match="Dataset901_Tiny: another process is writing there"),
    ):
        plan_tiny(clean=True)
    assert files_below(folder) == before


@pytest.mark.parametrize("suffix", [".b2nd", "_seg.b2nd", ".pkl"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])])
def test_damaged_files_are_made_again(damage, suffix, raw_dataset, plan_tiny, preprocessed, redone, caplog):
    raw_dataset(labeled=2, unlabeled=0, in_images_un=0)
    plans = json.loads(plan_tiny().read_text())
    file = preprocessed / "LGSSLCPUPlans_3d_fullres" / f"lab_01{suffix}"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    cut_off = file.stat().st_size < len(whole)
    dataset_json = json.loads((preprocessed / "dataset.json").read_text())
    assert unprepared_cases(preprocessed, plans, "3d_fullres", dataset_json) == (["lab_01"] if cut_off else [])
    redone.clear()
    plan_tiny()
    assert redone == ["lab_01"]
    assert file.read_bytes() == whole
    assert f"lab_01: {file.name} is missing or not as written; preprocessed again." in caplog.text


def test_a_copied_dataset_and_a_manifest_of_the_first_version_are_still_good(
    raw_dataset, plan_tiny, preprocessed, redone
):
    raw_dataset(labeled=2, unlabeled=1, in_images_un=0)
    plan_tiny()
    redone.clear()
    for file in (preprocessed / "LGSSLCPUPlans_3d_fullres").iterdir():
        os.utime(file)
    plan_tiny()
    manifest = preprocessed / "LGSSLCPUPlans_3d_fullres.manifest.json"
    entries = json.loads(manifest.read_text())
    assert all(entry.pop("files") for entry in entries.values())
    manifest.write_text(json.dumps(entries))
    plan_tiny()
    assert redone == []


@pytest.mark.parametrize("size", [0, 1000, 3000])
def test_a_full_disk_leaves_no_half_case(size, raw_dataset, plan_tiny, preprocessed, full_disk, monkeypatch, caplog):
    raw_dataset(labeled=2, unlabeled=1, in_images_un=0)

    def on_full_disk(*arguments):
        with full_disk(size):
            return PREPROCESS(*arguments)

    monkeypatch.setattr(preprocessing, "preprocess_case", on_full_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(DatasetError, match="has 3 problems"):
        plan_tiny()
    assert "only 0 MB are free on this disk" in caplog.text
    for folder in ("LGSSLCPUPlans_3d_fullres", "LGSSLCPUPlans_3d_fullres_unlabeled"):
        assert list((preprocessed / folder).iterdir()) == []
    monkeypatch.setattr(preprocessing, "preprocess_case", PREPROCESS)
    plan_tiny()
    assert cases_in(preprocessed) == ["lab_00", "lab_01"]


def test_files_of_a_failed_case_make_room_before_the_manifest_is_written(
    raw_dataset, plan_tiny, preprocessed, monkeypatch
):
    """On a full disk the manifest, and with it what is done, would be lost otherwise."""
    raw_dataset(labeled=2, unlabeled=0, in_images_un=0)
    unfinished = preprocessed / "LGSSLCPUPlans_3d_fullres.unfinished"
    write_json, seen = preprocessing.write_json, []

    def fail(targets):
        assert all(file.stat().st_size for file in targets)
        raise OSError("full")

    monkeypatch.setattr(preprocessing, "move_into_place", fail)
    monkeypatch.setattr(
        preprocessing, "write_json", lambda *a: seen.append(list(unfinished.glob("*"))) or write_json(*a)
    )
    with pytest.raises(DatasetError, match="has 2 problems"):
        plan_tiny()
    assert seen == [[], []]
    assert not unfinished.exists()
