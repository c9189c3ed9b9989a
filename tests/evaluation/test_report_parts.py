"""The parts of a report on their own: volumes, slices, NiiVue's script, packing, curves, tables."""

from __future__ import annotations

import base64
import gzip
import math
from dataclasses import dataclass
from urllib.parse import quote

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from lgssl_nnunet.errors import MissingDependencyError
from lgssl_nnunet.evaluation.metrics import class_result
from lgssl_nnunet.evaluation.report import viewer
from lgssl_nnunet.evaluation.report.curves import Chart, charts, draw, read_training_log
from lgssl_nnunet.evaluation.report.overlays import (
    CLASS_COLORS,
    choose_slices,
    color_indices,
    difference_map,
    draw_case,
)
from lgssl_nnunet.evaluation.report.page import label_colors
from lgssl_nnunet.evaluation.report.tables import heading, rank_cases, results_table, worst_and_best
from lgssl_nnunet.evaluation.report.viewer import niivue_script, pack_case
from lgssl_nnunet.evaluation.report.volumes import (
    Volume,
    box_around,
    coarsened,
    cropped,
    nifti_bytes,
    read_volume,
    windowed,
)

MODULE = "const N = 1, V = 2;\nexport {\n  N as Niivue,\n  V as NVImage\n};\n//# sourceMappingURL=index.js.map"
GLOBAL = "globalThis.niivue = {Niivue: N, NVImage: V};"


def volume(voxels, spacing=(1.0, 1.0, 1.0), oriented=True):
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    return Volume(np.asarray(voxels), spacing, affine, oriented)


def test_a_volume_is_turned_so_that_it_runs_to_left_back_and_head(tmp_path):
    """A file whose first axis runs to the head, second to the right, third to the front."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # file axes in reverse: front 2, right 3, head 4
    image = sitk.GetImageFromArray(array)
    image.SetDirection((0, -1, 0, 0, 0, -1, 1, 0, 0))
    image.SetSpacing((3.0, 2.0, 1.0))
    sitk.WriteImage(image, str(tmp_path / "turned.nii.gz"))
    read = read_volume(tmp_path / "turned.nii.gz", SimpleITKIO)
    expected = array.transpose(2, 0, 1)[:, ::-1, ::-1]
    np.testing.assert_array_equal(read.voxels, expected)
    assert read.spacing == pytest.approx((3.0, 1.0, 2.0))
    nifti = nibabel.as_closest_canonical(nibabel.load(tmp_path / "turned.nii.gz"))
    again = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(gzip.decompress(nifti_bytes(read))))
    np.testing.assert_array_equal(again.get_fdata(), nifti.get_fdata())
    np.testing.assert_allclose(again.affine, nifti.affine, atol=1e-5)


def test_windowing_cuts_the_extremes_and_stands_constant_and_missing_values():
    ramp = np.arange(1001, dtype=np.float64).reshape(1, 7, 143)
    window = windowed(volume(ramp)).voxels
    assert (window.min(), window.max()) == (0, 255)
    assert window.ravel()[500] == 127
    assert windowed(volume(np.full((2, 2, 2), 7.0))).voxels.tolist() == np.zeros((2, 2, 2)).tolist()
    assert windowed(volume(np.full((2, 2, 2), np.nan))).voxels.max() == 0


def test_a_named_window_is_kept_to():
    values = np.array([[[-1000.0, -160.0, 40.0, 240.0, 3000.0]]])
    assert windowed(volume(values), (-160, 240)).voxels.ravel().tolist() == [0, 0, 127, 255, 255]


def test_the_viewer_gets_numbers_of_colours_so_that_its_table_is_short():
    labels = volume(np.array([[[0, 1, 7, 8, 117]]], dtype=np.uint8))
    assert color_indices(labels).voxels.ravel().tolist() == [0, 1, 7, 1, 5]
    table = label_colors(CLASS_COLORS)
    assert [table[channel][1] for channel in "RGBAI"] == [0xE6, 0x9F, 0x00, 255, 1]
    assert (table["A"][0], len(table["R"])) == (0, 8)


def test_the_box_keeps_a_margin_in_millimetres_and_stays_inside():
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[10, 1, 15] = True
    assert box_around(mask, (4.0, 1.0, 1.0), margin=8) == (slice(8, 13), slice(0, 10), slice(7, 20))
    assert box_around(np.zeros((2, 3, 4), dtype=bool), (1, 1, 1)) == (slice(0, 2), slice(0, 3), slice(0, 4))


def test_cropping_and_thinning_leave_voxels_at_their_place():
    whole = volume(np.arange(8 * 6 * 4).reshape(8, 6, 4), (2.0, 1.0, 0.5))
    part = coarsened(cropped(whole, (slice(2, 8), slice(1, 6), slice(1, 4))), (2, 1, 2))
    index = (1, 3, 1)  # Z, Y, X in the part: 2 + 2, 1 + 3, 1 + 2 in the whole
    assert part.voxels[index] == whole.voxels[4, 4, 3]
    np.testing.assert_allclose(part.affine @ [1, 3, 1, 1], whole.affine @ [3, 4, 4, 1])
    assert part.spacing == (4.0, 1.0, 1.0)


def test_differences_are_missed_surplus_or_of_another_class():
    reference, prediction = np.array([0, 1, 0, 1, 2, 3]), np.array([0, 0, 2, 1, 1, 0])
    assert difference_map(reference, prediction).tolist() == [0, 1, 2, 0, 3, 1]
    assert difference_map(reference, prediction, ignored=3).tolist() == [0, 1, 2, 0, 3, 0]


def test_the_slice_with_most_errors_is_shown_first_and_always_among_the_chosen():
    reference, prediction = np.zeros((40, 8, 8), int), np.zeros((40, 8, 8), int)
    reference[5:35] = prediction[5:35] = 1
    prediction[17] = 0
    prediction[20, 0] = 0
    chosen, start = choose_slices(prediction, reference, difference_map(reference, prediction), limit=4)
    assert start == 17
    assert start in chosen
    assert (len(chosen), chosen[0], chosen[-1]) == (4, 4, 35)


def test_without_errors_the_slice_with_most_foreground_is_shown_first():
    labels = np.zeros((9, 4, 4), int)
    labels[3, :2], labels[5] = 1, 1
    assert choose_slices(labels, labels, np.zeros_like(labels))[1] == 5
    assert choose_slices(np.zeros((9, 4, 4), int), None, None) == (list(range(9)), 4)


def test_slices_lie_across_the_coarsest_axis_with_the_letters_of_the_patient():
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[2:4, 2:5, 2:6] = 1
    axial = draw_case(None, volume(labels, (3.0, 1.0, 1.0)), volume(labels, (3.0, 1.0, 1.0)), {})
    assert (axial.plane, axial.edges, axial.total) == ("axial", ("R", "L", "A", "P"), 6)
    sagittal = draw_case(None, None, volume(labels, (1.0, 1.0, 3.0)), {})
    assert (sagittal.plane, sagittal.edges, sagittal.total) == ("sagittal", ("A", "P", "S", "I"), 8)
    unknown = draw_case(None, None, volume(labels, (3.0, 1.0, 1.0), oriented=False), {})
    assert (unknown.plane, unknown.edges) == ("", ("", "", "", ""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(function(e,t){e.niivue={}})(this)", "(function(e,t){e.niivue={}})(this)"),
        (MODULE, GLOBAL),
        (f'var widget = "{quote(MODULE)}"; export default widget;', GLOBAL),
    ],
    ids=["umd", "module", "module held in a string"],
)
def test_each_build_of_niivue_becomes_a_script_that_sets_a_global(tmp_path, text, expected):
    (tmp_path / "niivue.js").write_text(text)
    assert expected in niivue_script(tmp_path / "niivue.js")


@pytest.mark.parametrize(
    "text", ["", "export { Niivue };", 'import { a } from "gl-matrix";\n' + MODULE, "export default 1;"]
)
def test_builds_that_cannot_stand_alone_are_refused(tmp_path, text):
    (tmp_path / "niivue.js").write_text(text)
    with pytest.raises(MissingDependencyError, match=r"take dist/niivue\.umd\.js"):
        niivue_script(tmp_path / "niivue.js")


def test_a_script_cannot_end_the_element_that_holds_it(tmp_path):
    (tmp_path / "niivue.js").write_text('const a = "</script><!-- </SCRIPT>";\n' + MODULE)
    script = niivue_script(tmp_path / "niivue.js")
    assert "<" not in script.partition("\n")[0]
    assert script.startswith(r'const a = "\x3c/script>\x3c!-- \x3c/SCRIPT>";')


def test_an_installed_widget_without_niivue_leaves_the_viewer_out_and_warns(tmp_path, monkeypatch, caplog):
    (tmp_path / "widget.js").write_text("export default 1;")
    monkeypatch.setattr(viewer, "_installed_widget", lambda: tmp_path / "widget.js")
    assert niivue_script() is None
    assert "written without the viewer" in caplog.text


def test_the_installed_ipyniivue_holds_a_niivue():
    pytest.importorskip("ipyniivue", reason="needs ipyniivue (extra viewer)")
    script = niivue_script()
    assert "globalThis.niivue = {Niivue: " in script
    assert len(script) < 4e6


def test_small_volumes_go_into_the_page_as_they_are():
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[3:6, 4:6, 5:8] = 2
    packed = pack_case("a", None, {"prediction": volume(labels)}, {}, limit=10_000)
    seen = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed.layers["prediction"])))
    np.testing.assert_array_equal(np.asarray(seen.dataobj).transpose(2, 1, 0), labels)
    assert packed.remark == ""
    # The middle is at x 6.5, y 5, z 4.5 voxels; NiiVue counts to the right and to the front.
    assert packed.center == pytest.approx((0.35, 1 - 5 / 9, 4.5 / 8))


def test_large_volumes_are_cropped_and_then_thinned_until_they_fit():
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 80)).astype(np.uint8)
    labels = np.zeros_like(noise)
    labels[38:42, 38:42, 38:42] = 1
    layers = {"prediction": volume(labels, (2.0, 1.0, 1.0))}
    cropping = pack_case("a", volume(noise, (2.0, 1.0, 1.0)), layers, {}, limit=90_000)
    assert cropping.remark.endswith("cropped to the segmentations with a margin of 20 mm")
    thinned = pack_case("a", volume(noise, (2.0, 1.0, 1.0)), layers, {}, limit=20_000)
    assert thinned.remark.endswith("only every n-th voxel, n = 2, 2, 1 along x, y, z")
    assert sum(map(len, thinned.layers.values())) <= 20_000


def test_packing_ends_even_if_nothing_fits():
    noise = np.random.default_rng(0).integers(0, 255, (9, 9, 9)).astype(np.uint8)
    packed = pack_case("a", volume(noise), {"prediction": volume(np.ones_like(noise))}, {}, limit=1)
    assert set(packed.layers) == {"image", "prediction"}


def test_a_continued_run_replaces_the_epochs_that_it_repeats(tmp_path):
    (tmp_path / "training_log_1.txt").write_text(
        "t: Epoch 0 \nt: train_loss 1.0 \nt: Epoch 1 \nt: train_loss 0.8 \nt: Epoch 2 \nt: train_loss 0.7 \n"
    )
    (tmp_path / "training_log_2.txt").write_text("t: Epoch 1 \nt: train_loss 0.5 \nt: Epoch time: 3.5 s\n")
    log = read_training_log(tmp_path, ())
    assert {epoch: row["train_loss"] for epoch, row in log.rows.items()} == {0: 1.0, 1: 0.5}
    assert log.seconds == 3.5


def test_folds_share_a_chart_and_values_that_are_nan_do_not_stop_it(tmp_path):
    for fold in (0, 1):
        (tmp_path / f"fold_{fold}").mkdir()
        (tmp_path / f"fold_{fold}" / "training_log_1.txt").write_text(
            f"t: Epoch 0 \nt: Pseudo dice [np.float32(0.{fold}), np.float32(nan)] \nt: Epoch 1 \nt: train_loss nan \n"
        )
    found = {chart.title: chart.lines for chart in charts(sorted(tmp_path.iterdir()), ["liver", "tumour"])}
    assert found["Pseudo Dice on patches"]["liver, fold 1"] == ((0.0, 0.1),)
    assert math.isnan(found["Loss"]["training, fold 0"][0][1])
    assert draw(Chart("Loss", found["Loss"])).startswith("<svg")


def test_a_drawing_takes_the_page_s_colour_and_size_and_shares_no_ids():
    first = draw(Chart("one", {"a": ((0, 1.0), (1, 2.0)), "b": ((0, 2.0), (1, 1.0))}))
    second = draw(Chart("two", {"a": ((0, 1.0), (1, 2.0))}))

    def ids(svg):
        return {part.split('"')[0] for part in svg.split(' id="')[1:]}

    assert ids(first) & ids(second) == set()
    assert "currentColor" in first
    assert 'width="' not in first.split(">")[0]
    assert "http" not in first.replace("http://www.w3.org", "")


def test_names_that_look_like_formulas_or_that_a_font_lacks_are_drawn_as_they_stand(recwarn):
    names = (r"$\foo$", "liver $x$_{ $", "肝臓")
    drawing = draw(Chart("Pseudo Dice on patches", {name: ((0.0, 0.5), (1.0, 0.6)) for name in names}))
    assert all(name in drawing for name in names)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]  # the reader's browser has its own


def test_tables_take_any_columns_and_drop_those_that_were_measured_nowhere():
    @dataclass(frozen=True)
    class Result:
        """Something.

        Attributes:
            case: case id.
            new_metric: what it is,
                on two lines.
        """

        case: str
        new_metric: float | None
        count: int
        nowhere: float | None = None

    table = results_table([Result("a", 0.5, 3), Result("b", math.nan, 4), Result("c", None, 5)])
    assert table.headings == ("Case", "New metric", "Count")
    assert [cell.text for cell in table.rows[0]] == ["a", "0.5000", "3"]
    assert [row[1].key for row in table.rows] == [0.5, None, None]
    assert table.meanings["New metric"] == "what it is, on two lines."


def test_headings_name_units_and_directions():
    assert heading("hd95_medpy") == "HD95 (MedPy) [mm]"
    assert heading("n_reference") == "Voxels in reference"
    assert heading("lesion_sensitivity") == "Lesion sensitivity"


def test_cases_are_ranked_by_the_classes_that_were_measured():
    results = [
        class_result("good", "1", "liver", 9, 1, 1),
        class_result("good", "2", "tumour", 0, 0, 0),  # absent in both: says nothing
        class_result("bad", "1", "liver", 9, 1, 1),
        class_result("bad", "2", "tumour", 0, 0, 5),  # missed: counts as 0
        class_result("empty", "1", "liver", 0, 0, 0),
    ]
    assert rank_cases(results) == ["bad", "good"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, {}),
        (1, {"p": "worst 1"}),
        (2, {"p": "worst 1", "s": "best 1"}),
        (9, {"p": "worst 1", "q": "worst 2", "s": "best 1", "r": "best 2"}),
    ],
)
def test_no_case_is_worst_and_best(number, expected):
    assert worst_and_best(["p", "q", "r", "s"], number) == expected
