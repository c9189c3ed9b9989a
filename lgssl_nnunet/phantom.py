"""A made-up abdomen: a raw nnU-Net dataset for the demo and the tests, drawn on the spot.

Each case shows a liver and a gallbladder that touches it, among look-alikes. Size, position, orientation, shape and
contrast differ from case to case, and every image carries a bias field and noise, so that a handful of labelled cases
does not tell all there is to know. It is no substitute for real images: it shows that the pipeline works.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from lgssl_nnunet.errors import UsageError

LIVER, GALLBLADDER, IGNORE = 1, 2, 3
PROMPTS = {
    "liver": "A magnetic resonance image of the liver",
    "gallbladder": "A magnetic resonance image of the gallbladder",
}
SPACING = (3.0, 3.0, 4.0)
SMALLEST_SIDE = 16


@dataclass(frozen=True)
class PhantomSpec:
    """What the dataset holds.

    Attributes:
        num_labeled: cases in imagesTr with a file in labelsTr.
        num_unlabeled: cases in imagesUn, which has no segmentations.
        num_test: cases in imagesTs and labelsTs.
        shape: voxels along the array axes, (Z, Y, X) or, for 2D images, (Y, X).
        num_channels: images per case; contrasts differ between channels, anatomy does not.
        regions: declare overlapping regions (liver with its gallbladder, gallbladder) instead of plain labels.
        ignore: leave every fourth slice of the labelled cases unannotated, with an ignore label.
        seed: the draw of all cases; one case depends on the seed, its kind and its number only.
        dataset_id: number in the dataset's name.
    """

    num_labeled: int = 6
    num_unlabeled: int = 24
    num_test: int = 8
    shape: tuple[int, ...] = (32, 44, 44)
    num_channels: int = 1
    regions: bool = False
    ignore: bool = False
    seed: int = 0
    dataset_id: int = 999

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < SMALLEST_SIDE:
            raise UsageError(
                f"A phantom of shape {self.shape} cannot be drawn: give two or three sides of at least "
                f"{SMALLEST_SIDE} voxels."
            )
        if min(self.num_labeled, self.num_unlabeled, self.num_test) < 0 or self.num_channels < 1:
            raise UsageError("A phantom needs at least one channel and no negative number of cases.")

    @property
    def name(self) -> str:
        """Name of the dataset folder."""
        return f"Dataset{self.dataset_id:03d}_Phantom"


@dataclass(frozen=True)
class PhantomCase:
    """One drawn case: `image` (M, *S) in scanner units and `segmentation` (*S) with values 0, 1, 2."""

    image: np.ndarray
    segmentation: np.ndarray


def write_phantom_dataset(folder: Path | str, spec: PhantomSpec | None = None, *, progress: bool = False) -> Path:
    """Write the dataset in nnU-Net's raw layout.

    Args:
        folder: the folder for raw datasets (what nnUNet_raw names); the dataset's own folder is made in it.
        spec: what to write; default `PhantomSpec()`.
        progress: show a progress bar.

    Returns:
        The dataset's folder, which holds imagesTr, labelsTr, imagesUn (when there are unlabelled cases), imagesTs,
        labelsTs (when there are test cases) and dataset.json.
    """
    spec = spec or PhantomSpec()
    dataset = Path(folder) / spec.name
    jobs = [
        (kind, index, images, labels)
        for kind, count, images, labels in (
            ("labeled", spec.num_labeled, "imagesTr", "labelsTr"),
            ("unlabeled", spec.num_unlabeled, "imagesUn", None),
            ("test", spec.num_test, "imagesTs", "labelsTs"),
        )
        for index in range(count)
    ]
    for kind, index, images, labels in tqdm(jobs, desc="Drawing phantom cases", unit="case", disable=not progress):
        _write_case(dataset, kind, index, images, labels, spec)
    dataset.mkdir(parents=True, exist_ok=True)
    (dataset / "dataset.json").write_text(json.dumps(_dataset_json(spec), indent=2) + "\n", encoding="utf-8")
    return dataset


def draw_case(spec: PhantomSpec, kind: str, index: int) -> PhantomCase:
    """Draw one case.

    Args:
        spec: shape, channels and seed are used.
        kind: "labeled", "unlabeled" or "test"; all three are draws from one population.
        index: number of the case among those of its kind.

    Returns:
        The image in float32 and the segmentation in uint8, both classes present.
    """
    rng = _case_rng(spec, kind, index)
    grid = _deformed_grid(spec.shape, rng)
    tissue = {"fat": _body(grid, rng)}
    liver, liver_center, liver_radius = _liver(grid, rng)
    gallbladder = _gallbladder(grid, rng, liver_center, liver_radius)
    tissue["spleen"] = _spleen(grid, rng, liver_center)
    tissue["cyst"] = _cysts(grid, rng)
    tissue["liver"] = liver & ~gallbladder
    tissue["gallbladder"] = gallbladder
    segmentation = np.zeros(spec.shape, np.uint8)
    segmentation[tissue["liver"]] = LIVER
    segmentation[tissue["gallbladder"]] = GALLBLADDER
    image = np.stack([_acquire(tissue, rng) for _ in range(spec.num_channels)])
    return PhantomCase(image.astype(np.float32), segmentation)


def _case_rng(spec: PhantomSpec, kind: str, index: int) -> np.random.Generator:
    return np.random.default_rng([spec.seed, ("labeled", "unlabeled", "test").index(kind), index])


def _deformed_grid(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return coordinates (D, *S), about -1 to 1 along each side, bent by a smooth random field."""
    axes = [np.linspace(-1, 1, side) for side in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    return grid + np.stack([0.07 * _smooth_noise(shape, 0.14, rng) for _ in shape])


def _smooth_noise(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Return a field (*S) of mean 0 and deviation 1 whose structures are about `scale` of a side wide."""
    field = gaussian_filter(rng.standard_normal(shape), [scale * side for side in shape], mode="nearest")
    return (field - field.mean()) / field.std()


def _rotation(dimensions: int, angle: float, rng: np.random.Generator) -> np.ndarray:
    """Return a proper rotation (D, D) about a random axis by about `angle` radians."""
    skew = np.triu(rng.uniform(-angle, angle, (dimensions, dimensions)), 1)
    skew = skew - skew.T
    identity = np.eye(dimensions)
    return np.linalg.solve(identity + skew / 2, identity - skew / 2)  # Cayley: orthogonal for every skew matrix


def _ellipsoid(grid: np.ndarray, center: np.ndarray, radii: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Return the mask (*S) of the points of `grid` (D, *S) inside the turned ellipsoid."""
    offset = grid - center.reshape(-1, *(1,) * (grid.ndim - 1))
    return np.square(np.tensordot(rotation, offset, 1) / radii.reshape(-1, *(1,) * (grid.ndim - 1))).sum(0) < 1


def _body(grid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dimensions = len(grid)
    radii = np.array([1.6, 0.86, 0.92][-dimensions:]) * rng.uniform(0.95, 1.05)  # runs through the top and bottom slice
    return _ellipsoid(grid, np.zeros(dimensions), radii, np.eye(dimensions))


def _liver(grid: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the liver's mask with its middle (D,) and mean radius."""
    dimensions = len(grid)
    center = np.array([0.0, -0.08, -0.22])[-dimensions:] + rng.uniform(-0.16, 0.16, dimensions)
    radii = np.array([0.46, 0.44, 0.5])[-dimensions:] * rng.uniform(0.78, 1.15, dimensions)
    mask = _ellipsoid(grid, center, radii, _rotation(dimensions, 0.5, rng))
    return mask, center, float(radii.mean())


def _gallbladder(
    grid: np.ndarray, rng: np.random.Generator, liver_center: np.ndarray, liver_radius: float
) -> np.ndarray:
    """Return the gallbladder's mask: a small pear half sunk into the liver's surface."""
    dimensions = len(grid)
    direction = np.array([0.2, 0.75, 0.6])[-dimensions:] + rng.uniform(-0.35, 0.35, dimensions)
    center = liver_center + direction / np.linalg.norm(direction) * liver_radius * rng.uniform(0.7, 0.95)
    radii = np.array([0.28, 0.22, 0.25])[-dimensions:] * rng.uniform(0.85, 1.3, dimensions)
    return _ellipsoid(grid, center, radii, _rotation(dimensions, 0.9, rng))


def _spleen(grid: np.ndarray, rng: np.random.Generator, liver_center: np.ndarray) -> np.ndarray:
    """Return a mask that looks like liver and is not: it lies on the other side."""
    dimensions = len(grid)
    center = np.array([0.0, 0.1, 0.58])[-dimensions:] + rng.uniform(-0.14, 0.14, dimensions)
    center[-1] = max(center[-1], liver_center[-1] + 0.6)
    radii = np.array([0.34, 0.3, 0.2])[-dimensions:] * rng.uniform(0.8, 1.2, dimensions)
    return _ellipsoid(grid, center, radii, _rotation(dimensions, 0.6, rng))


def _cysts(grid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one to three blobs as bright as a gallbladder; the liver, drawn later, hides what falls into it."""
    dimensions = len(grid)
    mask = np.zeros(grid.shape[1:], bool)
    for _ in range(rng.integers(1, 4)):
        center = rng.uniform(-0.65, 0.65, dimensions)
        mask |= _ellipsoid(grid, center, rng.uniform(0.09, 0.18, dimensions), _rotation(dimensions, 0.9, rng))
    return mask


def _acquire(tissue: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return one channel (*S): tissue contrasts of this scan, texture, blur, bias field, noise and scanner gain."""
    shape = next(iter(tissue.values())).shape
    contrast = {"fat": rng.uniform(0.3, 0.42), "liver": rng.uniform(0.5, 0.72)}
    contrast["spleen"] = contrast["liver"] + rng.uniform(-0.05, 0.05)
    bright, dark = contrast["liver"] + rng.uniform(0.12, 0.26), contrast["fat"] - rng.uniform(0.08, 0.16)
    contrast["gallbladder"] = bright if rng.uniform() < 0.65 else dark
    contrast["cyst"] = contrast["gallbladder"] + rng.uniform(-0.05, 0.05)
    image = np.zeros(shape)
    for name, mask in tissue.items():  # in drawing order: later tissues cover earlier ones
        image[mask] = contrast[name]
    image = gaussian_filter(image + 0.05 * _smooth_noise(shape, 0.06, rng) * (image > 0), 0.6)
    image *= np.exp(rng.uniform(0.1, 0.25) * _smooth_noise(shape, 0.35, rng))
    image += rng.uniform(0.05, 0.1) * rng.standard_normal(shape)
    return np.abs(image) * rng.uniform(400, 900)  # magnitude images have no negative voxels


def _write_case(dataset: Path, kind: str, index: int, images: str, labels: str | None, spec: PhantomSpec) -> None:
    case = draw_case(spec, kind, index)
    like = _geometry(spec, kind, index)
    for channel, array in enumerate(case.image):
        _write_image(
            array.round().astype(np.int16), like, dataset / images / f"{kind}_{index:03d}_{channel:04d}.nii.gz"
        )
    if labels is None:
        return
    segmentation = case.segmentation.copy()
    if spec.ignore and kind == "labeled":
        segmentation[index % 4 :: 4] = IGNORE
    _write_image(segmentation, like, dataset / labels / f"{kind}_{index:03d}.nii.gz")


def _geometry(spec: PhantomSpec, kind: str, index: int) -> Callable[[sitk.Image], None]:
    """Return what gives an image this case's spacing (mm), origin (mm) and a slightly turned direction."""
    rng = _case_rng(spec, kind, index).spawn(1)[0]  # apart from the drawing's stream, so neither shifts the other
    dimensions = len(spec.shape)
    origin = rng.uniform(-150, 150, dimensions)
    direction = _rotation(dimensions, 0.12, rng)

    def apply(image: sitk.Image) -> None:
        image.SetSpacing(SPACING[:dimensions])
        image.SetOrigin(origin.tolist())
        image.SetDirection(direction.ravel().tolist())

    return apply


def _write_image(array: np.ndarray, set_geometry: Callable[[sitk.Image], None], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    set_geometry(image)
    sitk.WriteImage(image, str(file))


def _dataset_json(spec: PhantomSpec) -> dict[str, object]:
    labels: dict[str, int | list[int]] = {"background": 0, "liver": LIVER, "gallbladder": GALLBLADDER}
    if spec.regions:
        labels |= {"liver": [LIVER, GALLBLADDER], "gallbladder": [GALLBLADDER]}
    if spec.ignore:
        labels["ignore"] = IGNORE
    names = ("MRI",) if spec.num_channels == 1 else tuple(f"MRI sequence {i + 1}" for i in range(spec.num_channels))
    description: dict[str, object] = {
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": labels,
        "numTraining": spec.num_labeled,
        "file_ending": ".nii.gz",
        "name": spec.name,
        "description": "Drawn by lgssl_nnunet.phantom; not a medical image.",
        "prompts": PROMPTS,
    }
    if spec.regions:
        description["regions_class_order"] = [LIVER, GALLBLADDER]
    return description
