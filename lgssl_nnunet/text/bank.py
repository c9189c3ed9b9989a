"""The embedding bank: prompts and their vectors in one `.npz`, so that planning needs no text encoder.

Format, all plain arrays that load without pickles: `prompts` (N,) text, `embeddings` (N, T) float16 or float32,
`encoder` and `sha256` (of the encoder's weights) as single texts. Prompts that differ in case or punctuation alone are
one prompt and have one vector. The shipped banks store unit vectors as float16 (rounded further by `build_bank`);
renormalised on loading, their cosine to the exact vectors is above 0.99999.

Two banks are shipped, with the same prompts: one with the vector of each sentence, one with the mean direction of all
templates of its modality, which ensembling takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from lgssl_nnunet.errors import PromptError
from lgssl_nnunet.text.prompts import Prompt, template_sentence

BANK_FOLDER = Path(__file__).parent / "bank"
SHIPPED_BANK = BANK_FOLDER / "minilm.npz"
AVERAGED_BANK = BANK_FOLDER / "minilm_averaged.npz"
STRUCTURES_FILE = BANK_FOLDER / "structures.json"

_MAX_BYTES = 1 << 30
_ARRAYS = ("prompts", "embeddings", "encoder", "sha256")
_SAME_VECTOR = 0.9999  # cosine; roundings of one vector lie above it


@dataclass(frozen=True, eq=False)
class BankEntry:
    """What a look-up found.

    Attributes:
        sentence: The bank's sentence, as it was embedded.
        embedding: Unit vector (T,), float32.
        matched: How it was found: `sentence`, `class name` or `synonym`.
    """

    sentence: str
    embedding: np.ndarray
    matched: str


@dataclass(frozen=True, eq=False)
class EmbeddingBank:
    """Prompts with their embeddings and the encoder that made them.

    Attributes:
        prompts: N prompts, sentences or bare phrases.
        embeddings: (N, T) float32 unit vectors.
        encoder: Name of the encoder.
        sha256: Checksum of the encoder's weights.
    """

    prompts: tuple[str, ...]
    embeddings: np.ndarray
    encoder: str
    sha256: str

    @classmethod
    def load(cls, path: str | Path = SHIPPED_BANK) -> EmbeddingBank:
        """Read and check a bank.

        Args:
            path: `.npz` file in the format of this module.

        Returns:
            The bank with renormalised float32 vectors.

        Raises:
            PromptError: The file is missing, damaged or not a bank, or has two vectors for one prompt.
        """
        path = Path(path)
        arrays = _read_arrays(path)
        prompts, embeddings = arrays["prompts"], arrays["embeddings"]
        if prompts.ndim != 1 or prompts.dtype.kind != "U" or embeddings.ndim != 2 or embeddings.dtype.kind != "f":
            raise PromptError(f"Bank {path} must hold `prompts` (N,) as text and `embeddings` (N, T) as floats.")
        if any(arrays[name].ndim or arrays[name].dtype.kind != "U" for name in ("encoder", "sha256")):
            raise PromptError(f"Bank {path} must hold `encoder` and `sha256` as single texts: make it again.")
        if len(prompts) != len(embeddings) or embeddings.size == 0:
            raise PromptError(
                f"Bank {path} has {len(prompts)} prompts and {len(embeddings)} embeddings: make it again."
            )
        vectors = embeddings.astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not (norms > 0).all():
            raise PromptError(f"Bank {path} holds embeddings that are not finite or are all zero: make it again.")
        bank = cls(
            tuple(str(prompt) for prompt in prompts),
            (vectors / norms).astype(np.float32),
            str(arrays["encoder"]),
            str(arrays["sha256"]),
        )
        _require_one_vector_each(path, bank)
        return bank

    def save(self, path: str | Path, dtype: type[np.floating] = np.float16) -> None:
        """Write the bank; the same content gives the same bytes."""
        np.savez_compressed(
            Path(path),
            prompts=np.array(self.prompts),
            embeddings=self.embeddings.astype(dtype),
            encoder=np.array(self.encoder),
            sha256=np.array(self.sha256),
        )

    def lookup(self, prompt: Prompt) -> BankEntry | None:
        """Find the embedding of a prompt: by its sentence, then its class name or phrase, then a synonym of that.

        Case, underscores, hyphens and punctuation do not matter. A sentence that the user gave as a whole is found as
        that sentence or not at all, because answering with another one would ignore what was asked for.

        Args:
            prompt: One text of a class; its rewordings and the other texts are not looked at.

        Returns:
            The entry, or None.
        """
        row = self._rows.get(normalise(prompt.sentence))
        if row is None and prompt.phrase is not None:
            row = self._rows.get(normalise(prompt.phrase))
        if row is not None:
            matched = "sentence" if normalise(prompt.sentence) in self._rows else "class name"
            return BankEntry(self.prompts[row], self.embeddings[row], matched)
        if prompt.phrase is None:
            return None
        return self._lookup_structure(prompt)

    def _lookup_structure(self, prompt: Prompt) -> BankEntry | None:
        structure = structure_of(prompt.phrase or "")
        if structure is None:
            return None
        matched = "class name" if normalise(without_article(prompt.phrase)) == normalise(structure) else "synonym"
        for text in (template_sentence(structure, prompt.modality), structure):
            row = self._rows.get(normalise(text))
            if row is not None:
                return BankEntry(self.prompts[row], self.embeddings[row], matched)
        return None

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {normalise(prompt): row for row, prompt in enumerate(self.prompts)}


def normalise(text: str) -> str:
    """Reduce a name to lower-case words, so that "Left_Atrium", "left-atrium" and "left atrium." are the same."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def load_structures(path: str | Path = STRUCTURES_FILE) -> dict[str, list[str]]:
    """Read the structures of the shipped bank: name and synonyms."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def structure_names() -> dict[str, str]:
    """Map every normalised name and synonym to the structure's name in the bank."""
    return index_structures(load_structures())


def structure_of(phrase: str) -> str | None:
    """Return the bank's structure that a phrase names, for example "inferior vena cava" for "the postcava", or None."""
    return structure_names().get(normalise(without_article(phrase)))


def index_structures(structures: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Index names and synonyms; sided names also with the side at the end, as in "kidney_left".

    Args:
        structures: Synonyms by structure name.

    Returns:
        Structure name by normalised name.

    Raises:
        PromptError: One name stands for two structures.
    """
    index: dict[str, str] = {}
    for name, synonyms in structures.items():
        for spelling in (name, *synonyms):
            for key in _side_variants(normalise(spelling)):
                if index.setdefault(key, name) != name:
                    raise PromptError(
                        f"{STRUCTURES_FILE.name}: {spelling!r} stands for {index[key]!r} and for {name!r}."
                    )
    return index


def _side_variants(key: str) -> list[str]:
    side, _, rest = key.partition(" ")
    return [key, f"{rest} {side}"] if side in ("left", "right") and rest else [key]


def without_article(phrase: str) -> str:
    """Return a phrase without the article that it begins with."""
    return re.sub(r"^(a|an|the)\s+", "", phrase, flags=re.IGNORECASE)


def _require_one_vector_each(path: Path, bank: EmbeddingBank) -> None:
    for row, prompt in enumerate(bank.prompts):
        other = bank._rows[normalise(prompt)]
        if bank.embeddings[row] @ bank.embeddings[other] < _SAME_VECTOR:
            raise PromptError(
                f"Bank {path} has two different vectors for {prompt!r} and {bank.prompts[other]!r}, which are one "
                "prompt because case, underscores, hyphens and punctuation do not matter: keep one of the two."
            )


def _array(content: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    array = content[name]
    if not isinstance(array, np.ndarray):  # numpy returns what is no array as its bytes
        raise ValueError(f"{name} is no array")
    return array


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise PromptError(f"Bank {path} does not exist: give the path of a .npz file as file:BANK.npz.")
    try:
        with np.load(path, allow_pickle=False) as content:
            missing = [name for name in _ARRAYS if name not in content.files]
            size = sum(entry.file_size for entry in content.zip.infolist())
            arrays = {} if missing or size > _MAX_BYTES else {name: _array(content, name) for name in _ARRAYS}
    except Exception as error:  # a damaged archive fails in as many ways as zip, zlib and numpy have errors
        raise PromptError(f"Bank {path} cannot be read ({error}): make or copy it again.") from error
    if missing:
        raise PromptError(f"Bank {path} lacks the arrays {', '.join(missing)}: a bank holds {', '.join(_ARRAYS)}.")
    if not arrays:
        raise PromptError(
            f"Bank {path} unpacks to {size / 1e9:.0f} GB, which no bank has: get it again from its maker."
        )
    return arrays
