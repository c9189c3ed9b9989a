"""UA-MT: a mean teacher that is followed only where it is certain."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.engine.perturbation import with_noise
from lgssl_nnunet.losses.consistency import agreement
from lgssl_nnunet.losses.uncertainty import entropy, entropy_threshold, mean_of_passes
from lgssl_nnunet.networks.unet import DropoutUNet
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class UAMTHyperparameters:
    """Hyper-parameters of UA-MT, with its published values (methods.md section 3).

    Attributes:
        consistency_weight: weight of the consistency after the ramp.
        ramp_fraction: share of the iterations over which that weight rises.
        teacher_decay: decay of the moving average.
        noise: standard deviation of the noise on the teacher's image, clipped at twice that.
        dropout: rate of the network's dropout, which the passes of the teacher draw anew.
        passes: stochastic passes of the teacher from whose mean the uncertainty is computed.
        first_threshold: largest entropy of a voxel that counts as certain at the start, as a share of the maximum.
        last_threshold: the same at the end of training.
    """

    consistency_weight: float = 0.1
    ramp_fraction: float = 1.0
    teacher_decay: float = 0.99
    noise: float = 0.1
    dropout: float = 0.5
    passes: int = 8
    first_threshold: float = 0.75
    last_threshold: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, consistency_weight=(0, None), ramp_fraction=(0, 1), teacher_decay=(0, 0.9999))
        check_ranges(self, noise=(0, None), dropout=(0, 0.99), passes=(1, None))
        check_ranges(self, first_threshold=(0, 1), last_threshold=(0, 1))


class UAMTTrainer(SemiSupervisedTrainer):
    """Mean Teacher's consistency, restricted to voxels where the teacher's Monte-Carlo entropy is low.

    Source: L. Yu, S. Wang, X. Li, C.-W. Fu, P.-A. Heng, "Uncertainty-aware Self-ensembling Model for Semi-supervised 3D
    Left Atrium Segmentation", MICCAI 2019; methods.md section 3. The consistency is on unlabelled patches, as in the
    script that the repository recommends (the paper has labelled ones as well), the maximal entropy is that of C
    classes instead of two, and the student sees nnU-Net's intensity augmentation.
    """

    hyperparameters = UAMTHyperparameters()
    views = ("weak", "strong")
    supports_several_gpus = True

    @staticmethod
    def adapt_network(network: nn.Module, hp: UAMTHyperparameters) -> nn.Module:
        """Return the planned network with dropout on the bottleneck and before its segmentation layer."""
        return DropoutUNet(network, hp.dropout)

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss and the consistency on certain voxels."""
        supervised = self.supervised_loss(self.network(labeled.image), labeled.target)
        student = self.probabilities(self.network(unlabeled.strong))
        certain = self._uncertainty(unlabeled.weak) < self._threshold(student.shape[1])
        noisy = with_noise(unlabeled.weak, self.hp.noise)
        consistency = agreement(student, self._teacher_pass(noisy), certain)
        weight = self.hp.consistency_weight * self.ramp(self.hp.ramp_fraction)
        return {"supervised": Term(supervised), "consistency": Term(consistency, weight, uses_unlabeled=True)}

    def _teacher_pass(self, noisy: Tensor) -> Tensor:
        return self.probabilities(self.teacher(noisy, dropout=True))

    def _uncertainty(self, image: Tensor) -> Tensor:
        mean = mean_of_passes(self._teacher_pass, image, self.hp.noise, self.hp.passes)
        return entropy(mean, self.label_manager.has_regions)

    def _threshold(self, channels: int) -> float:
        regions = self.label_manager.has_regions
        return entropy_threshold(self.hp.first_threshold, self.hp.last_threshold, self.ramp(), channels, regions)
