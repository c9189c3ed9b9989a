"""Which voxels of a prediction are ambiguous: the rules of AC-MT beside the entropy. Everything computes in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from lgssl_nnunet.engine.batches import finest


def prototype_errors(
    passes: Iterable[tuple[Tensor | list[Tensor], list[Tensor]]], student: Tensor, limit: float
) -> Tensor:
    """Return where a prediction differs from the label of the nearest prototype.

    Source: the prototype rule ("PErr") of AC-MT (2023); methods.md section 7.

    Args:
        passes: stochastic passes of the teacher, each logits (or a list, full resolution first) and the features of the
            decoder's stages, full resolution first; the prototypes are made of those at half resolution.
        student: probabilities (B, C, *S) of the student.
        limit: see `prototype_labels`.

    Returns:
        (B, 1, *S), true where they differ.
    """
    softened, p, features = [], 0.0, 0.0
    for logits, stages in passes:
        full = finest(logits).float()
        softened.append(torch.sigmoid(full / 2))
        p = p + torch.softmax(full, dim=1)
        features = features + stages[min(1, len(stages) - 1)].float()
    mode = "bilinear" if student.ndim == 4 else "trilinear"
    features = functional.interpolate(features / len(softened), student.shape[2:], mode=mode, align_corners=False)
    nearest = prototype_labels(features, p / len(softened), torch.stack(softened).std(dim=0), limit)
    return nearest != student.argmax(dim=1, keepdim=True)


def prototype_labels(features: Tensor, p: Tensor, deviation: Tensor, limit: float) -> Tensor:
    """Label every voxel by its nearest class prototype.

    A channel is certain in a voxel where its deviation over stochastic passes is below `limit`. The certain channel of
    highest probability is the voxel's hard label (class 0 where none is certain), and the prototype of a class is the
    mean feature of the voxels with that label, weighted by their probability of it. Classes without such a voxel have
    no prototype.

    Source: the prototype rule ("PErr") of AC-MT (2023), for C classes; methods.md section 7.

    Args:
        features: (B, D, *S), mean over passes.
        p: probabilities of the teacher (B, C, *S).
        deviation: standard deviation of each channel over the passes (B, C, *S).
        limit: largest deviation of a certain channel.

    Returns:
        (B, 1, *S), the class of the nearest prototype.
    """
    with torch.autocast(features.device.type, enabled=False):  # sums over all voxels overflow half precision
        return _prototype_labels(features.float(), p.float(), deviation, limit)


def _prototype_labels(features: Tensor, p: Tensor, deviation: Tensor, limit: float) -> Tensor:
    flat = features.transpose(0, 1).flatten(1)
    certain_p = (p * (deviation < limit)).transpose(0, 1).flatten(1)
    hard = torch.zeros_like(certain_p).scatter_(0, certain_p.argmax(dim=0, keepdim=True), 1.0)
    weight = hard * p.transpose(0, 1).flatten(1)
    mass = weight.sum(dim=1)
    prototypes = weight @ flat.T / mass.clamp(min=1e-6)[:, None]
    distance = torch.cdist(flat.T, prototypes)
    distance[:, mass == 0] = torch.inf
    return distance.argmin(dim=1).view(p.shape[0], 1, *p.shape[2:])


def sampled_label_errors(teacher: Tensor, student: Tensor, number: int) -> Tensor:
    """Return which of `number` random voxels the teacher holds to be wrongly labelled by the student.

    Args:
        teacher: probabilities (B, C, *S).
        student: probabilities (B, C, *S).
        number: voxels that are looked at, over the whole batch.

    Returns:
        (B, 1, *S), true where the student's class is probably wrong; false where nobody looked.
    """
    p = teacher.movedim(1, -1).flatten(0, -2)
    labels = student.argmax(dim=1).flatten()
    chosen = torch.randperm(len(labels), device=labels.device)[:number]
    flagged = torch.zeros_like(labels, dtype=torch.bool)
    flagged[chosen] = probable_label_errors(p[chosen], labels[chosen])
    return flagged.view(student.shape[0], 1, *student.shape[2:])


def probable_label_errors(p: Tensor, labels: Tensor) -> Tensor:
    """Flag given labels that are probably wrong by confident learning.

    The threshold of a class is the mean probability of it over the voxels that carry its label. A voxel is counted
    towards the class of highest probability among those whose threshold it reaches; the off-diagonal entries of that
    table, scaled to the number of voxels per given label, say how many labels of class i should have been j. A voxel is
    flagged if all of these hold: another class is more probable; its probability of its own label is among the lowest
    of its label, as many as the table says are wrong; and for some other class its margin over the own label is among
    the largest, as many as the table says belong there.

    Source: the "both" rule of confident learning (C. Northcutt, L. Jiang, I. Chuang, 2021), which AC-MT (2023) uses as
    "SErr"; methods.md section 7.

    Args:
        p: probabilities (N, C) of another model.
        labels: given labels (N,).

    Returns:
        (N,) true where the label is probably wrong.
    """
    p, channels = p.float(), p.shape[1]
    given = functional.one_hot(labels, channels).float()
    count = given.sum(dim=0)
    threshold = (p * given).sum(dim=0) / count.clamp(min=1)
    threshold[count == 0] = torch.inf
    reached = torch.where(p >= threshold, p, -torch.ones_like(p))
    counted = reached.amax(dim=1) >= 0
    believed = functional.one_hot(reached.argmax(dim=1), channels).float() * counted[:, None]
    with torch.autocast(p.device.type, enabled=False):  # counts above 2,048 are rounded in half precision
        joint = given.T @ believed
    joint = joint / joint.sum(dim=1, keepdim=True).clamp(min=1) * count[:, None]
    flagged = torch.zeros_like(labels, dtype=torch.bool)
    for own in range(channels):
        rows = torch.nonzero(labels == own).flatten()
        expected = joint[own].round().long()
        expected[own] = 0
        wrong = _lowest(p[rows, own], int(expected.sum()))
        misplaced = torch.zeros_like(wrong)
        for other in range(channels):
            misplaced |= _lowest(p[rows, own] - p[rows, other], int(expected[other]))
        flagged[rows] = wrong & misplaced
    return flagged & (p.argmax(dim=1) != labels)


def _lowest(values: Tensor, number: int) -> Tensor:
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.argsort()[:number]] = True
    return mask
