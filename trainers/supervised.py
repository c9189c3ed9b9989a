"""The baseline: nnU-Net on the labelled cases alone."""

from __future__ import annotations

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


class SupervisedTrainer(SemiSupervisedTrainer):
    """nnU-Net's network, loss, augmentation and schedule on the labelled cases of the plans.

    What every semi-supervised method has to beat at the same number of iterations.
    """

    views = ()
    supports_several_gpus = True
    supports_partial_labels = True
    # One decoder and no unlabelled patches, of a step that the planner sized for two of each.
    memory_factor = 0.3

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> dict[str, Term]:
        """Return the supervised loss."""
        outputs = self.network(labeled.image)
        return {"supervised": Term(self.supervised_loss(outputs, labeled.target, labeled.known))}
