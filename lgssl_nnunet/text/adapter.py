"""Prompt adapters: from one frozen text embedding per class to a prompt volume at the network's bottleneck."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from torch import nn

from lgssl_nnunet.errors import PromptError, UsageError

PROMPT_SOURCES = ("text", "random", "shuffled", "learned")
LEARNABLE_STD = 0.01
LEAKY_SLOPE = 1e-2
INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def prompt_embeddings(source: str, embeddings: torch.Tensor | Sequence[Sequence[float]], seed: int = 0) -> torch.Tensor:
    """Choose what the adapter is told: the classes' text embeddings, or a control that carries no meaning.

    Every row is scaled to unit root mean square. Text encoders differ in whether they normalise, and the learnable
    addition (standard deviation 0.01 per entry) was published for entries of that order.

    Args:
        source: "text" (as planned), "random" (Gaussian directions, the same length per row), "shuffled" (every class
            gets another class's embedding) or "learned" (nothing: rows of zeros, see `learnable_std`).
        embeddings: `(C, T)`, one row per output channel.
        seed: draw of the controls; the same seed gives the same rows on every machine.

    Returns:
        `(C, T)` float32, rows of length sqrt(T), or of zeros for "learned".

    Raises:
        UsageError: unknown source, or shuffling a single class.
        PromptError: the embeddings are no finite, non-zero `(C, T)` table.

    Source: controls of methods.md 2.5 and 2.8.
    """
    if source not in PROMPT_SOURCES:
        raise UsageError(f"prompt_source {source!r} is unknown; choose one of {', '.join(PROMPT_SOURCES)}.")
    table = torch.as_tensor(embeddings, dtype=torch.float32)
    if table.ndim != 2 or not torch.isfinite(table).all() or (table.norm(dim=1) == 0).any():
        raise PromptError("The prompt embeddings must be one finite, non-zero vector per output channel; plan again.")
    if source == "learned":
        return torch.zeros_like(table)
    generator = torch.Generator().manual_seed(seed)
    if source == "random":
        table = torch.randn(table.shape, generator=generator)
    elif source == "shuffled":
        table = table[_derangement(len(table), generator)]
    return table / table.norm(dim=1, keepdim=True) * math.sqrt(table.shape[1])


def learnable_std(source: str) -> float:
    """Return how large the learnable addition starts: small beside an embedding, of an embedding's size without one."""
    return 1.0 if source == "learned" else LEARNABLE_STD


def _derangement(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a permutation of `count` indices that leaves none in place."""
    if count < 2:
        raise UsageError("prompt_source 'shuffled' needs at least two output channels; use 'random' for a single one.")
    identity = torch.arange(count)
    while True:
        permutation = torch.randperm(count, generator=generator)
        if (permutation != identity).all():
            return permutation


def _stop_gradient_rows(feature: torch.Tensor, batch: int, labeled_rows: int | None) -> torch.Tensor:
    """Repeat a prompt feature over the batch, without its gradient in the rows from `labeled_rows` on.

    Args:
        feature: `(C, N)`, the same for every image.
        batch: number of images B.
        labeled_rows: how many rows at the front are labelled; None: all rows keep the gradient.

    Returns:
        `(B, C, N)`; the values of all rows are equal.
    """
    if labeled_rows is None:
        return feature.expand(batch, *feature.shape)
    if not 0 <= labeled_rows <= batch:
        raise ValueError(f"labeled_rows must lie between 0 and the batch size {batch}, not {labeled_rows}.")
    labeled = feature.expand(labeled_rows, *feature.shape)
    unlabeled = feature.detach().expand(batch - labeled_rows, *feature.shape)
    return torch.cat((labeled, unlabeled))


class _Prompts(nn.Module):
    """What both adapters share: frozen embeddings E, a learnable addition P, and a bias-free linear map W.

    E is a persistent buffer, so that a checkpoint predicts without a text encoder or prompt file, and no optimizer
    decays it. The prompt feature `(E + P) W^T` learns from labelled rows only unless `stop_gradient` is False.
    """

    embeddings: torch.Tensor

    def __init__(self, embeddings: torch.Tensor, features: int, stop_gradient: bool, std: float) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient
        self.register_buffer("embeddings", embeddings.detach().clone())
        self.learnable = nn.Parameter(std * torch.randn(embeddings.shape))
        self.project = nn.Linear(embeddings.shape[1], features, bias=False)

    def prompt_feature(self) -> torch.Tensor:
        """Compute F^p, `(C, N)` for the fixed volume and `(C, D)` for attention."""
        return self.project(self.embeddings + self.learnable)

    def feature_rows(self, batch: int, labeled_rows: int | None) -> torch.Tensor:
        """Repeat the prompt feature over the batch, with the stop-gradient on unlabelled rows."""
        return _stop_gradient_rows(self.prompt_feature(), batch, labeled_rows if self.stop_gradient else None)

    def forward(self, v: torch.Tensor, labeled_rows: int | None = None) -> torch.Tensor:
        """Make the prompt volume.

        Args:
            v: image feature `(B, D, X, Y, Z)` (or 2D).
            labeled_rows: number of labelled rows, which come first; None: no stop-gradient.

        Returns:
            tau, the shape of `v`.
        """
        return self.attend(v, labeled_rows)[0]

    def attend(self, v: torch.Tensor, labeled_rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the prompt volume, and what it says about the classes of each position, if anything.

        Args:
            v: image feature `(B, D, X, Y, Z)` (or 2D).
            labeled_rows: as in `forward`.

        Returns:
            tau, the shape of `v`, and the class map's logits `(B, C, X, Y, Z)` or None.
        """
        raise NotImplementedError


class FixedVolumePrompts(_Prompts):
    """The published adapter: per class one number for each bottleneck voxel of the training patch.

    The volume belongs to positions in the patch, not to anatomy, and does not see the image. For a bottleneck of
    another shape the prompt feature is interpolated linearly over space; at the training shape it is used as it is.

    Args:
        embeddings: frozen E `(C, T)`.
        channels: width D of the bottleneck.
        bottleneck_shape: spatial shape of the bottleneck for the training patch, N voxels in all.
        stop_gradient: unlabelled rows do not train P and W (M1 learns from all rows).
        std: standard deviation of P at the start (published: 0.01).

    Source: LG-SSL (2025), prompt adapter; released code (2024); methods.md 2.4, 2.5 (M1), 2.7 #2, #22.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        channels: int,
        bottleneck_shape: Sequence[int],
        *,
        stop_gradient: bool = True,
        std: float = LEARNABLE_STD,
    ) -> None:
        super().__init__(embeddings, math.prod(bottleneck_shape), stop_gradient, std)
        self.bottleneck_shape = tuple(int(size) for size in bottleneck_shape)
        self.tokens = nn.Sequential(
            nn.Linear(embeddings.shape[0], channels), nn.LayerNorm(channels), nn.LeakyReLU(LEAKY_SLOPE)
        )

    def attend(self, v: torch.Tensor, labeled_rows: int | None = None) -> tuple[torch.Tensor, None]:
        """Return the prompt volume, of which only the shape comes from `v`; it has no class map."""
        feature = self.feature_rows(v.shape[0], labeled_rows).unflatten(2, self.bottleneck_shape)
        if v.shape[2:] != self.bottleneck_shape:
            mode = INTERPOLATION[len(self.bottleneck_shape)]
            feature = nn.functional.interpolate(feature, size=v.shape[2:], mode=mode, align_corners=False)
        return self.tokens(feature.movedim(1, -1)).movedim(-1, 1), None


class AttentionPrompts(_Prompts):
    """Prompts found by the image: each bottleneck position attends to one vector per class.

    ```
    f_c      = W (e_c + p_c)                                        W: T -> D, without bias
    alpha(x) = softmax over c of <W_q v(x), W_k f_c> / sqrt(D)
    tau(x)   = sum over c of alpha_c(x) W_v f_c
    ```

    Any patch size, 2D or 3D; moves and mirrors with the image. The logits of alpha are a coarse class map, which labels
    can supervise. Regions overlap, so each has its own weight and none of them may apply: alpha is a sigmoid, as it is
    for a single output channel, which has nothing to compete with.

    Nothing here tells the classes apart except their vectors: permuting the rows of E and P together leaves tau as it
    is, so `prompt_source="shuffled"` equals "text" up to the draw of P.

    Args:
        embeddings: frozen E `(C, T)`.
        channels: width D of the bottleneck.
        dimensions: 2 or 3.
        exclusive: whether one class excludes the others; False for regions.
        stop_gradient: unlabelled rows do not train P and W (W_q, W_k, W_v learn from all rows).
        std: standard deviation of P at the start.

    Source: ours, methods.md 2.8.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        channels: int,
        dimensions: int,
        *,
        exclusive: bool = True,
        stop_gradient: bool = True,
        std: float = LEARNABLE_STD,
    ) -> None:
        super().__init__(embeddings, channels, stop_gradient, std)
        self.exclusive = exclusive and len(embeddings) > 1
        self.query = convert_dim_to_conv_op(dimensions)(channels, channels, 1, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)

    def attend(self, v: torch.Tensor, labeled_rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompt volume and the logits of alpha."""
        feature = self.feature_rows(v.shape[0], labeled_rows)
        keys = self.key(feature) / math.sqrt(v.shape[1])
        logits = torch.bmm(keys, self.query(v).flatten(2))
        alpha = torch.softmax(logits, dim=1) if self.exclusive else torch.sigmoid(logits)
        tau = torch.bmm(self.value(feature).transpose(1, 2), alpha)
        return tau.unflatten(2, v.shape[2:]), logits.unflatten(2, v.shape[2:])
