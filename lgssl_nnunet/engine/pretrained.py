"""Start a network from the weights of another training, as far as they fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lgssl_nnunet.engine.checkpoints import read_checkpoint
from lgssl_nnunet.errors import CheckpointError

logger = logging.getLogger(__name__)

# One row or channel per class of the training that made the checkpoint: segmentation layers, learnable prompts.
_BOUND_TO_CLASSES = (".seg_layers.", ".prompts.learnable", ".prompts.tokens.0.")


def load_pretrained(network: nn.Module, file: Path | str, trust: bool = False) -> int:
    """Copy every weight of a checkpoint that the network has under the same name and in the same shape.

    Segmentation layers and learnable prompts stay as they are: they stand for other classes. So does what is lacking,
    such as the second decoder when a stock nnU-Net checkpoint starts a language-guided network. In a pair of networks
    (`first.encoder...`, `second.encoder...`) each takes what the checkpoint holds under its own name, else the weights
    of a single network; two networks of one architecture then differ in their segmentation layers.

    Args:
        network: the network, compiled or not.
        file: a checkpoint of nnU-Net or of this package.
        trust: as for `read_checkpoint`.

    Returns:
        The number of tensors taken, each counted once (nnU-Net's networks list shared tensors under several names).

    Raises:
        CheckpointError: as `read_checkpoint`, or none of its convolutions fits an encoder of the network.
    """
    source = read_checkpoint(Path(file), "network_weights", trust=trust)["network_weights"]
    network = getattr(network, "_orig_mod", network)
    # Buffers stay: prompt embeddings belong to the plans of this training.
    own = {
        name: tensor
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, nn.Parameter) and not any(part in f".{name}" for part in _BOUND_TO_CLASSES)
    }
    origins: dict[str, str] = {}
    for root in _roots(own):
        found = {name: name if name in source else name.removeprefix(root) for name in own if name.startswith(root)}
        fitting = {name: key for name, key in found.items() if key in source and source[key].shape == own[name].shape}
        # Biases and norms of a 2D network also fit a 3D one, and a decoder means nothing on another encoder.
        if any(name.startswith(f"{root}encoder.") and own[name].ndim > 1 for name in fitting):
            origins |= fitting
    if not origins:
        raise CheckpointError(
            f"No convolution in {file} fits the encoder of this network: pretrained weights must come from a "
            "configuration with the same architecture."
        )
    with torch.no_grad():
        for name, key in origins.items():
            own[name].copy_(source[key])
    number = _number_of_tensors(own, set(origins))
    logger.info("Pretrained weights: %d of %d tensors taken from %s.", number, _number_of_tensors(own, set(own)), file)
    other_shape = sorted(name for name in own if name in source and name not in origins)
    if other_shape:
        logger.warning("Not taken, because the shapes differ: %s.", ", ".join(other_shape))
    return number


def _roots(names: Iterable[str]) -> list[str]:
    """Return what stands before `encoder.` in the names: nothing for one network, a prefix each for several."""
    first_parts = {name.split("encoder.")[0] for name in names if "encoder." in name}
    return sorted(part for part in first_parts if "decoder." not in part)


def _number_of_tensors(own: dict[str, Tensor], names: set[str]) -> int:
    return len({id(own[name]) for name in names})
