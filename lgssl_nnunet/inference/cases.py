"""Turns a file, a folder or lists of files into cases, and finds what is wrong with them.

Names, headers and sizes are checked before any work starts, voxels when a case is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.volumes import (
    last_line,
    require_whole,
    require_whole_nifti,
)
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.plans.sidedness import LeftRight

Inputs = str | Path | Sequence[Sequence[str | Path]]

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".tif", ".tiff", ".jpg", ".dcm")
_NIFTI_ENDINGS = (".nii.gz", ".nii")
_ITK_ENDINGS = (*_NIFTI_ENDINGS, ".nrrd", ".mha", ".gipl")
_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class ImageRules:
    """What a model expects of its images.

    Attributes:
        channel_names: one per channel, in order.
        file_ending: for example `.nii.gz`.
        reader: the reader of the model's plans.
        left_right: how its own images lay, where its classes have sides and training did not mirror these.
    """

    channel_names: tuple[str, ...]
    file_ending: str
    reader: type[BaseReaderWriter]
    left_right: LeftRight | None = None

    def channel(self, index: int) -> str:
        """Return how a channel is called and how its files end, for messages."""
        name = self.channel_names[index] if index < len(self.channel_names) else "not a channel of the model"
        return f"_{index:04d}{self.file_ending} ({name})"


@dataclass
class _Findings:
    """Images by case name, and the problems met on the way."""

    files: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def collect_images(inputs: Inputs, rules: ImageRules) -> dict[str, tuple[Path, ...]]:
    """Return the image files of each case, in channel order, by case name and sorted by it.

    Args:
        inputs: one image file (single-channel models), a folder of `<case>_<channel>` files, or one list of
            channel files per case.
        rules: what the model expects.

    Raises:
        DatasetError: all problems together: nothing to predict, wrong file ending, missing or surplus channels,
            files whose header cannot be read or that end too early.
    """
    if isinstance(inputs, (str, Path)):
        source = Path(inputs).expanduser()
        if not source.exists():
            raise DatasetError(f"The input {source} does not exist; give an image or a folder of images.")
        found = _from_file(source, rules) if source.is_file() else _from_folder(source, rules)
    else:
        found = _from_lists(inputs, rules)
    for name, files in found.files.items():
        found.problems += _image_problems(name, files, rules)
    if found.problems:
        shown = found.problems[:_MAX_PROBLEMS]
        more = len(found.problems) - len(shown)
        tail = f"\n  ... and {more} more" if more else ""
        raise DatasetError("The input does not fit the model:\n" + "\n".join(f"  {p}" for p in shown) + tail)
    return dict(sorted(found.files.items()))


def case_and_channel(file: Path, file_ending: str) -> tuple[str, int | None]:
    """Split `liver_1_0000.nii.gz` into `liver_1` and 0; the channel is None where the name has none."""
    stem = file.name.removesuffix(file_ending)
    match = _CHANNEL.fullmatch(stem)
    return (match.group(1), int(match.group(2))) if match else (stem, None)


def segmentation_problem(file: Path, image: Path, rules: ImageRules) -> str | None:
    """Return why a segmentation that is there cannot be kept: damaged, or on another grid than its image; else None.

    Raises:
        OSError: the system cannot read it, which tells nothing of the segmentation.
        MemoryError: there is not enough memory to read it.
    """
    try:
        require_whole(file)
        if not file.name.endswith(_NIFTI_ENDINGS):
            rules.reader().read_seg(str(file))
        grid, wanted = (_channels_and_grid(path, rules)[1] for path in (file, image))
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        return f"cannot be read ({last_line(error)})"
    return next(iter(grid.differences(wanted, "its image")), None)


def _from_file(file: Path, rules: ImageRules) -> _Findings:
    if not file.name.endswith(rules.file_ending):
        return _Findings(problems=[_wrong_ending(file, rules)])
    name, channel = case_and_channel(file, rules.file_ending)
    if channel not in (None, 0):
        name = file.name.removesuffix(rules.file_ending)
    if len(rules.channel_names) > 1 and _stored_channels(file, rules) != len(rules.channel_names):
        missing = [rules.channel(i) for i in range(len(rules.channel_names)) if i != (channel or 0)]
        problem = f"{file}: one file has one channel, and the model also needs {', '.join(missing)}; give the folder"
        return _Findings(problems=[problem])
    return _Findings(files={name: (file,)})


def _from_folder(folder: Path, rules: ImageRules) -> _Findings:
    images = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    fitting = [file for file in images if file.name.endswith(rules.file_ending)]
    others = [file for file in images if file not in fitting and file.name.lower().endswith(_IMAGE_ENDINGS)]
    found = _Findings(problems=[_wrong_ending(file, rules) for file in others])
    if not fitting and not others:
        found.problems.append(f"{folder}: no file ends in {rules.file_ending}; give the folder of the images")
    cases: dict[str, dict[int, Path]] = {}
    for file in fitting:
        name, channel = case_and_channel(file, rules.file_ending)
        if channel is None:
            expected = f"{name}_0000{rules.file_ending}"
            found.problems.append(f"{file.name}: the name has no channel number; rename it, for example to {expected}")
        else:
            cases.setdefault(name, {})[channel] = file
    for name, channels in cases.items():
        _add_channels(found, name, channels, rules)
    return found


def _add_channels(found: _Findings, name: str, channels: dict[int, Path], rules: ImageRules) -> None:
    wanted = range(len(rules.channel_names))
    files = tuple(channels[index] for index in sorted(channels))
    missing = [rules.channel(index) for index in wanted if index not in channels]
    surplus = [rules.channel(index) for index in sorted(channels) if index not in wanted]
    if missing and 0 in channels and sum(_stored_channels(file, rules) or 1 for file in files) == len(wanted):
        missing = []  # colour images hold all their channels in one file
    if missing:
        found.problems.append(f"{name}: channel {', '.join(missing)} is missing")
    if surplus:
        found.problems.append(f"{name}: the model has {len(wanted)} channel(s), so {', '.join(surplus)} is too many")
    if not missing and not surplus:
        found.files[name] = files


def _from_lists(lists: Sequence[Sequence[str | Path]], rules: ImageRules) -> _Findings:
    found = _Findings()
    if not lists:
        found.problems.append("the list of cases is empty")
    for entry in lists:
        files = tuple(Path(file).expanduser() for file in entry)
        problems = [f"{file} does not exist; correct the list" for file in files if not file.is_file()]
        problems += [_wrong_ending(file, rules) for file in files if not file.name.endswith(rules.file_ending)]
        name = _listed_name(files[0], rules) if files else "(empty list)"
        if not problems and sum(_stored_channels(file, rules) or 1 for file in files) != len(rules.channel_names):
            wanted = ", ".join(rules.channel_names)
            problems.append(f"{name}: {len(files)} file(s) given, and the model needs the channels {wanted}")
        problems += [] if problems else _naming_problems(files, rules)
        if name in found.files:
            problems.append(f"{name}: two cases have this name, so one segmentation would overwrite the other")
        found.problems += problems
        if not problems:
            found.files[name] = files
    return found


def _listed_name(file: Path, rules: ImageRules) -> str:
    """Return a case's name by its first file: without a number that tells a channel, with one that is a year."""
    name, channel = case_and_channel(file, rules.file_ending)
    return name if channel in range(len(rules.channel_names)) else file.name.removesuffix(rules.file_ending)


def _naming_problems(files: Sequence[Path], rules: ImageRules) -> list[str]:
    """Return where a case has one file twice, or the names of its files contradict their places in the list.

    A number at the end of a name may also be a year, or 0 in each name. Numbers tell channels where every file has one,
    each another, and the model has these channels.
    """
    if len({file.resolve() for file in files}) < len(files):
        return [f"{files[0]}: its case lists one file twice; list each channel's own"]
    cases, channels = zip(*(case_and_channel(file, rules.file_ending) for file in files), strict=True)
    wanted = range(len(rules.channel_names))
    if len(set(channels) & set(wanted)) < len(files):
        return []
    problems = [
        f"{file}: its name tells another case than {files[0].name}; list the channels of one case together"
        for file, case in zip(files, cases, strict=True)
        if case != cases[0]
    ]
    if not problems and len(files) == len(wanted):
        problems = [
            f"{file}: it is listed as {rules.channel(place)} and its name tells another channel; list the channels in "
            "order or rename the file"
            for place, file, channel in zip(wanted, files, channels, strict=True)
            if channel != place
        ]
    return problems


def _wrong_ending(file: Path, rules: ImageRules) -> str:
    return f"{file.name}: the model reads {rules.file_ending} files only; convert it or move it away"


def _stored_channels(file: Path, rules: ImageRules) -> int | None:
    """Return how many channels a file holds, None if it cannot be read."""
    try:
        return _channels_and_grid(file, rules)[0]
    except Exception:
        return None


def _image_problems(name: str, files: Sequence[Path], rules: ImageRules) -> list[str]:
    """Return what is wrong with the files of one case, from headers and sizes; voxels are checked when it is read."""
    problems, grids, channels = [], {}, 0
    for file in files:
        try:
            stored, grid = _channels_and_grid(file, rules)
            require_whole_nifti(file)
        except DatasetError as error:
            problems.append(f"{file}: {error}")
            continue
        except Exception as error:
            problems.append(f"{file}: cannot be read ({last_line(error)}); write it again or remove it")
            continue
        channels += stored
        grids[file] = grid
    if problems:
        return problems
    for file, grid in grids.items():
        differences = grid.differences(grids[files[0]], files[0].name)
        problems += [f"{file.name}: {what}; re-export or resample the channels together" for what in differences]
    if problems:
        return problems
    if channels != len(rules.channel_names):
        return [f"{name}: the files hold {channels} channels, and the model needs {len(rules.channel_names)}"]
    return []


def _channels_and_grid(file: Path, rules: ImageRules) -> tuple[int, Geometry]:
    """Return the number of channels in a file and its grid, from the header where the format has one.

    Other formats keep no grid with the voxels: all of theirs have spacing 1.
    """
    if not file.name.endswith(_ITK_ENDINGS):
        shape = rules.reader().read_images([str(file)])[0].shape
        return int(shape[0]), Geometry(tuple(int(n) for n in shape[1:]), (1.0,) * (len(shape) - 1))
    if file.name.endswith(_NIFTI_ENDINGS) and not issubclass(rules.reader, SimpleITKIO):
        image = nibabel.load(file)
        axes, spacing = image.affine[:3, :3], nibabel.affines.voxel_sizes(image.affine)
        with np.errstate(invalid="ignore"):  # a spacing of 0 is told below
            direction = tuple((axes / spacing).ravel())
        geometry = Geometry(tuple(int(n) for n in image.shape), tuple(spacing), tuple(image.affine[:3, 3]), direction)
    else:
        header = sitk.ImageFileReader()
        header.SetFileName(str(file))
        header.ReadImageInformation()
        if header.GetNumberOfComponents() > 1:
            raise DatasetError(f"each voxel is a vector of {header.GetNumberOfComponents()} numbers; save one per file")
        size = tuple(int(n) for n in header.GetSize())
        geometry = Geometry(size, header.GetSpacing(), header.GetOrigin(), header.GetDirection())
    if geometry.fault:
        raise DatasetError(f"{geometry.fault}; correct its header or export it again")
    if len(geometry.size) > 3:
        raise DatasetError(f"the image has {len(geometry.size)} dimensions; save each channel as a file of its own")
    return 1, geometry
