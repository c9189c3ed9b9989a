"""FixMatch in 3D: confident predictions on the weak view are labels for the strong view."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lgssl_nnunet.data.mixing import random_boxes
from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.losses.pseudo_labels import confidence, cross_entropy, hard_labels
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class FixMatchHyperparameters:
    """Hyper-parameters of FixMatch in 3D (methods.md section 14).

    Attributes:
        threshold: least probability of the predicted class at which a voxel becomes a pseudo-label; above 1 none does.
        pseudo_weight: weight of the pseudo-labelled term; FixMatch has no ramp.
        ramp_fraction: share of the iterations over which that weight rises.
        cutmix: paste a box of the next patch, image and pseudo-label, into each strong view (UniMatch); nothing with a
            single unlabelled patch.
        smallest_box: least volume of that box, as a share of the patch.
        largest_box: greatest volume of that box.
    """

    threshold: float = 0.95
    pseudo_weight: float = 1.0
    ramp_fraction: float = 0.0
    cutmix: bool = True
    smallest_box: float = 0.02
    largest_box: float = 0.4

    def __post_init__(self) -> None:
        check_ranges(self, threshold=(0, None), pseudo_weight=(0, None), ramp_fraction=(0, 1))
        check_ranges(self, largest_box=(0, 1), smallest_box=(0, 1))
        if self.smallest_box > self.largest_box:
            raise ValueError(f"smallest_box={self.smallest_box} must not exceed largest_box={self.largest_box}")


class FixMatchTrainer(SemiSupervisedTrainer):
    """Weak-to-strong pseudo-labels above a confidence threshold, averaged over all voxels.

    Source: K. Sohn et al., "FixMatch", NeurIPS 2020, with the CutMix of UniMatch (L. Yang et al., CVPR 2023); there
    is no official 3D version; methods.md section 14. The strong view is nnU-Net's own intensity augmentation at its
    own probabilities, so about a quarter of the strong views differ from the weak ones by CutMix alone. Voxels
    below the threshold are left out, not turned into background as in one released port.
    """

    hyperparameters = FixMatchHyperparameters()
    views = ("weak", "strong")

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss and the cross-entropy on confident voxels."""
        supervised = self.supervised_loss(self.network(labeled.image), labeled.target)
        regions = self.label_manager.has_regions
        with torch.no_grad():
            weak = self.probabilities(self.network(unlabeled.weak))
        strong, label, sure = unlabeled.strong, hard_labels(weak, regions), confidence(weak, regions)
        if self.hp.cutmix:
            box = random_boxes(strong, self.hp.smallest_box, self.hp.largest_box)
            strong, label, sure = (torch.where(box, x.roll(1, dims=0), x) for x in (strong, label, sure))
        losses = cross_entropy(finest(self.network(strong)), label, regions)
        weight = self.hp.pseudo_weight * self.ramp(self.hp.ramp_fraction)
        return {
            "supervised": Term(supervised),
            "pseudo": Term((losses * (sure >= self.hp.threshold)).mean(), weight, uses_unlabeled=True),
        }
