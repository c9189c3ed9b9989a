"""Two networks that are one model: they predict with the mean of their probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lgssl_nnunet.networks.unet import Logits

MEMBERS = ("first", "second")


class NetworkPair(nn.Module):
    """Two networks of any kind; called with an image alone, the logits of their mean probability.

    Whether the channels are regions is not in the plans, so it is kept in the `state_dict` beside the weights: a
    network built from the plans alone knows it as soon as a checkpoint is loaded.

    Args:
        first: a network of nnU-Net's kind.
        second: the same for the same output channels.
        has_regions: the channels are overlapping regions (sigmoid) instead of exclusive classes (softmax).

    Source: MCF (2023) and Co-BioNet (2023) predict so; methods.md sections 5 and 6.
    """

    def __init__(self, first: nn.Module, second: nn.Module, has_regions: bool = False) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.has_regions = has_regions

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Both networks; each is optimised as a group of its own."""
        return self.first, self.second

    def forward(self, x: Tensor, member: str | None = None) -> Logits | tuple[Logits, Logits]:
        """Predict, or run one network or both for a training step.

        Args:
            x: images (B, M, *S).
            member: "first" or "second" for the logits of that network, "both" for a pair; None: the mean.

        Returns:
            Logits (B, C, *S), with deep supervision a list of them, full resolution first; a pair of that for "both".
        """
        if member in MEMBERS:
            return getattr(self, member)(x)
        outputs = self.first(x), self.second(x)
        return outputs if member == "both" else mean_of_probabilities(*outputs, self.has_regions)

    def set_deep_supervision(self, enabled: bool) -> None:
        """Switch deep supervision of both networks."""
        self.first.decoder.deep_supervision = enabled
        self.second.decoder.deep_supervision = enabled

    def get_extra_state(self) -> Tensor:
        """Return what `state_dict` holds beside the weights; a tensor, as everything else in there."""
        return torch.tensor(self.has_regions)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        self.has_regions = bool(state)


def mean_of_probabilities(first: Logits, second: Logits, has_regions: bool) -> Logits:
    """Return logits whose probabilities are the mean of two networks' probabilities.

    Computed from log-probabilities in fp32, so that it is exact where a probability underflows.

    Args:
        first: logits (B, C, *S), or a list of them.
        second: the same shapes.
        has_regions: channels are regions.

    Returns:
        The same shapes; for classes log-probabilities.
    """
    if not isinstance(first, Tensor):
        return [mean_of_probabilities(*pair, has_regions) for pair in zip(first, second, strict=True)]
    z1, z2 = first.float(), second.float()
    if not has_regions:
        return torch.logaddexp(z1.log_softmax(dim=1), z2.log_softmax(dim=1)) - math.log(2)
    inside = torch.logaddexp(functional.logsigmoid(z1), functional.logsigmoid(z2))
    outside = torch.logaddexp(functional.logsigmoid(-z1), functional.logsigmoid(-z2))
    return inside - outside
