"""Labels of unlabelled cases are never opened: not by planning, not by preprocessing, not by training."""

from __future__ import annotations

import gzip
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from lgssl_nnunet.data.unlabeled import UnlabeledDataset
from lgssl_nnunet.registry import trainer_names

GRID = [*trainer_names(), "ExampleTeacherTrainer"]
LABELED = [f"labeled_00{number}" for number in range(3)]
LEFT_OUT = [f"labeled_00{number}" for number in range(3, 6)]


def leave(file: Path) -> None:
    pass


def write_garbage(file: Path) -> None:
    file.write_bytes(b"no image at all")


def write_other_labels(file: Path) -> None:
    """A readable file whose labels, shape and geometry are wrong."""
    sitk.WriteImage(sitk.GetImageFromArray(np.full((5, 6, 7), 99, np.uint8)), str(file))


def truncate(file: Path) -> None:
    file.write_bytes(gzip.compress(b"\0" * 400)[:-9])


POISONS: dict[str, Callable[[Path], None]] = {
    "garbage": write_garbage,
    "other labels": write_other_labels,
    "truncated": truncate,
    "deleted": Path.unlink,
}
_recording: list[list[str]] = []


def _record(event: str, arguments: tuple) -> None:
    if event == "open" and _recording and isinstance(arguments[0], (str, bytes, Path)):
        _recording[-1].append(str(arguments[0]))


sys.addaudithook(_record)


@contextmanager
def recorded_openings() -> Iterator[list[str]]:
    """Record every file that Python, SimpleITK, blosc2 or nnU-Net's reader opens in the block."""
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: object, function: str, position: int = 0, keyword: str = "") -> None:
            original = getattr(owner, function)

            def watched(*args, **kwargs):
                named = kwargs[keyword] if keyword in kwargs else args[position] if len(args) > position else None
                opened.extend(map(str, named if isinstance(named, (list, tuple)) else [named]))
                return original(*args, **kwargs)

            patch.setattr(owner, function, watched)

        watch(sitk, "ReadImage", 0, "fileName")
        watch(sitk.ImageFileReader, "SetFileName", 1, "fn")
        watch(blosc2, "open", 0, "urlpath")
        watch(SimpleITKIO, "read_images", 1, "image_fnames")
        watch(SimpleITKIO, "read_seg", 1, "seg_fname")
        _recording.append(opened)
        try:
            yield opened
        finally:
            _recording.pop()


def plan_with_left_out_labels(root: Path, treat: Callable[[Path], None], new_phantom, plan_phantom):
    """Plan with three of six labelled cases after something was done to the labels of the other three."""
    raw = new_phantom(root)
    for case in LEFT_OUT:
        treat(raw / "labelsTr" / f"{case}.nii.gz")
    cases = root / "three.txt"
    cases.write_text("\n".join(LABELED))
    return plan_phantom(root, raw.name, labeled_list=cases)


def content(folder: Path) -> dict[str, str]:
    """Hash of every file, manifests excepted: these hold paths and times."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "manifest" not in file.name
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory, new_phantom, plan_phantom):
    """The dataset with intact labels, and every file that planning and preprocessing opened."""
    with recorded_openings() as opened:
        dataset = plan_with_left_out_labels(tmp_path_factory.mktemp("clean"), leave, new_phantom, plan_phantom)
    return dataset, opened


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, new_phantom, plan_phantom):
    made = {}

    def get(poison: str):
        if poison not in made:
            root = tmp_path_factory.mktemp("poisoned")
            made[poison] = plan_with_left_out_labels(root, POISONS[poison], new_phantom, plan_phantom)
        return made[poison]

    return get


@pytest.fixture(scope="module")
def three_iterations(build):
    """Everything that three iterations leave behind: terms, weights, optimiser, teacher."""
    made = {}

    def get(name, dataset):
        if (name, dataset) not in made:
            trainer = build(name, dataset=dataset)
            trainer.on_train_start()
            trainer.on_train_epoch_start()
            values = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(3)]
            parts = [trainer.network, trainer.optimizer, *trainer._stateful_parts().values()]
            made[name, dataset] = (values, [part.state_dict() for part in parts])
        return made[name, dataset]

    return get


@pytest.fixture(scope="module")
def planned_with_all_labels_first(tmp_path_factory, new_phantom, plan_phantom):
    """What a user has who first plans with six labels and then with three, and the same with the stale files spoilt.

    Gives the two datasets and the spoilt files: labels and everything preprocessed with the labels that are left out.
    """
    root = tmp_path_factory.mktemp("all_first")
    raw = new_phantom(root)
    complete = plan_phantom(root, raw.name, configurations=("3d_fullres",))
    intact = plan_phantom(root, raw.name, configurations=("3d_fullres",), labeled=3)
    spoilt = intact.copied_to(tmp_path_factory.mktemp("spoilt"))
    left_out = set(complete.plans()["lgssl"]["split"]["labeled"]) - set(intact.plans()["lgssl"]["split"]["labeled"])
    folders = (
        spoilt.raw / "labelsTr",
        spoilt.preprocessed / "gt_segmentations",
        spoilt.preprocessed / complete.plans()["configurations"]["3d_fullres"]["data_identifier"],
    )
    stale = [file for folder in folders for file in sorted(folder.iterdir()) if file.name.split(".")[0] in left_out]
    stale += [folders[2] / f"{case}_seg.b2nd" for case in left_out]
    for file in stale:
        write_garbage(file)
    return intact, spoilt, stale


def test_left_out_cases_are_unlabeled_cases(clean):
    split = clean[0].plans()["lgssl"]["split"]
    assert split["labeled"] == LABELED
    assert set(LEFT_OUT) < set(split["unlabeled"])


@pytest.mark.parametrize("poison", POISONS)
def test_plans_and_preprocessed_cases_do_not_change_with_the_labels_of_unlabeled_cases(poison, clean, poisoned):
    expected, found = content(clean[0].preprocessed), content(poisoned(poison).preprocessed)
    assert {"LGSSLCPUPlans_three.json", "dataset_fingerprint_LGSSLCPUPlans_three.json"} < expected.keys()
    assert {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)} == set()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", GRID)
def test_three_iterations_do_not_change_with_the_labels_of_unlabeled_cases(
    name, poison, clean, poisoned, three_iterations, same
):
    assert same(three_iterations(name, clean[0]), three_iterations(name, poisoned(poison)))


@pytest.mark.parametrize("name", GRID)
def test_three_iterations_neither_open_nor_feel_what_was_preprocessed_with_more_labels(
    name, planned_with_all_labels_first, three_iterations, same
):
    intact, spoilt, stale = planned_with_all_labels_first
    with recorded_openings() as opened:
        found = three_iterations(name, spoilt)
    assert same(three_iterations(name, intact), found)
    opened_files = {Path(file).resolve() for file in opened}
    assert len(stale) == 3 * 5  # label and its copy; image, segmentation and properties as preprocessed
    assert not opened_files & {file.resolve() for file in stale}
    labeled = spoilt.plans()["lgssl"]["split"]["labeled"]
    assert {f"{case}_seg.b2nd" for case in labeled} >= {f.name for f in opened_files if f.name.endswith("_seg.b2nd")}
    assert any(file.name.endswith("_seg.b2nd") for file in opened_files)  # the recording works


def test_planning_opens_labels_of_labeled_cases_only(clean):
    opened = clean[1]
    labels = {Path(file).name.removesuffix(".nii.gz") for file in opened if Path(file).parent.name == "labelsTr"}
    assert labels == set(LABELED)  # also shows that the recording works


@pytest.mark.parametrize("name", GRID)
def test_training_opens_segmentations_of_labeled_cases_only(name, clean, build):
    with recorded_openings() as opened:
        trainer = build(name, dataset=clean[0], epochs=1, iterations=8)
        trainer.run_training()
    segmentations = {Path(file).name for file in opened if file.endswith("_seg.b2nd")}
    assert segmentations == {f"{case}_seg.b2nd" for case in LABELED}
    assert not [file for file in opened if Path(file).parent.name in ("labelsTr", "gt_segmentations")]


def test_nothing_preprocessed_holds_a_label_of_an_unlabeled_case(clean):
    files = [str(file) for file in clean[0].preprocessed.rglob("*") if file.is_file()]
    unlabeled = clean[0].plans()["lgssl"]["split"]["unlabeled"]
    of_unlabeled = [file for file in files if any(case in Path(file).name for case in unlabeled)]
    assert of_unlabeled
    assert {Path(file).parent.name for file in of_unlabeled} == {
        "LGSSLCPUPlans_three_3d_fullres_unlabeled",
        "LGSSLCPUPlans_three_2d_unlabeled",
    }
    assert not [file for file in of_unlabeled if file.endswith("_seg.b2nd")]


def test_a_segmentation_smuggled_into_the_unlabeled_folder_is_not_opened(clean, tmp_path):
    dataset = clean[0].copied_to(tmp_path)
    folder = dataset.preprocessed / "LGSSLCPUPlans_three_3d_fullres_unlabeled"
    case = LEFT_OUT[0]
    (folder / f"{case}_seg.b2nd").write_bytes(b"smuggled")
    with recorded_openings() as opened:
        _, segmentation, _, properties = UnlabeledDataset(str(folder), [case]).load_case(case)
    assert not [file for file in opened if file.endswith("_seg.b2nd")]
    assert set(np.unique(segmentation)) == {-1}
    assert properties["class_locations"] is None
