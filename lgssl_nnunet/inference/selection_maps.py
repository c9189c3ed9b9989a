"""Selection maps: where text-vision selection fusion lets the fused feature pass, on the grid of each image."""

from __future__ import annotations

import copy
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.nn import functional

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.figures import save_png
from lgssl_nnunet.inference.predictor import Case, LGSSLPredictor, processes
from lgssl_nnunet.inference.selection_overlay import draw_selection

FOLDER = "selection_maps"
_FLOAT_READERS = (SimpleITKIO, NibabelIO, NibabelIOWithReorient)


class SelectionMapNetwork(nn.Module):
    """The selection map of a network as if it were its one channel of logits.

    Args:
        network: has `selection(x)`, which returns `(B, 1, x, y, z)` at the resolution of its bottleneck.

    Source: TVSF, LG-SSL (2025); methods.md 2.5.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps `(B, 1, X, Y, Z)` of images `(B, M, X, Y, Z)` (or 2D), fp32, in [0, 1]."""
        mode = "bilinear" if x.ndim == 4 else "trilinear"
        return functional.interpolate(self.network.selection(x).float(), x.shape[2:], mode=mode, align_corners=False)


class SelectionMapPredictor(LGSSLPredictor):
    """Predictor that also writes `selection_maps/<case>` and `selection_maps/<case>.png` for each case.

    The maps take the way of the logits: windows with the same weights, mirrored copies, folds, resampling. They are
    summed up in fp32 even with precision "stock", since the weights at the border of a window leave fp16 no digit
    between 0 and 1.

    Args:
        device: where the network runs.
        options: those of `LGSSLPredictor`.
    """

    def __init__(self, device: torch.device, **options: Any):
        super().__init__(device, **options)
        precision = "fp32" if self.precision == "stock" else self.precision
        self._maps = LGSSLPredictor(device, **{**options, "precision": precision})

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Load a model as `LGSSLPredictor` does, from the same arguments.

        Raises:
            UsageError: the model fuses no prompts, so it has no selection map.
        """
        super().load_model(*arguments, **options)
        network = getattr(self.network, "_orig_mod", self.network)  # torch.compile wraps it
        if not hasattr(network, "selection") or network.prompts is None:
            raise UsageError(
                f"--save_selection_maps: this model of {self.trainer_name} fuses no text prompts, so it selects "
                "nothing; leave the option out, or predict with a model of LGSSLTrainer that was trained with a "
                "prompt_mode other than none."
            )
        # A copy, because fp32 lays out its weights otherwise, which would change the last digits of the logits.
        self._maps.manual_initialization(
            SelectionMapNetwork(copy.deepcopy(network)),
            self.plans_manager,
            self.configuration_manager,
            [{f"network.{name}": value for name, value in weights.items()} for weights in self.list_of_parameters],
            self.dataset_json,
            self.trainer_name,
            self.allowed_mirroring_axes,
        )
        self._maps.label_manager = one_channel()

    def _writers(self, workers: int, save_probabilities: bool) -> Executor:
        return processes(workers)  # pictures are slow to draw, and matplotlib knows no threads

    def _infer(self, case: Case, data: np.ndarray, properties: dict) -> tuple[dict[str, np.ndarray], dict]:
        results, properties = super()._infer(case, data, properties)
        return {**results, "selection": self._maps._logits(data)}, properties

    def _write(
        self, folder: Path, case: Case, results: dict[str, np.ndarray], properties: dict, save_probabilities: bool
    ) -> None:
        super()._write(folder, case, results, properties, save_probabilities)
        selection = self._on_image_grid(results["selection"], properties)
        file, picture = (folder / path.relative_to(case.output.parent) for path in selection_map_files(case))
        file.parent.mkdir()
        write_map(selection, properties, file)
        image, _ = self.plans_manager.image_reader_writer_class().read_images([str(case.files[0])])
        save_png(draw_selection(image[0], selection, properties, case.name, self._is_ct()), picture)

    def _on_image_grid(self, selection: np.ndarray, properties: dict) -> np.ndarray:
        """Return a map (1, X, Y, Z) of the preprocessed image as (Z, Y, X) of the image as read; 0 outside the crop."""
        _, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            selection,
            self.plans_manager,
            self.configuration_manager,
            self._maps.label_manager,
            properties,
            return_probabilities=True,
        )
        return probabilities[0].astype(np.float32, copy=False)

    def _is_ct(self) -> bool:
        names = self.dataset_json.get("channel_names") or self.dataset_json.get("modality")
        return str(names["0"]).lower() == "ct"


def one_channel() -> LabelManager:
    """Return the labels by which nnU-Net treats one channel of numbers in [0, 1] like the probability of a region.

    A region has a channel of its own and 0 outside the crop; a class would have to share its channels with others.
    """
    return LabelManager({"background": 0, "selected": (1, 2)}, regions_class_order=[1], inference_nonlin=_to_unit_range)


def _to_unit_range(values: Tensor) -> Tensor:
    return values.clamp(0, 1)  # resampling may overshoot


def selection_map_files(case: Case) -> tuple[Path, Path]:
    """Return where the selection map of a case goes and where its picture; lgssl_report looks there too.

    In a folder of their own, because nnU-Net takes every image file beside the segmentations for a segmentation.
    """
    folder = case.output.parent / FOLDER
    return folder / case.output.name, folder / f"{case.name}.png"


def require_float_format(reader: type[BaseReaderWriter], file_ending: str) -> None:
    """Refuse images whose format cannot hold a selection map.

    Raises:
        UsageError: with the ways out.
    """
    if not issubclass(reader, _FLOAT_READERS):
        raise UsageError(
            f"--save_selection_maps: {file_ending} files as {reader.__name__} writes them hold whole numbers, and a "
            "selection map lies between 0 and 1; leave the option out, or plan and train on images in .nii.gz."
        )


def write_map(values: np.ndarray, properties: dict, file: Path) -> None:
    """Write numbers with the geometry of an image; nnU-Net's writers would make whole numbers of them.

    Args:
        values: float32 (Z, Y, X), as the image was read.
        properties: what nnU-Net's reader says of the image.
        file: the file; its ending chooses the format.
    """
    if "nibabel_stuff" in properties:
        nibabel.save(_nibabel_image(values, properties["nibabel_stuff"]), file)
    else:
        sitk.WriteImage(_itk_image(values, properties["sitk_stuff"]), str(file), True)


def _nibabel_image(values: np.ndarray, geometry: dict) -> nibabel.Nifti1Image:
    original = geometry["original_affine"]
    if "reoriented_affine" not in geometry:
        return nibabel.Nifti1Image(values.transpose(2, 1, 0), original)
    turned = nibabel.Nifti1Image(values.transpose(2, 1, 0), geometry["reoriented_affine"])
    return turned.as_reoriented(ornt_transform(axcodes2ornt("RAS"), io_orientation(original)))


def _itk_image(values: np.ndarray, geometry: dict) -> sitk.Image:
    image = sitk.GetImageFromArray(values if len(geometry["spacing"]) == 3 else values[0])
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    if "original_orientation" in geometry:
        image = sitk.DICOMOrient(image, geometry["original_orientation"])
    return image
