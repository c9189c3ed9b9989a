"""What a user changed in the dataset.json of a merged dataset stays when the merge is continued."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.files import read_json, read_json_if_valid, write_json

logger = logging.getLogger(__name__)


def with_edits(content: Mapping[str, Any], file: Path, copy: Path) -> dict[str, Any]:
    """Return what the merge is to write, with the entries that a user changed, added or removed since it last wrote.

    Args:
        content: what the merge would write.
        file: its dataset.json, which need not exist.
        copy: what the merge wrote last, as `write_with_edits` left it.

    Raises:
        DatasetError: the file is not valid JSON.
        UsageError: an entry was changed by the user and is not what it was for the merge either.
    """
    if not file.exists():
        return dict(content)
    found, written = read_json(file), read_json_if_valid(copy) or {}
    if not isinstance(found, dict):
        raise DatasetError(f"{file}: holds no JSON object; correct it, or move it away.")
    edited = [key for key in {**written, **found} if found.get(key) != written.get(key)]
    unclear = [key for key in edited if content.get(key) not in (written.get(key), found.get(key))]
    if unclear:
        reason = "was changed in what the merge has to write anew"
        if not written:
            reason = f"is to be written anew, and without {copy.name} your changes cannot be told from what was merged"
        raise UsageError(
            f"{file}: {reason} ({', '.join(unclear)}); move it away, run the command again and make your changes in "
            "the new one."
        )
    kept = {key: found[key] for key in edited if key in found}
    return {**{key: entry for key, entry in content.items() if key not in edited or key in kept}, **kept}


def write_with_edits(content: Mapping[str, Any], file: Path, copy: Path) -> None:
    """Write what `with_edits` returns, and the copy by which it will know what a user changes from now on.

    Raises:
        DatasetError, UsageError: as `with_edits`.
    """
    written = with_edits(content, file, copy)
    kept = [key for key in {**content, **written} if content.get(key) != written.get(key)]
    if kept:
        logger.info("%s keeps what was changed in it since the merge: %s.", file.name, ", ".join(kept))
    # In this order: if only the first was written, every entry of it is one that the next call would write.
    write_json(written, file)
    write_json(content, copy)
