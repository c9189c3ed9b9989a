"""CPS: two networks write pseudo-labels for each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.losses.pseudo_labels import cross_entropy, hard_labels
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class CPSHyperparameters:
    """Hyper-parameters of CPS, with the values of its port to 3D (methods.md section 13).

    Attributes:
        pseudo_weight: weight of the cross-entropy against the other network's labels after the ramp.
        ramp_fraction: share of the iterations over which that weight rises.
    """

    pseudo_weight: float = 0.1
    ramp_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, pseudo_weight=(0, None), ramp_fraction=(0, 1))


class CPSTrainer(SemiSupervisedTrainer):
    """Two networks that differ in their initialisation; each learns the other's hard labels on unlabelled patches.

    Source: X. Chen, Y. Yuan, G. Zeng, J. Wang, "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision",
    CVPR 2021; methods.md section 13. As in the 3D port, labelled patches have no pseudo-label; the first network
    predicts. Both have nnU-Net's initialisation (the port: one of them Xavier's).
    """

    hyperparameters = CPSHyperparameters()
    views = ("strong",)
    supports_several_gpus = True
    # Two networks of one decoder against one encoder with two decoders.
    memory_factor = 1.2

    def set_up(self) -> None:
        """Build the second network."""
        self.second = self.add_network("second_network", self.another_network())

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss of both networks and what each learns from the other."""
        supervised = [self.supervised_loss(net(labeled.image), labeled.target) for net in (self.network, self.second)]
        first, second = (finest(net(unlabeled.strong)) for net in (self.network, self.second))
        weight = self.hp.pseudo_weight * self.ramp(self.hp.ramp_fraction)
        return {
            "supervised": Term(supervised[0]),
            "supervised second": Term(supervised[1]),
            "pseudo": Term(self._learn_from(second, first), weight, uses_unlabeled=True),
            "pseudo second": Term(self._learn_from(first, second), weight, uses_unlabeled=True),
        }

    def _learn_from(self, teacher: Tensor, student: Tensor) -> Tensor:
        regions = self.label_manager.has_regions
        return cross_entropy(student, hard_labels(self.probabilities(teacher), regions), regions).mean()
