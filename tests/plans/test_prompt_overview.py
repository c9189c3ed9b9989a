from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import lgssl_nnunet
from lgssl_nnunet.errors import DatasetError, PromptError, UsageError
from lgssl_nnunet.plans.prompt_overview import draw_cosines, format_overview, prompts

KIDNEYS = {"background": 0, "left kidney": 1, "right kidney": 2, "postcava": 3}


@pytest.fixture
def describe(data_root):
    """Write a dataset.json, without any image."""

    def write(labels=KIDNEYS, channel="CT", **more):
        folder = data_root / "nnUNet_raw" / "Dataset901_Tiny"
        folder.mkdir(exist_ok=True)
        content = {"channel_names": {"0": channel}, "labels": labels, "file_ending": ".nii.gz", **more}
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return write


def all_files(root):
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_overview_names_prompts_sources_and_what_is_hardly_told_apart(describe, caplog):
    describe()
    overview = prompts(901)
    assert (overview.dataset, overview.encoder) == ("Dataset901_Tiny", "bank (all-MiniLM-L6-v2)")
    assert overview.classes == list(KIDNEYS)
    assert [texts[0].source for texts in overview.texts] == [*["bank, by sentence"] * 3, "bank, by synonym"]
    assert overview.texts[3][0].sentence == "A computerized tomography of an inferior vena cava"
    assert overview.templates == ("A computerized tomography of {}",)
    (pair,) = overview.similar
    assert (pair.first, pair.second, round(pair.cosine, 3)) == ("left kidney", "right kidney", 0.971)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "left kidney and right kidney (0.971)" in warning
    assert "--prompts FILE" in warning


def test_overview_is_that_of_the_plans(raw_dataset, plan_tiny, tmp_path):
    raw_dataset(labeled=2)
    (tmp_path / "prompts.json").write_text(json.dumps({"liver": ["liver", "pancreas"]}))
    options = {"prompts": tmp_path / "prompts.json", "ensemble_prompts": True}
    overview = prompts(901, **options)
    text = json.loads(plan_tiny(preprocess=False, **options).read_text())["lgssl"]["text"]
    assert text["prompts"] == [texts[0].sentence for texts in overview.texts]
    assert text["templates"] == list(overview.templates)
    assert (text["encoder"], text["sha256"]) == (overview.encoder, overview.sha256)
    vectors = np.asarray(text["embeddings"])
    np.testing.assert_allclose(vectors @ vectors.T, overview.cosines, atol=1e-5)


def test_nothing_is_written_but_the_plot(describe, data_root, tmp_path_factory):
    describe()
    before = all_files(data_root)
    plot = tmp_path_factory.mktemp("plot") / "new" / "cosines.png"
    prompts("Dataset901_Tiny", output=plot)
    assert all_files(data_root) == before
    assert [file.name for file in plot.parent.iterdir()] == ["cosines.png"]
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_threshold_decides_what_is_warned_of(describe, caplog):
    describe()
    assert prompts(901, threshold=0.98).similar == []
    assert not caplog.records
    assert len(prompts(901, threshold=-1).similar) == 6
    assert "and 3 more pairs" in caplog.text


def test_text_lists_everything(describe):
    describe(prompts={"postcava": ["postcava", "aorta"]})
    lines = format_overview(prompts(901)).splitlines()
    assert lines[0] == "Dataset   Dataset901_Tiny"
    position = lines.index("Prompts")
    assert lines[position + 4 : position + 6] == [
        "  4 postcava      bank, by synonym   A computerized tomography of an inferior vena cava",
        "                  bank, by sentence  A computerized tomography of an aorta",
    ]
    matrix = lines[lines.index("Cosines of the classes") + 1 :]
    assert matrix[0].split() == ["1", "2", "3", "4"]
    assert matrix[2].split() == ["2", "left", "kidney", "0.555", "1.000", "0.971", matrix[2].split()[-1]]
    assert lines[-2:] == ["Hardly told apart (cosine above 0.94)", "  left kidney and right kidney (0.971)"]


def test_text_says_where_nothing_is_close(describe):
    describe({"background": 0, "liver": 1})
    assert format_overview(prompts(901)).endswith("(cosine above 0.94)\n  none")


def test_columns_of_ten_classes_stay_below_each_other(describe):
    names = ["background", *(f"T{number}" for number in range(1, 11))]
    describe({name: value for value, name in enumerate(names)})
    lines = format_overview(prompts(901)).splitlines()
    matrix = lines[lines.index("Cosines of the classes") + 1 :][: len(names) + 1]
    assert len({len(line) for line in matrix}) == 1


def test_plot_frames_the_close_pairs_and_names_every_class(describe):
    describe()
    axes, _ = draw_cosines(prompts(901)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(KIDNEYS)
    assert {tuple(frame.get_xy()) for frame in axes.patches} == {(1.5, 0.5), (0.5, 1.5)}
    assert len(axes.texts) == 16


def test_plot_of_many_classes_has_colours_alone(describe):
    vertebrae = [f"{letter}{number}" for letter, count in (("C", 7), ("T", 12), ("L", 5)) for number in range(1, count)]
    describe({name: value for value, name in enumerate(["background", *vertebrae])})
    axes, _ = draw_cosines(prompts(901)).axes
    assert len(axes.texts) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "plot.pdf"}, UsageError, r"-o plot\.pdf: the plot is a PNG"),
        ({"threshold": 2}, UsageError, r"--threshold 2: give a cosine"),
        ({"text_encoder": "file:none.npz"}, PromptError, r"none\.npz does not exist"),
        ({"prompts": "none.json"}, PromptError, r"none\.json cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_refused(describe, options, error, message):
    describe()
    with pytest.raises(error, match=message):
        prompts(901, **options)


def test_damaged_dataset_json_is_refused(describe):
    (describe() / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        prompts(901)
    shutil.rmtree(describe())
    with pytest.raises(UsageError, match="No dataset 901"):
        prompts(901)


def test_package_exports_the_function():
    assert lgssl_nnunet.prompts is prompts


def test_bank_needs_neither_torch_nor_nnunet(describe):
    describe()
    code = (
        "import sys, lgssl_nnunet; lgssl_nnunet.prompts(901);"
        "heavy = {'torch', 'transformers', 'open_clip', 'nnunetv2', 'matplotlib', 'SimpleITK'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


def test_names_that_look_like_formulas_are_drawn_as_they_stand(describe, tmp_path):
    names = {"liver $x$_{ $": "liver", r"$\foo$": "spleen"}
    describe({"background": 0, **{name: value for value, name in enumerate(names, 1)}}, prompts=names)
    overview = prompts(901, output=tmp_path / "cosines.png")
    axes, _ = draw_cosines(overview).axes
    for labels in (axes.get_xticklabels(), axes.get_yticklabels(), [axes.title]):
        assert not any(label.get_parse_math() for label in labels)


def test_characters_that_the_font_lacks_are_told_in_one_sentence(describe, tmp_path, caplog, recwarn):
    describe({"background": 0, "肝臓": 1, "脾臓": 2}, prompts={"肝臓": "liver", "脾臓": "spleen"})
    prompts(901, output=tmp_path / "cosines.png")
    (told,) = [record.getMessage() for record in caplog.records if "font" in record.getMessage()]
    assert told.startswith("cosines.png: ")
    assert all(character in told for character in "肝臓脾")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
