"""Text towers of open_clip models, from weights that are already on this machine."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import MissingDependencyError, PromptError
from lgssl_nnunet.files import sha256
from lgssl_nnunet.text.encoders import (
    INSTALL,
    TextEncoder,
    first_line,
    missing_packages,
    offline,
    warn_if_cut,
)

_HUB = "hf-hub:"
_LOCAL = "local-dir:"
_CONFIG = "open_clip_config.json"
_HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_LOCAL_SUFFIXES = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class _Source:
    """A model that open_clip can open without the network."""

    model: str
    pretrained: str | None
    weights: Path
    text_config: Mapping[str, Any]


def load_open_clip(name: str) -> TextEncoder:
    """Load an open_clip model for its text tower.

    Args:
        name: `hf-hub:ORG/NAME`, `local-dir:FOLDER` or `MODEL/PRETRAINED`, PRETRAINED being a tag of open_clip or the
            path of a weights file.

    Returns:
        The encoder; `encode_text` of the model, normalised.

    Raises:
        PromptError: Unknown model, or weights that are not on this machine (with what to download to where).
        MissingDependencyError: open_clip, or transformers for a model with a Hugging Face text tower, is missing.
    """
    if missing_packages(["open_clip"]):
        raise MissingDependencyError(f"Text encoder {name} needs open_clip: run pip install open_clip_torch.")
    with offline():
        source = _find_source(name)
        _check_text_tower(name, source.text_config)
        try:
            model, tokenizer = _open(source)
        except Exception as error:  # open_clip, torch and transformers raise many kinds for damaged files
            raise PromptError(
                f"Text encoder {name} cannot be loaded from {source.weights} ({first_line(error)}): download it again."
            ) from error

    def encode_one(sentence: str) -> Any:
        import torch

        warn_if_cut(name, tokenizer, sentence)
        with torch.inference_mode():
            return model.encode_text(tokenizer([sentence]), normalize=True)[0].float().numpy()

    return TextEncoder(_recorded_name(name), sha256(source.weights), encode_one)


def _open(source: _Source) -> tuple[Any, Any]:
    import open_clip

    model = open_clip.create_model(source.model, pretrained=source.pretrained, device="cpu", precision="fp32")
    return model.eval(), open_clip.get_tokenizer(source.model)


def _find_source(name: str) -> _Source:
    if name.startswith(_HUB):
        return _find_on_hub(name)
    if name.startswith(_LOCAL):
        return _find_in_folder(name)
    return _find_by_tag(name)


def _find_on_hub(name: str) -> _Source:
    repository = name.removeprefix(_HUB)
    config = _cached(repository, [_CONFIG])
    weights = _cached(repository, _HUB_WEIGHTS)
    if config is None or weights is None:
        raise PromptError(_how_to_download(name, repository))
    return _Source(name, None, weights, _text_config(config))


def _find_in_folder(name: str) -> _Source:
    folder = Path(name.removeprefix(_LOCAL)).expanduser()
    weights = [path for suffix in _LOCAL_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if not (folder / _CONFIG).is_file() or len(weights) != 1:
        raise PromptError(
            f"Folder {folder} holds no open_clip model: it must have {_CONFIG} and one weights file "
            f"({', '.join(_LOCAL_SUFFIXES)}); for a text model use hf:FOLDER."
        )
    return _Source(f"{_LOCAL}{folder}", None, weights[0], _text_config(folder / _CONFIG))


def _find_by_tag(name: str) -> _Source:
    import open_clip

    model, _, pretrained = name.partition("/")
    models = open_clip.list_models()
    if model not in models or not pretrained:
        near = difflib.get_close_matches(model, models, n=3, cutoff=0.5)
        raise PromptError(
            f"Unknown text encoder {name!r}: use bank, minilm, biomedclip, hf:FOLDER, file:BANK.npz, hf-hub:ORG/NAME, "
            f"local-dir:FOLDER or MODEL/PRETRAINED of open_clip{' (near: ' + ', '.join(near) + ')' if near else ''}."
        )
    text_config = open_clip.get_model_config(model)["text_cfg"]
    file = Path(pretrained).expanduser()
    if file.is_file():
        return _Source(model, str(file), file, text_config)
    return _Source(model, pretrained, _tagged_weights(name, model, pretrained), text_config)


def _tagged_weights(name: str, model: str, tag: str) -> Path:
    """Find the weights of an open_clip tag where open_clip would look for them."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    config = get_pretrained_cfg(model, tag)
    if not config:
        known = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise PromptError(f"Text encoder {name}: {tag!r} is neither a file nor a tag of {model} (its tags: {known}).")
    if config.get("hf_hub"):
        repository, _, file = config["hf_hub"].rpartition("/")
        usual = file in ("", _HUB_WEIGHTS[-1])
        weights = _cached(repository, _HUB_WEIGHTS if usual else [f"{Path(file).stem}.safetensors", file])
        if weights is None:
            raise PromptError(_how_to_download(name, repository))
        return weights
    target = Path("~/.cache/clip").expanduser() / Path(config["url"]).name
    if not target.is_file():
        raise PromptError(f"The weights of {name} are not on this machine: download {config['url']} to {target}.")
    return target


def _check_text_tower(name: str, text_config: Mapping[str, Any]) -> None:
    """Refuse a Hugging Face text tower whose package, configuration or tokenizer is missing."""
    repositories = {text_config.get("hf_model_name"), text_config.get("hf_tokenizer_name")} - {None, ""}
    if not repositories:
        return
    if missing_packages(["transformers"]):
        raise MissingDependencyError(f"Text encoder {name} needs transformers: run {INSTALL}.")
    for repository in sorted(repositories):
        if not name.startswith(_LOCAL) and not Path(repository).is_dir() and not _cached(repository, ["config.json"]):
            raise PromptError(_how_to_download(name, repository))


def _cached(repository: str, files: list[str] | tuple[str, ...]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        path = try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return Path(path)
    return None


def _how_to_download(name: str, repository: str) -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    target = folder / f"models--{repository.replace('/', '--')}"
    return (
        f"The files of text encoder {name} are not on this machine: run `hf download {repository}` where there is a "
        f"network and bring the folder it makes to {target}."
    )


def _text_config(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{path} is not the configuration of an open_clip model: download it again.") from error


def _recorded_name(name: str) -> str:
    """Leave this machine's folders out of what is recorded; the checksum identifies the weights."""
    if name.startswith(_LOCAL):
        return _LOCAL + Path(name.removeprefix(_LOCAL)).name
    if name.startswith(_HUB):
        return name
    model, _, pretrained = name.partition("/")
    return f"{model}/{Path(pretrained).name}"
