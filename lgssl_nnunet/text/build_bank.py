"""Makes the shipped embedding banks: `python -m lgssl_nnunet.text.build_bank [--averaged] [--output FILE]`.

Needs the `text` extra. Every structure of `bank/structures.json` gets its sentence in every modality (CT, MRI, other).
The vector belongs to that sentence, or with `--averaged` to all templates of the modality.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lgssl_nnunet.text.bank import AVERAGED_BANK, SHIPPED_BANK, EmbeddingBank, index_structures, load_structures
from lgssl_nnunet.text.encoders import MINILM_NAME, embed_texts, load_encoder
from lgssl_nnunet.text.prompts import MODALITIES, Prompt, phrase_prompt

logger = logging.getLogger(__name__)

_DROPPED_BITS = 3


def bank_texts(structures: Mapping[str, Sequence[str]], *, averaged: bool = False) -> list[Prompt]:
    """List the texts of the bank: every structure in every modality.

    Args:
        structures: Synonyms by structure name.
        averaged: Give each text the further templates of its modality as rewordings.
    """
    return [phrase_prompt(name, name, modality, ensemble=averaged) for name in structures for modality in MODALITIES]


def build_bank(output: str | Path | None = None, *, averaged: bool = False) -> EmbeddingBank:
    """Embed all structures with MiniLM and write the bank.

    Args:
        output: `.npz` file to write; None: the shipped bank of this kind.
        averaged: Average the vectors over all templates of the modality.

    Returns:
        The bank as written, before rounding.

    Raises:
        MissingDependencyError: The `text` extra is not installed.
        PromptError: The weights are not the expected ones, or two structures share a name.
    """
    structures = load_structures()
    index_structures(structures)
    texts = bank_texts(structures, averaged=averaged)
    encoder = load_encoder("minilm")
    sentences = tuple(text.sentence for text in texts)
    bank = EmbeddingBank(sentences, embed_texts(texts, encoder), MINILM_NAME, encoder.sha256)
    compact = EmbeddingBank(bank.prompts, _shorten(bank.embeddings), bank.encoder, bank.sha256)
    output = output or (AVERAGED_BANK if averaged else SHIPPED_BANK)
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
    parser = argparse.ArgumentParser(description="Make an embedding bank that the package ships.")
    parser.add_argument("--output", type=Path, help="file to write (default: the shipped bank of this kind)")
    parser.add_argument("--averaged", action="store_true", help="average over all templates of the modality")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parser.parse_args(argv)
    build_bank(arguments.output, averaged=arguments.averaged)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
