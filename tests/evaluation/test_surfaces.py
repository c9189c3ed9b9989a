"""Surface distances: the libraries' own numbers, hand values on plates and spheres, and the order of the axes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lgssl_nnunet.evaluation import surfaces
from lgssl_nnunet.evaluation.surfaces import available_columns, image_diagonal, missing_columns, surface_metrics

library = pytest.importorskip("surface_distance.metrics", reason="needs surface-distance (extra evaluation)")
medpy = pytest.importorskip("medpy.metric.binary", reason="needs MedPy (extra evaluation)")

LEFT_ATRIUM = Path(__file__).parents[3] / "shared" / "data" / "universal_medical_ssl" / "LA"
EXACT = {"rel": 0, "abs": 1e-6}


def plate(axis, at, shape=(12, 12, 12)):
    """A mask of one voxel's thickness across `axis`, away from the image's sides."""
    mask = np.zeros(shape, dtype=bool)
    box = [slice(2, 9)] * len(shape)
    box[axis] = slice(at, at + 1)
    mask[tuple(box)] = True
    return mask


def ellipsoid(shape, centre, radius, spacing):
    """A ball of `radius` mm around `centre` (voxels)."""
    grid = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    squares = [((axis - c) * step) ** 2 for axis, c, step in zip(grid, centre, spacing, strict=True)]
    return sum(squares) <= radius**2


def by_the_libraries(reference, prediction, spacing, tolerance):
    """The columns by the libraries' functions on the whole arrays, averages by their definition."""
    distances = library.compute_surface_distances(reference, prediction, spacing)
    weights = np.concatenate([distances["surfel_areas_gt"], distances["surfel_areas_pred"]])
    lengths = np.concatenate([distances["distances_gt_to_pred"], distances["distances_pred_to_gt"]])
    return {
        "hd95": library.compute_robust_hausdorff(distances, 95),
        "assd": (weights * lengths).sum() / weights.sum(),
        "surface_dice": library.compute_surface_dice_at_tolerance(distances, tolerance),
        "hd95_medpy": medpy.hd95(prediction, reference, voxelspacing=spacing),
        "asd_medpy": medpy.asd(prediction, reference, voxelspacing=spacing),
    }


@pytest.mark.parametrize("shape", [(16, 20, 24), (40, 30)])
def test_columns_are_the_libraries_own_numbers(shape):
    rng = np.random.default_rng(0)
    spacing = (2.5, 0.8, 1.3)[: len(shape)]
    reference = ellipsoid(shape, [s / 2 for s in shape], 9, spacing)
    prediction = np.roll(reference, 2, axis=0) ^ (rng.random(shape) < 0.01)
    assert surface_metrics(reference, prediction, spacing, 1.5) == pytest.approx(
        by_the_libraries(reference, prediction, spacing, 1.5), **EXACT
    )


def test_masks_at_the_image_border_have_the_libraries_numbers_too():
    reference, prediction = np.zeros((2, 9, 8, 7), dtype=bool)
    reference[:4, :5, 3:] = True
    prediction[:6, :5, :] = True
    spacing = (3.0, 1.0, 0.5)
    assert surface_metrics(reference, prediction, spacing, 1.0) == pytest.approx(
        by_the_libraries(reference, prediction, spacing, 1.0), **EXACT
    )


@pytest.mark.skipif(not LEFT_ATRIUM.is_dir(), reason="needs the left-atrium cases in ../shared/data")
def test_medpy_columns_are_medpys_on_real_left_atria_with_anisotropic_spacing():
    nibabel = pytest.importorskip("nibabel")
    files = sorted(LEFT_ATRIUM.glob("DATASET/*/label.nii.gz"))[:2]
    masks = [np.asarray(nibabel.load(file).dataobj) > 0 for file in files]
    shape = np.minimum(*(mask.shape for mask in masks))
    # One atrium against another, at half the resolution: the test compares numbers, it does not rate anything.
    reference, prediction = (mask[tuple(slice(0, size, 2) for size in shape)] for mask in masks)
    assert reference.any()
    assert prediction.any()
    spacing = (1.25, 1.25, 2.5)
    assert surface_metrics(reference, prediction, spacing, 2.0) == pytest.approx(
        by_the_libraries(reference, prediction, spacing, 2.0), **EXACT
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parallel_plates_are_as_far_apart_as_the_spacing_of_their_axis_says(axis):
    spacing = (5.0, 2.0, 0.5)
    measured = surface_metrics(plate(axis, 2), plate(axis, 5), spacing, 2 * spacing[axis])
    # Border voxels are three steps apart. A plate's two faces, of equal area, are two and three steps from the other's
    # nearer face, so the surface within two steps is one half.
    assert measured == pytest.approx(
        {
            "hd95": 3 * spacing[axis],
            "assd": 2.5 * spacing[axis],
            "surface_dice": 0.5,
            "hd95_medpy": 3 * spacing[axis],
            "asd_medpy": 3 * spacing[axis],
        },
        **EXACT,
    )


def test_concentric_spheres_are_apart_by_the_difference_of_their_radii():
    shape, spacing = (31, 61, 41), (2.0, 1.0, 1.5)
    centre = [size // 2 for size in shape]
    measured = surface_metrics(
        ellipsoid(shape, centre, 20, spacing), ellipsoid(shape, centre, 26, spacing), spacing, 3.0
    )
    for column in ("hd95", "assd", "hd95_medpy", "asd_medpy"):
        assert measured[column] == pytest.approx(6, abs=1.0), column
    assert measured["surface_dice"] == 0


def test_equal_masks_have_no_distance():
    mask = ellipsoid((20, 20, 20), (10, 10, 10), 6, (1, 1, 1))
    assert surface_metrics(mask, mask, (1, 1, 1), 0.0) == {
        "hd95": 0, "assd": 0, "surface_dice": 1, "hd95_medpy": 0, "asd_medpy": 0,
    }  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_image_of_one_slice_is_measured_in_its_plane(axis):
    flat_reference, flat_prediction = plate(0, 2, (12, 12)), plate(0, 6, (12, 12))
    reference, prediction = (np.expand_dims(mask, axis) for mask in (flat_reference, flat_prediction))
    spacing = [2.0, 0.5]
    spacing.insert(axis, 999.0)
    measured = surface_metrics(reference, prediction, spacing, 1.0)
    assert measured["hd95"] == measured["asd_medpy"] == pytest.approx(8.0)
    assert measured == surface_metrics(flat_reference, flat_prediction, (2.0, 0.5), 1.0)


def test_an_image_of_one_line_is_measured_along_it():
    reference, prediction = np.zeros((2, 1, 1, 20), dtype=bool)
    reference[..., 3], prediction[..., 9] = True, True
    assert surface_metrics(reference, prediction, (9.0, 9.0, 0.5), 1.0)["hd95_medpy"] == pytest.approx(3.0)


def test_the_diagonal_is_in_mm_and_knows_flat_images():
    assert image_diagonal((3, 4, 12), (1, 1, 1)) == pytest.approx(13)
    assert image_diagonal((3, 8, 24), (1, 0.5, 0.5)) == pytest.approx(13)
    assert image_diagonal((1, 3, 4), (999, 1, 1)) == pytest.approx(5)


@pytest.mark.parametrize(
    ("absent", "left"),
    [
        ((), ("hd95", "assd", "surface_dice", "hd95_medpy", "asd_medpy")),
        (("medpy",), ("hd95", "assd", "surface_dice")),
        (("surface_distance",), ("hd95_medpy", "asd_medpy")),
        (("surface_distance", "medpy"), ()),
    ],
)
def test_a_missing_library_costs_its_columns_only(monkeypatch, absent, left):
    real = importlib.util.find_spec
    monkeypatch.setattr(surfaces, "find_spec", lambda name: None if name in absent else real(name))
    assert available_columns() == left
    assert set(missing_columns()) == {"hd95", "assd", "surface_dice", "hd95_medpy", "asd_medpy"} - set(left)
    assert tuple(surface_metrics(plate(0, 2), plate(0, 5), (1, 1, 1), 1.0)) == left
