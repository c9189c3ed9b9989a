"""AC-MT: a mean teacher that is followed where the prediction is ambiguous."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch
from lgssl_nnunet.engine.hyperparameters import check_choices, check_ranges, resolve
from lgssl_nnunet.engine.perturbation import with_noise
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.losses.ambiguity import prototype_errors, sampled_label_errors
from lgssl_nnunet.losses.consistency import agreement, masked_mean
from lgssl_nnunet.losses.uncertainty import entropy, entropy_threshold, mean_of_passes
from lgssl_nnunet.networks.unet import DropoutUNet
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class ACMTHyperparameters:
    """Hyper-parameters of AC-MT, with its published values (methods.md section 7).

    Attributes:
        variant: rule by which voxels count as ambiguous: "entropy" of the student, "uncertainty" of its mean over noisy
            passes, "label_error" (confident learning) or "prototype" (the published Ent, MU, SErr, PErr).
        first_threshold: least entropy of an ambiguous voxel at the start, as a share of the maximum (first two rules).
        last_threshold: the same at the end: 0.95 in the released left-atrium setting (0.90 for "uncertainty"), 0.60 by
            the falling rule.
        consistency_weight: weight of the consistency after the ramp.
        ramp_fraction: share of the iterations over which that weight rises.
        teacher_decay: decay of the moving average.
        noise: standard deviation of the noise on the teacher's image, and on the student's in the passes of the rule
            "uncertainty", clipped at twice that.
        dropout: rate of the network's dropout.
        passes: stochastic passes of the rules "uncertainty" (published: 8) and "prototype" (published: 10).
        certain_deviation: largest deviation of a certain channel over the passes, by the rule "prototype".
        sampled_voxels: voxels that the rule "label_error" looks at in a step; it sorts them.
        entropy_weight: weight of the entropy of unambiguous voxels beside the consistency, by the rule "prototype".
    """

    variant: str = "entropy"
    first_threshold: float = 0.75
    last_threshold: float = 0.95
    consistency_weight: float = 0.1
    ramp_fraction: float = 0.75
    teacher_decay: float = 0.99
    noise: float = 0.1
    dropout: float = 0.5
    passes: int = 8
    certain_deviation: float = 0.1
    sampled_voxels: int = 50_000
    entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, variant=("entropy", "uncertainty", "label_error", "prototype"))
        check_ranges(self, first_threshold=(0, 1), last_threshold=(0, 1), consistency_weight=(0, None))
        check_ranges(self, ramp_fraction=(0, 1), teacher_decay=(0, 0.9999), noise=(0, None), dropout=(0, 0.99))
        check_ranges(self, passes=(2, None), sampled_voxels=(1, None), entropy_weight=(0, None))
        check_ranges(self, certain_deviation=(0, 1))


class ACMTTrainer(SemiSupervisedTrainer):
    """Mean Teacher's consistency, restricted to ambiguous voxels.

    Source: Z. Xu et al., "Ambiguity-selective consistency regularization for mean-teacher semi-supervised medical
    image segmentation", Medical Image Analysis 88, 2023; methods.md section 7. Every rule divides by the selected
    entries of all C channels (the released "MU" does not), and prototypes and label errors are those of C classes; both
    refuse region-based labels, though prototypes could be made per region. The threshold rises as in the released
    left-atrium setting, whose authors found that better; by the article's rule it falls (`last_threshold=0.6`).
    The student sees nnU-Net's intensity augmentation, and its ambiguity is that of this view (published: of the
    clean one).
    """

    hyperparameters = ACMTHyperparameters()
    views = ("weak", "strong")

    @classmethod
    def check_request(cls, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse region-based labels with the rules that need one class per voxel."""
        super().check_request(plans, configuration, fold, dataset_json)
        variant = resolve(cls.hyperparameters, plans, cls.__name__).variant
        if variant in ("label_error", "prototype") and PlansManager(plans).get_label_manager(dataset_json).has_regions:
            raise UsageError(f"variant={variant} needs one class per voxel, not regions: use entropy or uncertainty.")

    @staticmethod
    def adapt_network(network: nn.Module, hp: ACMTHyperparameters) -> nn.Module:
        """Return the planned network with dropout on the bottleneck and before its segmentation layer."""
        return DropoutUNet(network, hp.dropout)

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss and the consistency on ambiguous voxels."""
        supervised = self.supervised_loss(self.network(labeled.image), labeled.target)
        student = self.probabilities(self.network(unlabeled.strong))
        noisy = with_noise(unlabeled.weak, self.hp.noise)
        teacher = self.probabilities(self.teacher(noisy, dropout=True))
        ambiguous = self._ambiguous(student.detach(), unlabeled.weak)
        weight = self.hp.consistency_weight * self.ramp(self.hp.ramp_fraction)
        terms = {
            "supervised": Term(supervised),
            "consistency": Term(agreement(student, teacher, ambiguous), weight, uses_unlabeled=True),
        }
        if self.hp.variant == "prototype":
            unambiguous = masked_mean(entropy(student, False), ~ambiguous)
            terms["entropy"] = Term(unambiguous, weight * self.hp.entropy_weight, uses_unlabeled=True)
        return terms

    def _ambiguous(self, student: Tensor, image: Tensor) -> Tensor:
        """Return (B, 1, *S) (or per region), where the student's prediction is ambiguous."""
        if self.hp.variant == "label_error":
            return sampled_label_errors(self.probabilities(self.teacher(image)), student, self.hp.sampled_voxels)
        if self.hp.variant == "prototype":
            passes = (self.teacher(image, dropout=True, with_features=True) for _ in range(self.hp.passes))
            return prototype_errors(passes, student, self.hp.certain_deviation)
        if self.hp.variant == "uncertainty":
            student = mean_of_passes(
                lambda noisy: self.probabilities(self.network(noisy)), image, self.hp.noise, self.hp.passes
            )
        regions = self.label_manager.has_regions
        shares = self.hp.first_threshold, self.hp.last_threshold
        threshold = entropy_threshold(*shares, self.ramp(), student.shape[1], regions)
        return entropy(student, regions) >= threshold
