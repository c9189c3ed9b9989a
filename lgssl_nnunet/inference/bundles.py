"""Model bundles: all that a trained model needs to predict, in one file that holds nothing that could be run.

A bundle is a zip archive of `manifest.json`, `plans.json`, `dataset.json` and a `fold_<fold>/<checkpoint>.safetensors`
for each fold and checkpoint. It is read in memory, never unpacked, and nothing in it is compressed, so that nothing
becomes larger than the file. Imports neither torch nor nnU-Net.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lgssl_nnunet.dataset_conversion.geometry import are_spatial_axes
from lgssl_nnunet.errors import CheckpointError
from lgssl_nnunet.files import parse_json

FORMAT = "lgssl_nnunet model bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DESCRIPTIONS = ("plans.json", "dataset.json")
MAX_MEMBERS = 1000
MAX_JSON_BYTES = 64 * 2**20

_WEIGHTS = re.compile(r"fold_(all|[0-9]{1,4})/[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors")
_CHECKPOINT, _SAFETENSORS = ".pth", ".safetensors"
_TIME = (1980, 1, 1, 0, 0, 0)  # the same model gives the same bytes


@dataclass(frozen=True)
class Member:
    """A file in a bundle, as the manifest describes it."""

    size: int
    sha256: str


@dataclass(frozen=True)
class BundledWeights:
    """The weights of one fold, and when their checkpoint was written."""

    fold: str
    checkpoint: str
    written: datetime


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read and agrees with the members; their content is checked when it is read.

    Attributes:
        file: the archive.
        dataset: full name.
        trainer: class name.
        plans: plans identifier.
        configuration: for example 3d_fullres.
        mirroring_axes: as in a checkpoint of nnU-Net.
        weights: one entry per fold and checkpoint.
        members: all files but the manifest, by name.
    """

    file: Path
    dataset: str
    trainer: str
    plans: str
    configuration: str
    mirroring_axes: tuple[int, ...] | None
    weights: tuple[BundledWeights, ...]
    members: Mapping[str, Member]

    def read(self, name: str) -> bytes:
        """Return the content of a member.

        Raises:
            CheckpointError: the archive has changed or is damaged.
        """
        described = self.members[name]
        with _opened(self.file) as archive:
            content = archive.read(_entries(archive, self.file)[name])
        if len(content) != described.size or hashlib.sha256(content).hexdigest() != described.sha256:
            raise _damaged(self.file, f"{name} is not what {MANIFEST} says")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Return `plans.json` or `dataset.json`.

        Raises:
            CheckpointError: as for `read`, or it is no JSON object.
        """
        return _parse(self.read(name), self.file, name)


def weights_member(fold: str, checkpoint: str) -> str:
    """Return the name of the member with the weights of a checkpoint.

    Raises:
        CheckpointError: the checkpoint's name does not fit into a bundle.
    """
    member = f"fold_{fold}/{checkpoint.removesuffix(_CHECKPOINT)}{_SAFETENSORS}"
    if not checkpoint.endswith(_CHECKPOINT) or not _WEIGHTS.fullmatch(member):
        raise CheckpointError(
            f"{checkpoint} of fold {fold} cannot be named in a bundle; call it by letters, digits, _ and -, and .pth."
        )
    return member


class BundleWriter:
    """Writes a bundle member by member, the manifest last.

    Args:
        file: where it goes.
    """

    def __init__(self, file: Path) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._members: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def add(self, name: str, content: bytes) -> None:
        """Write a member."""
        self._write(name, content)
        self._members[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a member as JSON."""
        self.add(name, json_bytes(content))

    def finish(
        self,
        model: Mapping[str, str],
        mirroring_axes: tuple[int, ...] | None,
        weights: list[BundledWeights],
        versions: Mapping[str, str],
    ) -> None:
        """Write the manifest.

        Args:
            model: dataset, trainer, plans and configuration.
            mirroring_axes: as in a checkpoint of nnU-Net.
            weights: what was added under `weights_member`.
            versions: of the packages that wrote the bundle.
        """
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": dict(model),
            "mirroring_axes": mirroring_axes,
            "weights": [
                {"fold": part.fold, "checkpoint": part.checkpoint, "written": part.written.isoformat()}
                for part in weights
            ],
            "versions": dict(versions),
            "members": self._members,
        }
        self._write(MANIFEST, json_bytes(manifest))

    def _write(self, name: str, content: bytes) -> None:
        self._archive.writestr(plain_entry(name), content)


def plain_entry(name: str) -> zipfile.ZipInfo:
    """Return the entry of a regular, uncompressed file that does not tell when and where it was written."""
    entry = zipfile.ZipInfo(name, _TIME)
    entry.create_system = 3  # Unix, wherever it is written
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return a JSON object as it is written into archives."""
    return (json.dumps(content, indent=4) + "\n").encode()


def open_bundle(file: Path) -> Bundle:
    """Return the bundle in a file, after everything but the content of its members has been checked.

    Raises:
        CheckpointError: the file is no bundle, of a newer format, damaged, or holds what does not belong there.
    """
    with _opened(file) as archive:
        if MANIFEST not in archive.namelist():
            raise _no_bundle(file, f"it has no {MANIFEST}")
        entries = _entries(archive, file)
        content = _parse(archive.read(entries[MANIFEST]), file, MANIFEST)
    if content.get("format") != FORMAT:
        raise _no_bundle(file, f"its {MANIFEST} is something else")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} is a bundle of format {str(content.get('format_version'))[:20]}, and this version of lgssl_nnunet "
            f"reads format {FORMAT_VERSION}: install a newer one."
        )
    try:
        bundle = _from_manifest(file, content)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(file, f"{MANIFEST} lacks something or has it wrong: {str(error)[:100]}") from error
    _require_described(bundle, {name: entry.file_size for name, entry in entries.items() if name != MANIFEST})
    return bundle


def _from_manifest(file: Path, content: Mapping[str, Any]) -> Bundle:
    axes, weights = content["mirroring_axes"], tuple(map(_weights, content["weights"]))
    if axes is not None and not are_spatial_axes(axes):
        raise ValueError("mirroring_axes")
    members = {name: Member(entry["size"], entry["sha256"]) for name, entry in content["members"].items()}
    if set(members) != {*DESCRIPTIONS, *(weights_member(part.fold, part.checkpoint) for part in weights)}:
        raise ValueError("members")
    model = {name: content["model"][name] for name in ("dataset", "trainer", "plans", "configuration")}
    if not all(isinstance(name, str) and name.isprintable() for name in model.values()):
        raise ValueError("model")
    return Bundle(file, **model, mirroring_axes=None if axes is None else tuple(axes), weights=weights, members=members)


def _weights(entry: Mapping[str, str]) -> BundledWeights:
    written = datetime.fromisoformat(entry["written"])
    if written.tzinfo is None or not isinstance(entry["fold"], str):
        raise ValueError("weights")
    return BundledWeights(entry["fold"], entry["checkpoint"], written)


def _require_described(bundle: Bundle, sizes: Mapping[str, int]) -> None:
    """Refuse members that the manifest does not describe, and the other way round."""
    surplus, missing = sorted(set(sizes) - set(bundle.members)), sorted(set(bundle.members) - set(sizes))
    if surplus:
        raise _damaged(bundle.file, f"it holds {surplus[0]}, which its {MANIFEST} does not name")
    if missing:
        raise _damaged(bundle.file, f"it lacks {missing[0]}")
    wrong = [name for name, size in sizes.items() if size != bundle.members[name].size]
    if wrong:
        raise _damaged(bundle.file, f"{wrong[0]} has another size than {MANIFEST} says")


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; whatever zipfile finds wrong with it becomes one sentence."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _no_bundle(file, str(error)) from error
    with archive:
        try:
            yield archive
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
            raise _damaged(file, str(error)[:100]) from error


def _entries(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name, if all of them may be in a bundle."""
    listed = archive.infolist()
    if len(listed) > MAX_MEMBERS:
        raise _damaged(file, f"it holds {len(listed)} files")
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        name = entry.orig_filename
        problem = _problem(entry) or (f"it holds {name} twice" if name in entries else "")
        if problem:
            raise _damaged(file, problem)
        entries[name] = entry
    declared, there = sum(entry.file_size for entry in listed), file.stat().st_size
    if declared > there:
        raise _damaged(file, f"its files are said to have {declared} bytes, and the archive has {there}")
    return entries


def _problem(entry: zipfile.ZipInfo) -> str:
    """Return what is wrong with a member, judged by its entry alone; empty if nothing is."""
    name = entry.orig_filename
    if name not in (MANIFEST, *DESCRIPTIONS) and not _WEIGHTS.fullmatch(name):
        return f"it holds {name[:100]!r}, which is no part of a bundle"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return f"it holds {name} as a link or another special file"
    if entry.flag_bits & 1:
        return f"{name} is encrypted"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return f"{name} is compressed, which nothing in a bundle is"
    if name.endswith(".json") and entry.file_size > MAX_JSON_BYTES:
        return f"{name} has {entry.file_size} bytes, more than {MAX_JSON_BYTES}"
    return ""


def _parse(content: bytes, file: Path, name: str) -> dict[str, Any]:
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise _damaged(file, f"{name} is no JSON: {str(error)[:100]}") from error
    if not isinstance(parsed, dict):
        raise _damaged(file, f"{name} is no JSON object")
    return parsed


def _no_bundle(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is no model bundle ({reason}): give a bundle of lgssl_export_model, or the folder that holds "
        "plans.json and fold_*; if it is nnU-Net's, unpack it first (nnUNetv2_install_pretrained_model_from_zip)."
    )


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not as lgssl_export_model wrote it ({reason}): get the bundle again from where it was made."
    )
