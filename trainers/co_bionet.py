"""Co-BioNet: two networks learn from each other where a critic believes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from lgssl_nnunet.engine.adversarial import Adversary
from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest, rows
from lgssl_nnunet.engine.hyperparameters import check_ranges, resolve
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.losses.adversarial import adversarial_loss, critic_loss
from lgssl_nnunet.losses.consistency import masked_mean
from lgssl_nnunet.losses.pseudo_labels import cross_entropy
from lgssl_nnunet.networks.critics import VoxelCritic
from lgssl_nnunet.networks.ensemble import NetworkPair
from lgssl_nnunet.networks.unet import planned_unet
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class CoBioNetHyperparameters:
    """Hyper-parameters of Co-BioNet, with the published values for the left atrium (methods.md section 6).

    Attributes:
        supervised_weight: lambda_s, weight of the supervised loss (published for pancreas and BraTS: 1.0).
        consistency_weight: weight of all that uses unlabelled patches, after the ramp.
        ramp_fraction: share of the iterations over which that weight rises.
        mask_threshold: t_m, confidence of the critic above which a voxel counts twice (pancreas 0.2, BraTS 0.25).
        adversarial_weight: mu, weight of the adversarial term relative to the consistency weight.
        critic_learning_rate: of the critics' AdamW.
        critic_weight_decay: of the critics' AdamW.
        critic_voxels: voxels per patch that the adversarial term and the critics' training see; 0: all, in much memory.
        spatial_critic: critics with 3x3x3 kernels, trained on boxes of `critic_voxels`, instead of voxel by voxel.
    """

    supervised_weight: float = 0.7
    consistency_weight: float = 1.0
    ramp_fraction: float = 0.4
    mask_threshold: float = 0.4
    adversarial_weight: float = 0.01
    critic_learning_rate: float = 1e-4
    critic_weight_decay: float = 0.01
    critic_voxels: int = 20_000
    spatial_critic: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, supervised_weight=(0, None), consistency_weight=(0, None), ramp_fraction=(0, 1))
        check_ranges(self, mask_threshold=(0, 1), adversarial_weight=(0, None), critic_voxels=(0, None))
        check_ranges(self, critic_learning_rate=(0, None), critic_weight_decay=(0, None))


class CoBioNetTrainer(SemiSupervisedTrainer):
    """Two U-Nets teach each other; a critic of each learns to tell its predictions from labels and says where to trust.

    Source: H. Peiris, M. Hayat, Z. Chen, G. Egan, M. Harandi, "Uncertainty-guided dual-views for semi-supervised
    volumetric medical image segmentation", Nature Machine Intelligence 2023; methods.md section 6. The loss is the
    intended one: critics are trained, every term has a gradient and the mask is per voxel, none of which holds in the
    released code. Which critic judges which network follows that code: a network's critic judges its own predictions,
    and so the targets that it writes (the figure crosses them). Both predict, by their mean; no component filter.
    """

    hyperparameters = CoBioNetHyperparameters()
    views = ("strong",)
    # Two networks of one decoder against one encoder with two decoders, and the critics.
    memory_factor = 1.2

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> NetworkPair:
        """Return the planned U-Net twice, each with an initialisation of its own."""
        sizes = num_input_channels, num_output_channels, enable_deep_supervision
        return NetworkPair(*(planned_unet(configuration_manager, *sizes) for _ in range(2)))

    @classmethod
    def check_request(cls, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse a spatial critic where voxels have no annotation: the gaps would tell it what is annotated."""
        super().check_request(plans, configuration, fold, dataset_json)
        ignores = PlansManager(plans).get_label_manager(dataset_json).has_ignore_label
        if resolve(cls.hyperparameters, plans, cls.__name__).spatial_critic and ignores:
            raise UsageError("spatial_critic=True needs labels in every voxel, and there is an ignore label: leave it.")

    def set_up(self) -> None:
        """Build a critic per network and what trains them."""
        self.plain_network.has_regions = self.label_manager.has_regions
        sizes = self.label_manager.num_segmentation_heads, self.num_dimensions, self.hp.spatial_critic
        critics = nn.ModuleList(VoxelCritic(*sizes) for _ in range(2))
        self.critics = self.add_network("critics", critics, trained=False)
        adversary = Adversary(critics, self.hp.critic_learning_rate, self.hp.critic_weight_decay)
        self.adversary = self.keep("critic_optimizer", adversary)

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return of each network: supervision, difference to the other, the same where trusted, adversarial term."""
        n, terms = len(labeled.image), {}
        outputs = self.network(torch.cat([labeled.image, unlabeled.strong]), member="both")
        weight = self.hp.consistency_weight * self.ramp(self.hp.ramp_fraction)
        learned = [finest(output)[n:] for output in outputs]
        written = [self.probabilities(logits.detach()) for logits in learned]
        self.fakes = []
        for k, suffix in enumerate(("", " second")):
            other = 1 - k
            difference = cross_entropy(learned[k], written[other], self.label_manager.has_regions)
            fake = self.probabilities(self.critics[k].sample(finest(outputs[k]), self.hp.critic_voxels))
            self.fakes.append(fake.detach())
            supervised = self.supervised_loss(rows(outputs[k], slice(n)), labeled.target)
            trusted = masked_mean(difference, self.trusted(other, written[other]))
            adversarial = adversarial_loss(self.critics[k], fake)
            terms |= {
                f"supervised{suffix}": Term(supervised, self.hp.supervised_weight),
                f"difference{suffix}": Term(difference.mean(), weight, uses_unlabeled=True),
                f"trusted difference{suffix}": Term(trusted, weight, uses_unlabeled=True),
                f"adversarial{suffix}": Term(adversarial, weight * self.hp.adversarial_weight, uses_unlabeled=True),
            }
        return terms

    def trusted(self, k: int, p: Tensor) -> Tensor:
        """Return where critic k believes the predicted class (B, 1, *S), or each region (B, C, *S)."""
        confidence = self.critics[k].confidence(p)
        if not self.label_manager.has_regions:
            confidence = confidence.gather(1, p.argmax(dim=1, keepdim=True))
        return confidence > self.hp.mask_threshold

    def extra_steps(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> None:
        """Train the critics to tell labels from the predictions of this step."""
        maps = torch.cat([self.one_hot(labeled.target), self.annotated(labeled.target).float()], dim=1)
        drawn = [critic.sample(maps, self.hp.critic_voxels) for critic in self.critics]
        parts = zip(self.critics, drawn, self.fakes, strict=True)
        self.adversary.update(lambda: sum(critic_loss(c, real[:, :-1], fake, real[:, -1:]) for c, real, fake in parts))
