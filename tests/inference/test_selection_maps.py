"""Selection maps: their voxels against a computation by hand, their place in the image, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.evaluation.report.inputs import find_inputs
from lgssl_nnunet.inference import predict as predict_module
from lgssl_nnunet.inference import selection_maps as module
from lgssl_nnunet.inference.predict import PredictionError
from lgssl_nnunet.inference.selection_maps import SelectionMapPredictor, write_map
from lgssl_nnunet.inference.selection_overlay import draw_selection, most_varied_slices
from lgssl_nnunet.networks.language_guided import LanguageGuidedUNet
from lgssl_nnunet.trainers.lg_ssl import LGSSLTrainer

CPU = torch.device("cpu")
STRAIGHT = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
OBLIQUE = tuple(Rotation.from_euler("xyz", (12, -20, 100), degrees=True).as_matrix().ravel())
EMBEDDINGS = np.random.default_rng(0).normal(size=(3, 8)).tolist()


@pytest.fixture
def guided(model_maker):
    """Write a model of LGSSLTrainer with random weights; keywords other than these replace entries of the plans."""

    def make(configuration="3d_fullres", folds=(0,), mirroring_axes=None, options=(), dataset_json=(), **plans) -> Path:
        folder = model_maker(configuration=configuration, folds=folds, trained_by="LGSSLTrainer")
        description = {**json.loads((folder / "dataset.json").read_text()), **dict(dataset_json)}
        (folder / "dataset.json").write_text(json.dumps(description))
        spacing = plans.pop("spacing", None)
        content = {**json.loads((folder / "plans.json").read_text()), **plans}
        content["lgssl"] = {"text": {"embeddings": EMBEDDINGS}, "training": {"hyperparameters": dict(options)}}
        if spacing is not None:
            content["configurations"][configuration]["spacing"] = spacing
        (folder / "plans.json").write_text(json.dumps(content))
        manager = PlansManager(content)
        for number, fold in enumerate(folds):
            torch.manual_seed(number)
            network = LGSSLTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 3)
            file = folder / f"fold_{fold}" / "checkpoint_final.pth"
            checkpoint = torch.load(file, weights_only=False)
            checkpoint.update(network_weights=network.state_dict(), inference_allowed_mirroring_axes=mirroring_axes)
            torch.save(checkpoint, file)
        return folder

    return make


@pytest.fixture
def network(guided):
    """The network of the first fold of a model folder."""

    def load(folder) -> LanguageGuidedUNet:
        predictor = SelectionMapPredictor(CPU, progress=False)
        predictor.load_model(folder, [0])
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        return predictor.network.eval()

    return load


def enlarged(network: LanguageGuidedUNet, x: torch.Tensor) -> np.ndarray:
    """The selection map of one patch at its full size, by scipy."""
    coarse = network.selection(x)[0, 0].numpy().astype(np.float64)
    factors = [size / part for size, part in zip(x.shape[2:], coarse.shape, strict=True)]
    return ndimage.zoom(coarse, factors, order=1, mode="nearest", grid_mode=True)


def save(file: Path, array: np.ndarray, direction=STRAIGHT, spacing=(1.0, 1.25, 1.5)) -> Path:
    """Write an image (Z, Y, X)."""
    image = sitk.GetImageFromArray(array.astype(np.float32))
    image.SetSpacing(spacing)
    image.SetOrigin((-12.5, 40.0, 7.0))
    image.SetDirection(direction)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def scan(shape=(14, 16, 20), margin=0) -> np.ndarray:
    """A positive random image (Z, Y, X) with empty voxels around it."""
    inside = np.random.default_rng(3).uniform(1, 2, [size - 2 * margin for size in shape])
    return np.pad(inside, margin)


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def require_same_geometry(file: Path, other: Path) -> None:
    a, b = (sitk.ReadImage(str(path)) for path in (file, other))
    assert a.GetSize() == b.GetSize()
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(a, geometry)() == pytest.approx(getattr(b, geometry)(), abs=1e-6)


@pytest.mark.parametrize("axes", [[0, 1, 2], [2, 0, 1]])
def test_a_map_of_one_patch_is_the_networks_own_at_its_place_in_the_image(
    guided, network, tmp_path, predict_here, axes
):
    spacing = (1.0, 1.25, 1.5)
    folder = guided(
        transpose_forward=axes, transpose_backward=np.argsort(axes).tolist(), spacing=[spacing[::-1][a] for a in axes]
    )
    image = np.zeros((18, 20, 22), dtype=np.float32)
    patch = np.random.default_rng(1).uniform(1, 2, (16, 16, 16)).astype(np.float32)
    image[1:17, 3:19, 2:18] = patch
    save(tmp_path / "in" / "a_0000.nii.gz", image, OBLIQUE, spacing)
    predict_here(tmp_path / "in", tmp_path / "out", save_selection_maps=True, precision="fp32")
    normalised = torch.from_numpy((patch - patch.mean()) / patch.std()).permute(axes)
    expected = np.zeros_like(image)
    expected[1:17, 3:19, 2:18] = enlarged(network(folder), normalised[None, None]).transpose(np.argsort(axes))
    found = voxels(tmp_path / "out" / "selection_maps" / "a.nii.gz")
    assert found.dtype == np.float32
    assert found.max() - found[found > 0].min() > 0.3
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_mirrored_copies_and_folds_are_averaged(guided, tmp_path):
    folder = guided(folds=(0, 1), mirroring_axes=(0, 1, 2))
    predictor = SelectionMapPredictor(CPU, progress=False)
    predictor.load_model(folder, (0, 1))
    image = np.random.default_rng(2).normal(size=(1, 16, 16, 16)).astype(np.float32)
    flips = [flip for count in range(4) for flip in itertools.combinations((0, 1, 2), count)]
    maps = []
    for weights in predictor.list_of_parameters:
        predictor.network.load_state_dict(weights)
        for flip in flips:
            mirrored = torch.from_numpy(np.flip(image[0], flip).copy())[None, None]
            maps.append(np.flip(enlarged(predictor.network.eval(), mirrored), flip))
    results, _ = predictor._infer(module.Case("a", (), tmp_path / "a.nii.gz"), image, {})
    np.testing.assert_allclose(results["selection"][0], np.mean(maps, axis=0), atol=1e-5)


@pytest.mark.parametrize("direction", [STRAIGHT, OBLIQUE])
@pytest.mark.parametrize("axes", [[0, 1, 2], [1, 2, 0]])
def test_a_map_has_the_geometry_of_its_image(guided, tmp_path, predict_here, direction, axes):
    guided(transpose_forward=axes, transpose_backward=np.argsort(axes).tolist(), spacing=[2.0, 1.0, 1.0])
    image = save(tmp_path / "in" / "a_0000.nii.gz", scan((11, 25, 30), margin=3), direction, (0.7, 0.8, 3.0))
    (segmentation,) = predict_here(tmp_path / "in", tmp_path / "out", save_selection_maps=True)
    file = tmp_path / "out" / "selection_maps" / "a.nii.gz"
    require_same_geometry(file, image)
    require_same_geometry(file, segmentation)
    values, inside = voxels(file), voxels(image) > 0
    assert (values[~inside] == 0).all()
    assert values[inside].min() >= 0
    assert values.max() <= 1
    assert values[inside].std() > 0.01


def test_segmentations_and_probabilities_are_the_same_to_the_bit(guided, images, tmp_path, predict_here, monkeypatch):
    guided(folds=(0, 1), mirroring_axes=(0, 1, 2))
    for precision in ("stock", "fp32"):
        options = {"precision": precision, "save_probabilities": True}
        predict_here(images, tmp_path / f"with {precision}", save_selection_maps=True, **options)
        with monkeypatch.context() as patch:
            patch.setattr(LanguageGuidedUNet, "selection", None)  # without the option nothing is computed for it
            predict_here(images, tmp_path / f"without {precision}", **options)
        with_maps, without = (content(tmp_path / f"{way} {precision}") for way in ("with", "without"))
        maps = {f"selection_maps/{case}.{ending}" for case in "ab" for ending in ("nii.gz", "png")}
        assert with_maps.keys() - without.keys() == maps
        assert all(with_maps[name] == without[name] for name in without if name.split(".", 1)[1] in ("nii.gz", "npz"))
        assert {"a.nii.gz", "a.npz"} <= without.keys()


def test_fp16_sums_do_not_reach_the_maps(guided, images, tmp_path, predict_here):
    guided()
    for precision in ("stock", "fp32"):
        predict_here(images / "a_0000.nii.gz", tmp_path / precision, precision=precision, save_selection_maps=True)
    stock, exact = (voxels(tmp_path / way / "selection_maps" / "a.nii.gz") for way in ("stock", "fp32"))
    assert np.array_equal(stock, exact)


def test_the_maps_leave_the_layout_of_the_prediction_networks_weights_alone(guided):
    predictor = SelectionMapPredictor(CPU, progress=False)
    predictor.load_model(guided(), [0])
    assert all(weight.is_contiguous() for weight in predictor.network.parameters())
    assert not all(weight.is_contiguous() for weight in predictor._maps.network.parameters())


def test_two_dimensional_models_make_maps_of_volumes_and_of_planes(
    guided, network, image_maker, tmp_path, predict_here
):
    folder = guided(configuration="2d", mirroring_axes=(0, 1), spacing=[1.25, 1.0])
    volume = image_maker(tmp_path / "volume" / "a_0000.nii.gz")
    predict_here(volume, tmp_path / "out", save_selection_maps=True)
    require_same_geometry(tmp_path / "out" / "selection_maps" / "a.nii.gz", volume)
    plane = image_maker(tmp_path / "plane" / "b_0000.nii.gz", size=(16, 16))
    predict_here(plane, tmp_path / "flat", save_selection_maps=True, disable_tta=True, precision="fp32")
    file = tmp_path / "flat" / "selection_maps" / "b.nii.gz"
    require_same_geometry(file, plane)
    image = voxels(plane)
    expected = enlarged(network(folder), torch.from_numpy((image - image.mean()) / image.std())[None, None])
    np.testing.assert_allclose(voxels(file), expected, atol=2e-4)
    for picture_file in ("out/selection_maps/a.png", "flat/selection_maps/b.png"):
        with Image.open(tmp_path / picture_file) as picture:
            picture.load()


def test_the_picture_can_be_read_and_the_report_finds_the_map(guided, images, tmp_path, predict_here):
    guided()
    predict_here(images, tmp_path / "out", save_selection_maps=True)
    with Image.open(tmp_path / "out" / "selection_maps" / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 300
    assert (np.ptp(pixels, axis=2) > 40).mean() > 0.05  # coloured, not only grey
    inputs = find_inputs(tmp_path / "out")
    assert [case.name for case in inputs.cases] == ["a", "b"]
    assert inputs.cases[0].selection_maps == {"selection map": tmp_path / "out" / "selection_maps" / "a.nii.gz"}


@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        ("SimpleITKIO", ".nii.gz"),
        ("SimpleITKIO", ".nrrd"),
        ("SimpleITKIO", ".mha"),
        ("SimpleITKIOWithReorient", ".nii.gz"),
        ("NibabelIO", ".nii"),
        ("NibabelIOWithReorient", ".nii.gz"),
    ],
)
def test_what_a_reader_reads_is_written_back_as_it_was(reader, ending, tmp_path):
    direction = np.array(OBLIQUE).reshape(3, 3)[:, [1, 2, 0]] * [-1, 1, -1]
    values = np.random.default_rng(0).uniform(size=(5, 6, 7)).astype(np.float32)
    source = save(tmp_path / f"image{ending}", values, direction.ravel(), (0.7, 0.8, 3.0))
    reader_class = recursive_find_reader_writer_by_name(reader)
    module.require_float_format(reader_class, ending)
    read, properties = reader_class().read_images([str(source)])
    write_map(read[0], properties, tmp_path / f"map{ending}")
    require_same_geometry(tmp_path / f"map{ending}", source)
    written = sitk.ReadImage(str(tmp_path / f"map{ending}"))
    assert written.GetPixelID() == sitk.sitkFloat32
    assert np.array_equal(sitk.GetArrayFromImage(written), values)


def test_other_file_formats_get_maps_in_their_own(guided, tmp_path, predict_here):
    guided(dataset_json={"file_ending": ".nrrd"})
    image = save(tmp_path / "in" / "a_0000.nrrd", scan(), OBLIQUE)
    predict_here(tmp_path / "in", tmp_path / "out", save_selection_maps=True)
    require_same_geometry(tmp_path / "out" / "selection_maps" / "a.nrrd", image)


def test_formats_without_fractions_are_refused_before_anything_is_loaded(guided, tmp_path, predict_here, monkeypatch):
    guided(configuration="2d", dataset_json={"file_ending": ".png"}, image_reader_writer="NaturalImage2DIO")
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "in" / "a_0000.png")
    monkeypatch.setattr(predict_module, "SelectionMapPredictor", None)
    with pytest.raises(UsageError, match=r"\.png files as NaturalImage2DIO writes them hold whole numbers.*leave the"):
        predict_here(tmp_path / "in", tmp_path / "out", save_selection_maps=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "SupervisedTrainer", "LGSSLTrainer"])
def test_models_without_prompts_are_refused(guided, model_maker, images, tmp_path, predict_here, monkeypatch, trainer):
    if trainer == "LGSSLTrainer":
        guided(options={"prompt_mode": "none"})
    else:
        model_maker(trained_by=trainer)
    monkeypatch.setattr(predict_module.LGSSLPredictor, "predict_files", None)
    with pytest.raises(
        UsageError, match=f"this model of {trainer} fuses no text prompts.*leave the option out"
    ) as error:
        predict_here(images, tmp_path / "out", save_selection_maps=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_continuing_makes_missing_maps_and_keeps_segmentations(guided, images, tmp_path, predict_here, monkeypatch):
    guided()
    out = tmp_path / "out"
    predict_here(images, out)
    sitk.WriteImage(sitk.ReadImage(str(out / "a.nii.gz")) * 0, str(out / "a.nii.gz"))
    by_hand = (out / "a.nii.gz").read_bytes()
    (out / "b.nii.gz").unlink()
    predict_here(images, out, save_selection_maps=True, continue_prediction=True)
    assert (out / "a.nii.gz").read_bytes() == by_hand
    assert (out / "b.nii.gz").is_file()
    made = content(out)
    assert {f"selection_maps/{case}.{ending}" for case in "ab" for ending in ("nii.gz", "png")} <= made.keys()
    (out / "selection_maps" / "b.png").unlink()
    predict_here(images, out, save_selection_maps=True, continue_prediction=True)
    assert content(out).keys() == made.keys()
    monkeypatch.setattr(SelectionMapPredictor, "_infer", None)  # now nothing is missing
    predict_here(images, out, save_selection_maps=True, continue_prediction=True)


def test_continuing_for_probabilities_keeps_maps_of_whole_segmentations(guided, images, tmp_path, predict_here):
    guided()
    out = tmp_path / "out"
    predict_here(images, out, save_selection_maps=True)
    (out / "b.nii.gz").unlink()
    made = content(out)
    predict_here(images, out, save_probabilities=True, continue_prediction=True)
    maps = {name for name in content(out) if name.startswith("selection_maps/")}
    assert maps == {name for name in made if name.startswith("selection_maps/a.")}


def test_the_segmentation_is_moved_into_place_last(guided, images, tmp_path, predict_here, monkeypatch):
    guided()
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(str(target)), replace(source, target)))
    predict_here(images / "a_0000.nii.gz", tmp_path / "out", save_selection_maps=True, save_probabilities=True)
    files = ["a.nii.gz", "a.npz", "a.pkl", "selection_maps/a.nii.gz", "selection_maps/a.png"]
    assert sorted(moved[-5:]) == [str(tmp_path / "out" / name) for name in files]
    assert moved[-1] == str(tmp_path / "out" / "a.nii.gz")


def test_maps_are_not_replaced_unasked_and_none_is_left_beside_another_segmentation(
    guided, images, tmp_path, predict_here
):
    guided()
    out = tmp_path / "out"
    predict_here(images, out, save_selection_maps=True)
    for name in ("a.nii.gz", "b.nii.gz"):
        (out / name).unlink()
    before = content(out)
    with pytest.raises(UsageError, match=r"already holds selection_maps/a\.nii\.gz, selection_maps/a\.png"):
        predict_here(images, out, save_selection_maps=True)
    assert content(out) == before
    predict_here(images, out, save_selection_maps=True, overwrite=True)
    assert content(out).keys() == before.keys() | {"a.nii.gz", "b.nii.gz"}
    predict_here(images, out, overwrite=True)
    assert not list((out / "selection_maps").iterdir())


def test_a_map_that_fails_leaves_neither_old_nor_new_files_of_its_case(
    guided, images, tmp_path, predict_here, monkeypatch
):
    folder = guided()
    out = tmp_path / "out"
    predict_here(images, out, save_selection_maps=True)
    before = content(out)
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for weight in checkpoint["network_weights"].values():
        weight.mul_(-1)
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    draw = module.draw_selection

    def fail_for_a(*arguments):
        if arguments[3] == "a":
            raise MemoryError("no room")
        return draw(*arguments)

    monkeypatch.setattr(module, "draw_selection", fail_for_a)
    with pytest.raises(PredictionError, match="a: MemoryError: no room"):
        predict_here(images, out, save_selection_maps=True, overwrite=True)
    after = content(out)
    assert before.keys() - after.keys() == {"a.nii.gz", "selection_maps/a.nii.gz", "selection_maps/a.png"}
    for name in ("b.nii.gz", "selection_maps/b.nii.gz", "selection_maps/b.png"):
        assert after[name] != before[name]


def test_a_worker_gets_the_predictor_without_its_weights(guided):
    predictor = SelectionMapPredictor(CPU, progress=False)
    predictor.load_model(guided(), [0])
    copy = pickle.loads(pickle.dumps(predictor))
    for part in (copy, copy._maps):
        assert part.network is None
        assert part.list_of_parameters is None
    assert copy._maps.label_manager.num_segmentation_heads == 1


# ------------------------------------------------------------------ the picture


def drawn(figure) -> list[tuple[str, list[np.ndarray], float]]:
    """Title, pictures and aspect of every panel."""
    panels = [axes for axes in figure.axes if axes.images]
    return [
        (panel.get_title(), [np.asarray(i.get_array()) for i in panel.images], panel.get_aspect()) for panel in panels
    ]


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_a_picture_does_not_depend_on_how_the_voxels_are_stored(tmp_path, reader):
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.uniform(size=(6, 8, 10)).astype(np.float32))
    image.SetSpacing((1.0, 2.0, 4.0))
    seen = []
    for name, orientation in (("SimpleITKIO", "LPS"), (reader, "PIR")):
        file = tmp_path / f"{orientation}.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(file))
        read, properties = recursive_find_reader_writer_by_name(name)().read_images([str(file)])
        seen.append(drawn(draw_selection(read[0], read[0], properties, "case", is_ct=False)))
    for (title, pictures, aspect), (other_title, other_pictures, other_aspect) in zip(*seen, strict=True):
        assert title == other_title
        assert all(np.array_equal(a, b) for a, b in zip(pictures, other_pictures, strict=True))
        assert aspect == pytest.approx(other_aspect)
    array = sitk.GetArrayFromImage(image)
    z, y, x = most_varied_slices(array)
    axial, coronal, sagittal, *overlays = seen[0]
    assert np.array_equal(axial[1][0], array[z])
    assert np.array_equal(coronal[1][0], array[::-1, y])  # the head is up
    assert np.array_equal(sagittal[1][0], array[::-1, :, x])
    assert (axial[2], coronal[2], sagittal[2]) == pytest.approx((2.0, 4.0, 2.0))
    assert (axial[0], coronal[0]) == (f"axial {z + 1} of 6", f"coronal {y + 1} of 8")
    assert [len(panel[1]) for panel in overlays[:3]] == [2, 2, 2]


def test_a_case_whose_name_looks_like_a_formula_is_drawn(tmp_path):
    image = np.random.default_rng(0).uniform(size=(4, 4, 4))
    properties = {"spacing": [1, 1, 1], "sitk_stuff": {"spacing": (1, 1, 1), "direction": np.eye(3).ravel()}}
    draw_selection(image, image, properties, r"case $\foo$", is_ct=False).savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").is_file()


def test_colours_stand_for_the_same_values_in_every_picture():
    image = np.random.default_rng(0).uniform(-1000, 1000, (4, 4, 4))
    properties = {"spacing": [1, 1, 1], "sitk_stuff": {"spacing": (1, 1, 1), "direction": np.eye(3).ravel()}}
    figure = draw_selection(image, np.full((4, 4, 4), 0.3), properties, "case", is_ct=True)
    grey, heat = figure.axes[3].images
    assert heat.get_clim() == (0, 1)
    assert grey.get_clim() == (-160, 240)
    assert figure.axes[-1].get_ylabel().startswith("selection")


def test_what_preprocessing_cut_off_is_grey_and_chooses_no_slice():
    selection = np.zeros((8, 8, 8), dtype=np.float32)
    selection[2:7, 2:7, 2:7] = 0.62
    selection[5, 2:7, 2:7] = np.linspace(0.3, 0.7, 25).reshape(5, 5)
    image = np.random.default_rng(0).uniform(size=selection.shape)
    properties = {"spacing": [1, 1, 1], "sitk_stuff": {"spacing": (1, 1, 1), "direction": np.eye(3).ravel()}}
    figure = draw_selection(image, selection, properties, "case", is_ct=False)
    assert figure.axes[0].get_title() == "axial 6 of 8"
    assert "0.30 to 0.70" in figure._suptitle.get_text()
    heat = figure.axes[3].images[1].get_array()
    assert np.ma.getmaskarray(heat).sum() == 64 - 25


def test_the_slices_drawn_are_those_in_which_the_map_varies_most():
    selection = np.full((7, 8, 9), 0.5)
    assert most_varied_slices(selection) == (3, 4, 4)
    selection[1, 2, 6] = 0.1  # held back
    assert most_varied_slices(selection) == (1, 2, 6)
