"""The page of a report: what it says, what it leaves out and says so, and what it refuses."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from lgssl_nnunet.cli import report as command
from lgssl_nnunet.errors import DatasetError, MissingDependencyError, UsageError
from lgssl_nnunet.evaluation.metrics import POLICY
from lgssl_nnunet.evaluation.report import viewer
from lgssl_nnunet.evaluation.report.report import report
from lgssl_nnunet.evaluation.report.viewer import WITHOUT_VIEWER

sys.path.insert(0, str(Path(__file__).parent))
from report_data import DATASET, MODEL, SHAPE, block, save, write_report_data

NIIVUE = "const Niivue = 1, image = 2;\nexport { Niivue, image as NVImage };\n"
ADDRESSES = {"src", "href", "action", "data", "poster", "srcset"}


class Page(HTMLParser):
    """The text, pictures, scripts and addresses of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.addresses, self.pictures, self.scripts = "", [], {}, {}
        self.hidden, self._script = 0, None
        self.html = file.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ADDRESSES & attributes.keys()]
        if tag == "img":
            self.pictures[attributes["alt"]] = attributes["src"]
        if tag in ("script", "style"):
            self._script = attributes.get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._script = None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text += f" {data} "


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return write_report_data(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def page(blocks, niivue, tmp_path_factory):
    """The report of the predictions with all defaults."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(blocks["raw"].parent))
        return Page(report(blocks["predictions"], output=file, niivue=niivue, num_processes=0))


@pytest.fixture(scope="module")
def niivue(tmp_path_factory):
    file = tmp_path_factory.mktemp("niivue") / "niivue.js"
    file.write_text(NIIVUE)
    return file


@pytest.fixture
def make(blocks, tmp_path, niivue, monkeypatch):
    """Write a report of the predictions (or another folder) and read it."""
    monkeypatch.setenv("nnUNet_raw", str(blocks["raw"].parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "none"))

    def make(source=None, **options):
        options = {"output": tmp_path / "report.html", "niivue": niivue, "num_processes": 0, **options}
        return Page(report(source or blocks["predictions"], **options))

    return make


def test_a_report_tells_where_its_numbers_come_from(page):
    for part in (DATASET, "LGSSLTrainer", "LGSSLPlans_labeled2", "3d_fullres", "15 iterations (3 epochs of 5)"):
        assert part in page.text
    assert "Labelled cases 2 t1, t2" in page.text
    assert "Hyper-parameters 2 values dropout 0.5, modes (1, 2)" in page.text
    assert "Training time, fold all 2 min" in page.text
    assert "lgssl_train 903 3d_fullres LGSSLTrainer -p LGSSLPlans_labeled2 -f all" in page.text
    assert "Versions, prediction python 3.0" in page.text
    assert "Command of this report lgssl_report" in page.text


def test_the_folder_of_the_model_on_this_machine_is_not_told(page, blocks):
    assert str(blocks["model"].parent) not in page.html


def test_the_tables_hold_what_evaluate_measured_and_the_rule_for_empty_masks(page):
    assert " ".join(POLICY.split()) in page.text
    # b: half of the liver is found, Dice 2 * 0.5 / 1.5; c: nothing is found.
    for row in ("a 1 liver 1.0000 1.0000 288 288 measured", "b 1 liver 0.6667 0.5000 288 144 measured"):
        assert row in page.text
    assert "c 1 liver 0.0000 0.0000 288 0 prediction empty" in page.text
    assert "a 2 tumour - - 0 0 both empty" in page.text
    assert "Dice Dice coefficient from 0 to 1" in page.text


def test_results_that_are_given_are_not_measured_again(make, monkeypatch):
    from lgssl_nnunet.evaluation.metrics import class_means, class_result
    from lgssl_nnunet.evaluation.report import report as module

    cases = [class_result("a", "1", "liver", 3, 1, 0)]
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    page = make(results={"cases": cases, "classes": class_means(cases), "means": {"dice": 0.8571}})
    assert "Dice 0.8571 (mean over classes" in page.text


def test_the_worst_cases_come_first_and_then_the_best(make):
    page = make(num_cases=2)
    titles = [part for part in ("c worst 1", "a best 1", "b ") if part in page.text]
    assert titles == ["c worst 1", "a best 1", "b "]
    assert page.text.index("c worst 1") < page.text.index("a best 1")
    assert not any("of b," in alt for alt in page.pictures)


def test_named_cases_are_shown_instead(make):
    page = make(cases=["b"])
    assert {alt.split(",")[0] for alt in page.pictures} == {
        f"{kind} of b" for kind in ("Image", "Reference", "Prediction", "Difference")
    }


def test_pictures_are_in_the_page_and_nothing_else_is_asked_for(page):
    assert page.pictures
    assert [a for a in page.addresses if not a.startswith(("data:", "#"))] == []
    assert "url(http" not in page.html
    assert "@import" not in page.html


def test_missed_voxels_are_drawn_in_their_colour_where_the_prediction_lacks_them(page):
    (url,) = [u for alt, u in page.pictures.items() if alt.startswith("Difference of c, slice 5")]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).astype(int)
    yellow = (picture[..., 0] - picture[..., 2] > 40).mean()
    expected = 8 * 6 / (14 * 12)  # the margin of 20 mm takes the whole slice
    assert yellow == pytest.approx(expected, abs=0.05)


def test_every_loss_term_has_a_chart_in_words_too(page):
    assert "Term: supervised. supervised: 0.5 in epoch 0, -0.125 in epoch 2." in page.html
    for title in ("Loss", "Term: consistency", "Term: weight of consistency", "Pseudo Dice on patches"):
        assert f"<figcaption>{title}</figcaption>" in page.html
    assert page.html.count("<svg") == 6


def test_the_viewer_gets_the_volumes_at_their_place_in_the_patient(make, blocks):
    page = make(cases=["b"])
    settings = json.loads(page.scripts["viewer-settings"])
    assert settings["cases"][0]["layers"] == ["image", "reference", "prediction", "difference"]
    data = gzip.decompress(base64.b64decode(page.scripts["volume-0-2"]))
    seen = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(data))
    written = nibabel.as_closest_canonical(nibabel.load(blocks["predictions"] / "b.nii.gz"))
    np.testing.assert_array_equal(seen.get_fdata(), written.get_fdata())
    np.testing.assert_allclose(seen.affine, written.affine)
    assert "globalThis.niivue = {Niivue: Niivue, NVImage: image};" in page.html


def test_without_niivue_the_slices_stay_and_a_sentence_says_what_is_missing(make, monkeypatch):
    monkeypatch.setattr(viewer, "_installed_widget", lambda: None)
    page = make(niivue=None)
    assert WITHOUT_VIEWER in page.text
    assert page.pictures
    assert "<canvas" not in page.html
    assert '<button type="button" class="open-viewer"' not in page.html


def test_without_references_there_are_slices_but_no_metrics(make, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "none"))
    page = make()
    assert "No references were found, so there are no metrics" in page.text
    assert "No image was found" in page.text
    assert {alt.split(" of ")[0] for alt in page.pictures} == {"Image", "Prediction"}


def test_cases_that_are_on_one_side_only_are_named(make, blocks, tmp_path):
    references = tmp_path / "references"
    for name in ("a", "b", "d"):
        save(references / f"{name}.nii.gz", block(1, slice(2, 8), slice(3, 11), slice(3, 9)))
    page = make(reference=references)
    assert "1 predictions have no reference and no metrics: c." in page.text
    assert "1 references have no prediction and are not counted: d." in page.text


def test_selection_maps_are_drawn_when_they_lie_beside_the_predictions(make, blocks, tmp_path):
    source = tmp_path / "copy"
    source.mkdir()
    for file in blocks["predictions"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    save(source / "selection_maps" / "b__liver.nii.gz", np.linspace(0, 1, np.prod(SHAPE)).reshape(SHAPE))
    page = make(source, cases=["b"])
    assert any(alt.startswith("Liver of b") for alt in page.pictures)
    assert json.loads(page.scripts["viewer-settings"])["cases"][0]["layers"][-1] == "liver"


def test_a_model_without_validation_shows_its_curves_and_says_how_to_see_cases(make, blocks):
    page = make(blocks["model"])
    assert "This model has no cross-validation" in page.text
    assert "Term: consistency" in page.html
    assert page.pictures == {}


def test_a_model_shows_the_validation_cases_of_all_its_folds(make, blocks, tmp_path):
    model = tmp_path / "results" / DATASET / MODEL
    for name, file in (
        ("dataset.json", blocks["raw"] / "dataset.json"),
        ("plans.json", blocks["model"] / "plans.json"),
    ):
        model.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(file.read_bytes())
    for fold, case in enumerate("ab"):
        target = model / f"fold_{fold}" / "validation" / f"{case}.nii.gz"
        target.parent.mkdir(parents=True)
        target.write_bytes((blocks["predictions"] / target.name).read_bytes())
    page = make(model, reference=blocks["raw"] / "labelsTs", images=blocks["raw"] / "imagesTs")
    assert "a 1 liver 1.0000" in page.text
    assert "b 1 liver 0.6667" in page.text
    assert "Folds 0, 1" in page.text


def test_nothing_is_written_beside_the_predictions(page, blocks):
    names = {"a.nii.gz", "b.nii.gz", "c.nii.gz", "dataset.json", "lgssl_prediction.json"}
    assert {file.name for file in blocks["predictions"].iterdir()} == names


def test_names_from_files_cannot_become_markup(make, blocks, tmp_path):
    description = json.loads((blocks["raw"] / "dataset.json").read_text())
    description["labels"] = {"background": 0, "<b>liver</b></script>": 1, "tumour": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    page = make(dataset_json=tmp_path / "dataset.json")
    assert "<b>liver" not in page.html
    assert "<b>liver</b></script>" in page.text


def test_regions_and_ignored_voxels_are_reported(make, blocks, tmp_path):
    description = json.loads((blocks["raw"] / "dataset.json").read_text())
    description["labels"] = {"background": 0, "organ": [1, 2], "tumour": 2, "ignore": 3}
    description["regions_class_order"] = [1, 2]
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    references = tmp_path / "references"
    save(references / "b.nii.gz", block(3, slice(0, 10)))
    page = make(dataset_json=tmp_path / "dataset.json", reference=references, cases=["b"])
    assert "organ + tumour" in page.text
    assert ": 0 differing voxels" in page.text


def test_of_many_classes_only_the_worst_are_named_above_the_slices(make, blocks, tmp_path):
    description = json.loads((blocks["raw"] / "dataset.json").read_text())
    description["labels"] = {"background": 0, **{f"part {label}": label for label in range(1, 9)}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    source, references = tmp_path / "predictions", tmp_path / "references"
    eight = np.zeros(SHAPE, np.uint8)
    eight[:8] = np.arange(1, 9)[:, None, None]
    save(references / "m.nii.gz", eight)
    eight[7] = 0
    eight[6, 5:] = 0
    save(source / "m.nii.gz", eight)
    page = make(source, reference=references, dataset_json=tmp_path / "dataset.json")
    assert "Worst of 8 classes: part 8: Dice 0.0000" in page.text
    assert "part 7: Dice 0.5263" in page.text  # 5 of 14 rows are left: 2 * 5 / (5 + 14)


def test_ct_is_shown_in_the_window_of_soft_tissue(make, blocks, tmp_path):
    save(tmp_path / "hounsfield" / "b_0000.nii.gz", np.linspace(-1000, 1000, np.prod(SHAPE)).reshape(SHAPE))
    assert "CT window: -160 to 240 HU." in make(images=tmp_path / "hounsfield", cases=["b"]).text
    assert "CT window" not in make(cases=["b"]).text  # 100 to 200 cannot be Hounsfield units of a patient in air


def test_plane_images_are_reported(make, tmp_path):
    source, references = tmp_path / "plane", tmp_path / "plane_labels"
    for folder in (source, references):
        folder.mkdir()
        array = np.zeros((20, 16), np.uint8)
        array[5:10, 4:12] = 1
        Image.fromarray(array).save(folder / "p.png")
    labels = {"background": 0, "liver": 1}
    description = {"channel_names": {"0": "photo"}, "labels": labels, "numTraining": 1, "file_ending": ".png"}
    (source / "dataset.json").write_text(json.dumps(description))
    page = make(source, reference=references)
    assert "Slice 1 of 1: 0 differing voxels" in page.text


def test_an_earlier_report_is_replaced_and_another_file_is_not(make, blocks, tmp_path):
    make(blocks["model"])
    make(blocks["model"])
    (tmp_path / "page.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="is no report of lgssl_report"):
        make(output=tmp_path / "page.html")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "missing"}, DatasetError, "missing does not exist"),
        ({"source": "raw"}, DatasetError, "neither a model folder .* nor a folder of predictions"),
        ({"source": "labels"}, DatasetError, "holds no dataset.json, as models and predictions do"),
        ({"source": "fold"}, DatasetError, "fold_all is one fold; give its model folder"),
        ({"reference": "images"}, DatasetError, "-ref .* holds no file of the 3 predicted cases"),
        ({"images": "labels"}, DatasetError, "-i .* holds no file of the 3 predicted cases"),
        ({"images": "missing"}, DatasetError, "missing does not exist"),
        ({"cases": ["z"]}, UsageError, "--cases z: there is no such prediction in .*; choose among a, b, c\\."),
        ({"source": "model", "cases": ["z"]}, UsageError, "there is none at all, so leave --cases out"),
        ({"num_cases": -1}, UsageError, "--num_cases -1"),
        ({"output": "page.txt"}, UsageError, "ends in .html"),
        ({"source": "model", "model_folder": "model"}, UsageError, "leave out -m"),
        ({"dataset_json": "missing"}, DatasetError, "missing"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, blocks, tmp_path, options, error, message):
    places = {
        "missing": tmp_path / "missing",
        "fold": blocks["model"] / "fold_all",
        "images": blocks["raw"] / "imagesTs",
        "labels": blocks["raw"] / "labelsTs",
        **blocks,
    }
    options = {name: places.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(error, match=message) as refusal:
        make(**options)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def copied(blocks, tmp_path):
    """A copy of the predictions that a test may change."""
    return Path(shutil.copytree(blocks["predictions"], tmp_path / "copy"))


def test_a_broken_prediction_is_named_by_its_own_path(make, copied):
    (copied / "b.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=str(copied / "b.nii.gz")):
        make(copied)


def test_a_broken_validation_case_is_named_in_its_own_fold(make, blocks, copied, tmp_path):
    model = Path(shutil.copytree(blocks["model"], tmp_path / "model"))
    for fold, case in enumerate("ab"):
        (model / f"fold_{fold}" / "validation").mkdir(parents=True)
        shutil.copy(copied / f"{case}.nii.gz", model / f"fold_{fold}" / "validation")
    (broken := model / "fold_1" / "validation" / "b.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=f"{broken} cannot be read"):
        make(model, reference=blocks["raw"] / "labelsTs")


@pytest.mark.parametrize("with_references", [True, False])
def test_a_prediction_that_is_cut_off_is_refused(make, blocks, copied, tmp_path, monkeypatch, with_references):
    if not with_references:
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "none"))
    content = (copied / "b.nii.gz").read_bytes()
    (copied / "b.nii.gz").write_bytes(content[:-9])
    with pytest.raises(DatasetError, match=r"copy/b\.nii\.gz cannot be read \(truncated"):
        make(copied)


def test_damaged_records_and_checkpoints_are_told_on_the_page_and_in_the_log(make, blocks, tmp_path, caplog):
    model = Path(shutil.copytree(blocks["model"], tmp_path / "model"))
    fold = model / "fold_all"
    with zipfile.ZipFile(fold / "checkpoint_best.pth", "w") as checkpoint:
        checkpoint.writestr("archive/data.pkl", "weights")
    whole = (fold / "checkpoint_best.pth").read_bytes()
    (fold / "checkpoint_final.pth").write_bytes(whole[: len(whole) // 2])
    (fold / "debug.json").write_text("{")
    page = make(model)
    assert "could not be read: fold_all/debug.json, fold_all/checkpoint_final.pth; copy it again" in page.text
    assert f"{fold / 'checkpoint_final.pth'} is damaged" in caplog.text
    assert "checkpoint_best" not in page.text + caplog.text


def test_a_damaged_record_of_a_prediction_is_told(make, copied):
    (copied / "lgssl_prediction.json").write_text("{")
    assert "could not be read: copy/lgssl_prediction.json" in make(copied).text


def test_a_file_that_is_no_niivue_is_refused(make, tmp_path):
    (tmp_path / "other.js").write_text("export { other };")
    with pytest.raises(MissingDependencyError, match="no self-contained build of NiiVue"):
        make(niivue=tmp_path / "other.js")


def test_the_command_writes_the_file_and_says_where(blocks, tmp_path, niivue, capsys):
    file = tmp_path / "page.html"
    arguments = [str(blocks["predictions"]), "-o", str(file), "-np", "0", "--num_cases", "1", "--niivue", str(niivue)]
    assert command.main([*arguments, "--raw", str(blocks["raw"].parent)]) == 0
    assert "a 1 liver 1.0000" in Page(file).text
    assert str(file) in capsys.readouterr().err


def test_a_report_in_a_folder_that_does_not_exist_is_refused_before_any_work(make, tmp_path, monkeypatch):
    from lgssl_nnunet.evaluation.report import report as module

    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist; create it or name another"):
        make(output=tmp_path / "nowhere" / "page.html")
    assert not (tmp_path / "nowhere").exists()


def test_the_command_refuses_with_status_two(tmp_path, capsys):
    assert command.main([str(tmp_path / "missing")]) == 2
    assert "does not exist" in capsys.readouterr().err
