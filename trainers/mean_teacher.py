"""Mean Teacher: the student agrees with the moving average of itself."""

from __future__ import annotations

from dataclasses import dataclass

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.engine.perturbation import with_noise
from lgssl_nnunet.losses.consistency import agreement
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class MeanTeacherHyperparameters:
    """Hyper-parameters of Mean Teacher, with the values of its segmentation port (methods.md section 12).

    Attributes:
        consistency_weight: weight of the consistency after the ramp.
        ramp_fraction: share of the iterations over which that weight rises.
        teacher_decay: decay of the moving average.
        noise: standard deviation of the noise on the teacher's image, clipped at twice that.
    """

    consistency_weight: float = 0.1
    ramp_fraction: float = 1.0
    teacher_decay: float = 0.99
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(self, consistency_weight=(0, None), ramp_fraction=(0, 1))
        check_ranges(self, teacher_decay=(0, 0.9999), noise=(0, None))


class MeanTeacherTrainer(SemiSupervisedTrainer):
    """The student's probabilities follow those of its moving average on unlabelled patches.

    Source: A. Tarvainen, H. Valpola, "Mean teachers are better role models", NeurIPS 2017; methods.md section 12. The
    student sees nnU-Net's intensity augmentation, as on labelled patches, and the teacher the patch without it.
    """

    hyperparameters = MeanTeacherHyperparameters()
    views = ("weak", "strong")
    supports_several_gpus = True

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss and the squared difference to the teacher."""
        supervised = self.supervised_loss(self.network(labeled.image), labeled.target)
        student = self.probabilities(self.network(unlabeled.strong))
        teacher = self.probabilities(self.teacher(with_noise(unlabeled.weak, self.hp.noise)))
        weight = self.hp.consistency_weight * self.ramp(self.hp.ramp_fraction)
        return {
            "supervised": Term(supervised),
            "consistency": Term(agreement(student, teacher), weight, uses_unlabeled=True),
        }
