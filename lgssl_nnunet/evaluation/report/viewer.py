"""The interactive viewer of a report: NiiVue's script, taken from where it is installed, and volumes packed for it."""

from __future__ import annotations

import base64
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from lgssl_nnunet.errors import MissingDependencyError, install_extra
from lgssl_nnunet.evaluation.report.volumes import MARGIN_MM, Volume, box_around, coarsened, cropped, nifti_bytes

logger = logging.getLogger(__name__)

WIDGET = "static/widget.js"
WITHOUT_VIEWER = (
    "The interactive viewer is left out, because NiiVue's script was not found when this report was written: run "
    f"{install_extra('viewer')}, or name a file of npm's @niivue/niivue with --niivue, and write the report again."
)
_EXPORT = re.compile(r"export\s*\{([^{}]*)\}\s*;?\s*(?://# sourceMappingURL=\S*\s*)?$")
_PERCENT_ENCODED = re.compile(r'"((?:[^"\\]|\\.)*export(?:%20)*%7B[^"]*)"')
_IMPORT = re.compile(r"^\s*import\b[^;(]*?\bfrom\s*[\"']", re.MULTILINE)
_UMD = re.compile(r"\.niivue\s*=\s*\{\}")
_BEST_COMPRESSION = 8  # voxels per character; larger volumes are not even tried, because packing takes long
_WANTED = ("Niivue", "NVImage")


@dataclass(frozen=True)
class ViewerCase:
    """One case for the viewer.

    Attributes:
        name: case id.
        layers: base64 of .nii.gz files by layer: "image", "reference", "prediction" and selection maps by name.
        remark: how the volumes differ from the files they were made from.
        center: where to look first, as fractions of the volume along x, y and z.
    """

    name: str
    layers: dict[str, str]
    remark: str
    center: tuple[float, float, float]


def niivue_script(file: Path | None = None) -> str | None:
    """Return a script that puts NiiVue into `globalThis.niivue`, ready to stand in a page.

    Args:
        file: a self-contained build of npm's @niivue/niivue; None takes the one in the package ipyniivue.

    Returns:
        JavaScript for `<script type="module">`; None if no file is named and ipyniivue is not installed or holds no
        NiiVue that can be used (which is logged).

    Raises:
        MissingDependencyError: the named file is missing or not such a build.
    """
    if file is not None:
        return _script_of(file)
    widget = _installed_widget()
    if widget is None:
        return None
    try:
        return _script_of(widget)
    except MissingDependencyError as error:
        logger.warning("%s The report is written without the viewer.", error)
        return None


def _installed_widget() -> Path | None:
    """Return ipyniivue's script without importing the package, which would start Jupyter's machinery."""
    found = importlib.util.find_spec("ipyniivue")
    if found is None or not found.origin:
        return None
    widget = Path(found.origin).parent / WIDGET
    return widget if widget.is_file() else None


def _script_of(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingDependencyError(f"{file}: NiiVue's script cannot be read ({error}); name another file.") from error
    script = _as_global(text)
    if script is None:
        raise MissingDependencyError(
            f"{file} is no self-contained build of NiiVue; take dist/niivue.umd.js or dist/index.js of npm's "
            f"@niivue/niivue, or run {install_extra('viewer')}."
        )
    # The page's parser looks for these even inside a script; in JavaScript the backslash changes nothing.
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _as_global(text: str) -> str | None:
    """Return a build as a script that sets `globalThis.niivue`, None if it is none.

    Three forms are known: the UMD build, which does so by itself; an ES module, whose last export is replaced; and an
    ES module that is held, percent-encoded, in a string. Of the last form are npm's index.min.js and ipyniivue's
    widget, because NiiVue writes that text into the pages that its own saveHTML makes.
    """
    if _UMD.search(text[:2000]):
        return text
    exported = _EXPORT.search(text)
    if exported and not _IMPORT.search(text):
        names = _exported_names(exported[1])
        if all(name in names for name in _WANTED):
            members = ", ".join(f"{name}: {names[name]}" for name in _WANTED)
            return f"{text[: exported.start()]}\nglobalThis.niivue = {{{members}}};"
    held = _PERCENT_ENCODED.search(text)
    return _as_global(unquote(held[1])) if held else None


def _exported_names(members: str) -> dict[str, str]:
    """Return local names by exported name from the inside of an export's braces."""
    pairs = [member.split() for member in members.split(",") if member.strip()]
    return {words[-1]: words[0] for words in pairs}


def pack_case(
    name: str,
    image: Volume | None,
    labels: Mapping[str, Volume],
    maps: Mapping[str, Volume],
    limit: int,
) -> ViewerCase:
    """Pack the volumes of one case so that they take at most about `limit` characters.

    What is too large is first cropped to the labels with a margin, then thinned out, finest axes first.

    Args:
        name: case id.
        image: windowed image (uint8), or None.
        labels: label maps by layer name, on the same grid.
        maps: selection maps by name, windowed (uint8), on the same grid.
        limit: characters for all layers together.
    """
    volumes = {**({"image": image} if image else {}), **labels, **maps}
    changes = ["intensities cut to the window and kept as 8 bits"] if image or maps else []
    packed = _encoded(volumes, limit)
    if packed is None:
        foreground = np.logical_or.reduce([volume.voxels > 0 for volume in labels.values()])
        box = box_around(foreground, next(iter(labels.values())).spacing)
        if np.prod([side.stop - side.start for side in box]) < foreground.size:
            volumes = {layer: cropped(volume, box) for layer, volume in volumes.items()}
            changes.append(f"cropped to the segmentations with a margin of {MARGIN_MM:.0f} mm")
            packed = _encoded(volumes, limit)
    steps = (1, 1, 1)
    while packed is None:
        thinning = _finer_axes(next(iter(volumes.values())).spacing)
        volumes = {layer: coarsened(volume, thinning) for layer, volume in volumes.items()}
        steps = tuple(old * new for old, new in zip(steps, thinning, strict=True))
        packed = _encoded(volumes, limit)
    if steps != (1, 1, 1):
        changes.append("only every n-th voxel, n = {2}, {1}, {0} along x, y, z".format(*steps))
    return ViewerCase(name, packed, "; ".join(changes), _center([volumes[layer] for layer in labels]))


def _center(labels: Sequence[Volume]) -> tuple[float, float, float]:
    """Return where the first label map that is not empty has its middle, as fractions to the right, front and head."""
    for volume in labels:
        voxels = np.argwhere(volume.voxels > 0)
        if len(voxels):
            fractions = (np.median(voxels, axis=0) + 0.5) / volume.voxels.shape
            z, y, x = (float(value) for value in fractions)
            # NiiVue counts to the right and to the front, an oriented volume to the left and to the back.
            return (1 - x, 1 - y, z) if volume.oriented else (x, y, z)
    return (0.5, 0.5, 0.5)


def _finer_axes(spacing: Sequence[float]) -> tuple[int, int, int]:
    """Return 2 for the axes that are about as fine as the finest, 1 for those that are already coarse."""
    return tuple(2 if value < 1.5 * min(spacing) else 1 for value in spacing)


def _encoded(volumes: Mapping[str, Volume], limit: int) -> dict[str, str] | None:
    """Return the volumes as base64 of .nii.gz, None if they take more than `limit` characters."""
    first = next(iter(volumes.values())).voxels
    if first.size > _BEST_COMPRESSION * limit:
        return None
    packed = {layer: base64.b64encode(nifti_bytes(volume)).decode() for layer, volume in volumes.items()}
    return packed if first.size == 1 or sum(map(len, packed.values())) <= limit else None
