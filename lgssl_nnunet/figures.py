"""Saving pictures in which names of classes, cases and datasets stand as they were given."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lgssl_nnunet.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MISSING_GLYPH = r"Glyph (\d+) .*missing from"
"""Beginning of matplotlib's warning of a character that its font lacks, which comes once for each place."""


def save_png(figure: Figure, file: str | Path) -> None:
    """Save a figure as PNG, and say in one sentence which characters of its text cannot be drawn.

    Names that a user gave are put into a figure with `parse_math=False`: matplotlib takes what stands between two
    dollar signs for a formula.

    Args:
        figure: the figure.
        file: the file; a folder that is missing is made.
    """
    file = Path(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_atomically(file, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    missing = []
    for warning in caught:
        if glyph := re.match(MISSING_GLYPH, str(warning.message)):
            missing.append(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        characters = "".join(dict.fromkeys(missing))
        logger.warning("%s: matplotlib's font lacks %s, so boxes are drawn in their place.", file.name, characters)
