"""Makes the shipped embedding bank: `python -m lgssl_nnunet.text.build_bank [--output FILE]`.

Needs the `text` extra. Every structure of `bank/structures.json` gets its sentence in every template (CT, MRI, other).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lgssl_nnunet.text.bank import SHIPPED_BANK, EmbeddingBank, index_structures, load_structures
from lgssl_nnunet.text.encoders import MINILM_NAME, load_encoder
from lgssl_nnunet.text.prompts import MODALITIES, template_sentence

logger = logging.getLogger(__name__)

_DROPPED_BITS = 3


def bank_sentences(structures: Mapping[str, Sequence[str]]) -> list[str]:
    """List the sentences of the bank: every structure in every template."""
    return [template_sentence(name, modality) for name in structures for modality in MODALITIES]


def build_bank(output: str | Path = SHIPPED_BANK) -> EmbeddingBank:
    """Embed all structures with MiniLM and write the bank.

    Args:
        output: `.npz` file to write.

    Returns:
        The bank as written, before rounding.

    Raises:
        MissingDependencyError: The `text` extra is not installed.
        PromptError: The weights are not the expected ones, or two structures share a name.
    """
    structures = load_structures()
    index_structures(structures)
    sentences = bank_sentences(structures)
    encoder = load_encoder("minilm")
    bank = EmbeddingBank(tuple(sentences), encoder.encode(sentences), MINILM_NAME, encoder.sha256)
    compact = EmbeddingBank(bank.prompts, _shorten(bank.embeddings), bank.encoder, bank.sha256)
    compact.save(output)
    logger.info("Wrote %d prompts of %d structures to %s", len(sentences), len(structures), output)
    return bank


def _shorten(embeddings: np.ndarray) -> np.ndarray:
    """Round to float16 with 7 instead of 10 mantissa bits: the file is a third smaller, the cosine off by 2e-6."""
    bits = embeddings.astype(np.float16).view(np.uint16)
    half = 1 << (_DROPPED_BITS - 1)
    return ((bits + half) >> _DROPPED_BITS << _DROPPED_BITS).astype(np.uint16).view(np.float16)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and build the bank."""
    parser = argparse.ArgumentParser(description="Make the embedding bank that the package ships.")
    parser.add_argument("--output", type=Path, default=SHIPPED_BANK, help="file to write (default: the shipped bank)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build_bank(parser.parse_args(argv).output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
