"""MCF: two networks of different families correct each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.losses.consistency import agreement
from lgssl_nnunet.losses.pseudo_labels import sharpened
from lgssl_nnunet.losses.rectification import dice_of_present_classes, disagreement, rectification
from lgssl_nnunet.networks.ensemble import NetworkPair
from lgssl_nnunet.networks.families import as_plain, as_residual
from lgssl_nnunet.networks.unet import planned_unet
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class MCFHyperparameters:
    """Hyper-parameters of MCF, with the published values (methods.md section 5).

    Attributes:
        rectification_weight: weight of the squared error where the two networks' hard predictions differ.
        pseudo_weight: weight of the worse network's difference to the pseudo-labels after the ramp.
        ramp_fraction: share of the iterations over which that weight rises.
        temperature: of the sharpened pseudo-labels.
    """

    rectification_weight: float = 0.5
    pseudo_weight: float = 0.1
    ramp_fraction: float = 1.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(self, rectification_weight=(0, None), pseudo_weight=(0, None), ramp_fraction=(0, 1))
        check_ranges(self, temperature=(0.01, 1))


class MCFTrainer(SemiSupervisedTrainer):
    """A plain and a residual-encoder U-Net: each reviews its errors, and the better one teaches the other.

    Source: Y. Wang, B. Xiao, X. Bi, W. Li, X. Gao, "MCF: Mutual Correction Framework for Semi-Supervised Medical Image
    Segmentation", CVPR 2023; methods.md section 5. nnU-Net's two families stand for V-Net and ResNet-34 encoder, and
    nnU-Net's augmentation for none. In each step the network with the lower Dice loss on the labelled patches (of the
    classes that occur in them; ties go to the second) writes the pseudo-labels. Both predict, by their mean.
    """

    hyperparameters = MCFHyperparameters()
    views = ("strong",)
    supports_several_gpus = True
    # On labelled patches both networks with gradient, on unlabelled ones one of them.
    memory_factor = 1.1

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> NetworkPair:
        """Return the planned U-Net in its plain and in its residual form."""
        sizes = num_input_channels, num_output_channels, enable_deep_supervision
        families = as_plain(configuration_manager), as_residual(configuration_manager)
        return NetworkPair(*(planned_unet(family, *sizes) for family in families))

    @classmethod
    def check_request(cls, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse plans whose network has no other family."""
        super().check_request(plans, configuration, fold, dataset_json)
        as_plain(PlansManager(plans).get_configuration(configuration))

    def set_up(self) -> None:
        """Tell the networks whether their channels are regions."""
        self.plain_network.has_regions = self.label_manager.has_regions

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return supervision and rectification of both networks, and what the worse one learns from the better."""
        first, second = self.network(labeled.image, member="both")
        p1, p2 = self.probabilities(first), self.probabilities(second)
        label, annotated = self.one_hot(labeled.target), self.annotated(labeled.target)
        reviewed = disagreement(p1, p2, self.label_manager.has_regions) & annotated
        better, worse = ("first", "second") if self._first_is_better(p1, p2, label, annotated) else ("second", "first")
        weight = self.hp.pseudo_weight * self.ramp(self.hp.ramp_fraction)
        pseudo = self._learn_from(better, worse, unlabeled.strong)
        return {
            "supervised": Term(self.supervised_loss(first, labeled.target)),
            "supervised second": Term(self.supervised_loss(second, labeled.target)),
            "rectification": Term(rectification(p1, label, reviewed), self.hp.rectification_weight),
            "rectification second": Term(rectification(p2, label, reviewed), self.hp.rectification_weight),
            "pseudo": Term(pseudo, weight, uses_unlabeled=True),
        }

    @torch.no_grad()
    def _first_is_better(self, p1: Tensor, p2: Tensor, label: Tensor, annotated: Tensor) -> bool:
        losses = [dice_of_present_classes(p, label, annotated, self.label_manager.has_regions) for p in (p1, p2)]
        return bool(losses[1] > losses[0])

    def _learn_from(self, better: str, worse: str, image: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = finest(self.network(image, member=better))
        pseudo_label = sharpened(teacher, self.hp.temperature, self.label_manager.has_regions)
        return agreement(self.probabilities(self.network(image, member=worse)), pseudo_label)
