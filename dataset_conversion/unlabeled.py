"""Further images without segmentations, given with `--unlabeled`."""

from __future__ import annotations

from pathlib import Path

from lgssl_nnunet.dataset_conversion.dataset import UNLABELED, PreparedCase, PrepareOptions, SourceCase
from lgssl_nnunet.dataset_conversion.volumes import (
    VOLUME_ENDINGS,
    clean_identifier,
    find_files,
    read_volume,
    volume_name,
)
from lgssl_nnunet.errors import DatasetError


def find_unlabeled_cases(folder: Path) -> list[SourceCase]:
    """Return a case for every volume below a folder, named after its path.

    Raises:
        DatasetError: there is none.
    """
    files = find_files(folder, *(f"*{ending}" for ending in VOLUME_ENDINGS))
    if not files:
        raise DatasetError(f"{folder}: holds no volume ({', '.join(VOLUME_ENDINGS)}); check --unlabeled.")
    return [SourceCase(_name(file, folder), file, part=UNLABELED) for file in files]


def prepare_image(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read an image as it is; nothing is known that could be repaired."""
    return PreparedCase(read_volume(case.image), image_as_is=True)


def _name(file: Path, folder: Path) -> str:
    parents = file.relative_to(folder).parent.parts
    return clean_identifier("_".join((*parents, volume_name(file).removesuffix("_0000"))))
