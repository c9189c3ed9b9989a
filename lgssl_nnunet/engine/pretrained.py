"""Start a network from the weights of another training, as far as they fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgssl_nnunet.engine.checkpoints import read_checkpoint
from lgssl_nnunet.errors import CheckpointError

logger = logging.getLogger(__name__)

# One row or channel per class of the training that made the checkpoint: segmentation layers, learnable prompts.
_BOUND_TO_CLASSES = (".seg_layers.", ".prompts.learnable", ".prompts.tokens.0.")
# Where attention follows a stage of an encoder, the stage itself is the first of two modules in its place.
_FIRST_IN_STAGE = re.compile(r"(encoder\.stages\.\d+)\.0\.")


def load_pretrained(
    network: nn.Module, file: Path | str, trust: bool = False, companions: Mapping[str, Any] | None = None
) -> int:
    """Copy every weight of a checkpoint that the network has under the same name and in the same shape.

    Segmentation layers and learnable prompts stay as they are: they stand for other classes. So does what is lacking,
    such as the second decoder when a stock nnU-Net checkpoint starts a language-guided network. In a pair of networks
    (`first.encoder...`, `second.encoder...`) each takes what the checkpoint holds under its own name, else the weights
    of a single network; two networks of one architecture then differ in their segmentation layers. The same holds for
    a network and its companions.

    Args:
        network: the network, compiled or not.
        file: a checkpoint of nnU-Net or of this package.
        trust: as for `read_checkpoint`.
        companions: what a method keeps beside its network, by name in the checkpoint; only U-Nets take weights.

    Returns:
        The number of tensors that the network took, each counted once (nnU-Net's networks list shared tensors under
        several names).

    Raises:
        CheckpointError: as `read_checkpoint`, or none of its convolutions fits an encoder of the network.
    """
    checkpoint = read_checkpoint(Path(file), "network_weights", trust=trust)
    weights, kept = checkpoint["network_weights"], checkpoint.get("lgssl")
    number = _take(network, weights, "the network", file)
    if not number:
        raise CheckpointError(
            f"No convolution in {file} fits the encoder of this network: pretrained weights must come from a "
            "configuration with the same architecture."
        )
    for name, companion in (companions or {}).items():
        if isinstance(companion, nn.Module) and _roots(companion.state_dict()):
            own = kept[name] if isinstance(kept, dict) and name in kept else weights
            if not _take(companion, own, name, file):
                logger.warning("No convolution in %s fits the encoder of %s, which starts untrained.", file, name)
    return number


def _take(network: nn.Module, source: Mapping[str, Tensor], title: str, file: Path | str) -> int:
    """Copy the weights that fit and tell of it; return the number of tensors, 0 if no encoder's convolution fits."""
    network = getattr(network, "_orig_mod", network)
    # Buffers stay: prompt embeddings belong to the plans of this training.
    own = {
        name: tensor
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, nn.Parameter) and not any(part in f".{name}" for part in _BOUND_TO_CLASSES)
    }
    origins: dict[str, str] = {}
    for root in _roots(own):
        found = {name: _name_in(source, name, root) for name in own if name.startswith(root)}
        fitting = {name: key for name, key in found.items() if key in source and source[key].shape == own[name].shape}
        # Biases and norms of a 2D network also fit a 3D one, and a decoder means nothing on another encoder.
        if any(name.startswith(f"{root}encoder.") and own[name].ndim > 1 for name in fitting):
            origins |= fitting
    if not origins:
        return 0
    with torch.no_grad():
        for name, key in origins.items():
            own[name].copy_(source[key])
    number, total = _number_of_tensors(own, set(origins)), _number_of_tensors(own, set(own))
    logger.info("Pretrained weights: %s took %d of %d tensors from %s.", title, number, total, file)
    other_shape = sorted(name for name in own if name in source and name not in origins)
    if other_shape:
        logger.warning("Not taken by %s, because the shapes differ: %s.", title, ", ".join(other_shape))
    return number


def _name_in(source: Mapping[str, Tensor], name: str, root: str) -> str:
    """Return under which name the source has what the network has under `name`, if it has it."""
    plain = name.removeprefix(root)
    return next((key for key in (name, plain) if key in source), _FIRST_IN_STAGE.sub(r"\1.", plain))


def _roots(names: Iterable[str]) -> list[str]:
    """Return what stands before `encoder.` in the names: nothing for one network, a prefix each for several."""
    first_parts = {name.split("encoder.")[0] for name in names if "encoder." in name}
    return sorted(part for part in first_parts if "decoder." not in part)


def _number_of_tensors(own: dict[str, Tensor], names: set[str]) -> int:
    return len({id(own[name]) for name in names})
