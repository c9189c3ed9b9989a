"""BCP: labelled and unlabelled patches are pasted into each other, and both halves are supervised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lgssl_nnunet.data.mixing import fixed_boxes
from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, rows
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.losses.pseudo_labels import hard_labels
from lgssl_nnunet.losses.weighted import weighted_dice_and_cross_entropy
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class BCPHyperparameters:
    """Hyper-parameters of BCP (methods.md section 11).

    Attributes:
        box: edge of the pasted box as a share of the patch's.
        pseudo_weight: weight of the pseudo-labelled voxels; BCP has no ramp.
        teacher_decay: decay of the moving average.
        pretraining_fraction: share of the iterations in which labelled patches are pasted into each other (stage 1);
            published: 2,000 of 17,000. A batch of one labelled patch is left as it is then.
    """

    box: float = 2 / 3
    pseudo_weight: float = 0.5
    teacher_decay: float = 0.99
    pretraining_fraction: float = 2 / 17

    def __post_init__(self) -> None:
        check_ranges(self, box=(0, 1), pseudo_weight=(0, None), teacher_decay=(0, 0.9999), pretraining_fraction=(0, 1))


class BCPTrainer(SemiSupervisedTrainer):
    """Bidirectional copy-paste: the student learns mixtures, from labels and from the teacher's labels.

    Source: Y. Bai, D. Chen, Q. Li, W. Shen, Y. Wang, "Bidirectional Copy-Paste for Semi-Supervised Medical Image
    Segmentation", CVPR 2023; methods.md section 11. Both stages run in one training, and the last checkpoint is the
    model (the released code starts stage 2 from a network chosen on the test list, teacher and student alike; here
    the teacher averages from the start). The box is drawn per patch, and pseudo-labels are not reduced to their
    largest component, which would be wrong for classes of several parts.
    """

    hyperparameters = BCPHyperparameters()
    views = ("strong",)
    pairs_batches = True
    # As many mixtures as labelled patches, one decoder.
    memory_factor = 0.4

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the loss on labelled and on pseudo-labelled voxels, each the mean of both directions of pasting."""
        regions = self.label_manager.has_regions
        image, label, trusted = labeled.image, self.one_hot(labeled.target), self.annotated(labeled.target)
        first_stage = self.iteration < self.hp.pretraining_fraction * self.num_iterations
        # In every second row the other patch is pasted outside of the box, else inside. In the first stage the rows
        # swap their boxes: with both directions two patches would give the same mixture twice.
        turns = (torch.arange(len(image), device=image.device) + self.iteration) % 2 == 1
        outwards = torch.zeros_like(turns) if first_stage else turns
        pasted = fixed_boxes(image, self.hp.box) ^ outwards.view(-1, *[1] * (image.ndim - 1))
        if first_stage:
            other, other_label, other_trusted = (x.roll(1, dims=0) for x in (image, label, trusted))
            known, pseudo = torch.where(pasted, other_trusted, trusted), torch.zeros_like(trusted)
        else:
            other, known, pseudo = unlabeled.strong, trusted & ~pasted, pasted
            other_label = hard_labels(self.probabilities(self.teacher(other)), regions)
        outputs = self.network(torch.where(pasted, other, image))
        label = torch.where(pasted, other_label, label)
        batch_dice = self.configuration_manager.batch_dice
        loss = partial(weighted_dice_and_cross_entropy, has_regions=regions, batch_dice=batch_dice)

        def mean_of_directions(voxels: Tensor) -> Tensor:
            """The labelled part is larger in one direction; in one loss over all rows it would outweigh the other."""
            chosen = [r for r in (outwards, ~outwards) if r.any()]
            losses = [self.at_every_scale(loss, rows(outputs, r), label[r], voxels[r]) for r in chosen]
            return torch.stack(losses).mean()

        return {
            "labelled voxels": Term(mean_of_directions(known), uses_unlabeled=True),
            "pseudo-labelled voxels": Term(mean_of_directions(pseudo), self.hp.pseudo_weight, uses_unlabeled=True),
        }
