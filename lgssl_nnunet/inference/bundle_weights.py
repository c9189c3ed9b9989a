"""Weights as bytes of a safetensors file, which holds tensors and text and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lgssl_nnunet.errors import CheckpointError

_LENGTH_BYTES = 8  # of the header, in front of it
_SHARED = "shared"


def pack_weights(weights: Mapping[str, Any], origin: str) -> bytes:
    """Return weights as a safetensors file; what several names share is written once.

    nnU-Net's networks hold most weights under several names. The others are in the file's metadata as one text, because
    safetensors writes several entries in a random order.

    Args:
        weights: of a network.
        origin: where they come from, for the message.

    Raises:
        CheckpointError: they are not all tensors.
    """
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{origin}: {name} is a {type(value).__name__} and no tensor, so it cannot go along.")
        tensor = value.detach().cpu().contiguous()
        first = names.setdefault(_identity(tensor), name)
        if first == name:
            kept[name] = tensor.clone()  # safetensors refuses tensors that are parts of one memory
        else:
            shared[name] = first
    return safetensors.torch.save(kept, {_SHARED: json.dumps(shared)})


def unpack_weights(content: bytes, origin: str) -> dict[str, Tensor]:
    """Return the weights that `pack_weights` wrote, under all their names.

    Args:
        content: the safetensors file.
        origin: where it comes from, for the message.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        weights = safetensors.torch.load(content)
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        metadata = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])["__metadata__"]
        return weights | {name: weights[first] for name, first in json.loads(metadata[_SHARED]).items()}
    except Exception as error:
        raise CheckpointError(
            f"{origin} is no whole safetensors file ({str(error)[:100]}): get the bundle again from where it was made."
        ) from error


def _identity(tensor: Tensor) -> tuple:
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.sha256(content).digest()
