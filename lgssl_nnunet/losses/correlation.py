"""Two networks see voxels in the same relation to a memory of embeddings. Everything computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SIMILARITIES = ("cosine", "dot")


def omni_correlation(
    first: Tensor, second: Tensor, memory: Tensor, temperature: float, similarity: str = "cosine"
) -> Tensor:
    """Return the mean cross-entropy of the first network's correlation with the memory against the second's.

    `mean_k(-sum_j R2_kj ln R1_kj)` with gradient into both; 0 without queries or without a memory.

    Source: omni-correlation consistency of CAML (2023); methods.md section 8.

    Args:
        first: embeddings (K, D) of the queries by the network that learns the relation.
        second: the same queries by the network that gives it.
        memory: embeddings (J, D).
        temperature: see `log_correlation`.
        similarity: see `log_correlation`.
    """
    with torch.autocast(first.device.type, enabled=False):
        learned, given = (log_correlation(e, memory, temperature, similarity) for e in (first, second))
        return -(given.exp() * learned).sum() / max(len(first), 1)


def log_correlation(queries: Tensor, memory: Tensor, temperature: float, similarity: str) -> Tensor:
    """Return the logarithm of `softmax_j(e_k . m_j / T)`, (K, J), whose exponentials add up to 1 in each row.

    Args:
        queries: (K, D).
        memory: (J, D).
        temperature: T.
        similarity: "cosine" (both sides normalised) or "dot".
    """
    queries, memory = queries.float(), memory.float()
    if similarity == "cosine":
        queries, memory = functional.normalize(queries, dim=1), functional.normalize(memory, dim=1)
    return torch.log_softmax(queries @ memory.T / temperature, dim=1)


def confident_agreements(first: Tensor, second: Tensor, most: int) -> Tensor:
    """Return flat positions of the voxels of which two networks predict the same class.

    Args:
        first: logits (B, C, *S) of the network whose probability decides which voxels are the most confident.
        second: logits of the other, the same shape.
        most: voxels per class.
    """
    confidence, classes = torch.softmax(first.detach().float(), dim=1).max(dim=1)
    agreed = torch.where(classes == second.argmax(dim=1), classes, -1)
    return best_per_class(agreed, confidence, first.shape[1], most)


def correct_agreements(first: Tensor, second: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return flat positions (K,) of random voxels that two networks classify correctly, and their classes (K,).

    Args:
        first: logits (B, C, *S).
        second: logits of the other network, the same shape.
        target: label map (B, 1, *S); what is none of the C classes (the ignore label) is correct nowhere.
        most: voxels per class.
    """
    classes = first.argmax(dim=1)
    correct = torch.where((classes == second.argmax(dim=1)) & (classes == target[:, 0]), classes, -1)
    positions = best_per_class(correct, torch.rand(correct.shape, device=correct.device), first.shape[1], most)
    return positions, correct.flatten()[positions]


def best_per_class(classes: Tensor, score: Tensor, num_classes: int, most: int) -> Tensor:
    """Return flat positions of the voxels with the highest scores of each class, `most` per class, best first.

    Args:
        classes: (B, *S), class of each voxel; other values than 0 to `num_classes` - 1 are never chosen.
        score: the same shape.
        num_classes: C.
        most: voxels per class.
    """
    classes, score = classes.flatten(), score.flatten()
    found = []
    for c in range(num_classes):
        candidates = (classes == c).nonzero()[:, 0]
        found.append(candidates[score[candidates].topk(min(most, len(candidates))).indices])
    return torch.cat(found)
