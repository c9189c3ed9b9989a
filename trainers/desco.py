"""DeSCO: two networks with different patches write pseudo-labels for each other where they are certain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.engine.perturbation import with_noise
from lgssl_nnunet.losses.pseudo_labels import hard_labels
from lgssl_nnunet.losses.uncertainty import entropy, entropy_threshold, maximal_entropy, mean_of_passes
from lgssl_nnunet.losses.weighted import weighted_cross_entropy
from lgssl_nnunet.networks.unet import DropoutUNet
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class DeSCOHyperparameters:
    """Hyper-parameters of DeSCO, with its published values (methods.md section 9).

    Attributes:
        pseudo_weight: weight of the pseudo-labels after the ramp; the labels have one minus that.
        ramp_fraction: share of the iterations over which that weight rises.
        noise: standard deviation of the noise on the images of the stochastic passes, clipped at twice that.
        dropout: rate of the networks' dropout.
        passes: stochastic passes of the other network from whose mean the uncertainty is computed.
        first_threshold: largest entropy of a voxel that counts as certain at the start, as a share of the maximum.
        last_threshold: the same at the end of training.
    """

    pseudo_weight: float = 0.1
    ramp_fraction: float = 1.0
    noise: float = 0.1
    dropout: float = 0.5
    passes: int = 8
    first_threshold: float = 0.75
    last_threshold: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, pseudo_weight=(0, 1), ramp_fraction=(0, 1), noise=(0, None), dropout=(0, 0.99))
        check_ranges(self, passes=(1, None), first_threshold=(0, 1), last_threshold=(0, 1))


class DeSCOTrainer(SemiSupervisedTrainer):
    """Two networks on patches of their own; each learns the other's hard labels where the other is certain.

    Source: H. Cai, S. Li, L. Qi, Q. Yu, Y. Shi, Y. Gao, "Orthogonal Annotation Benefits Barely-supervised Medical Image
    Segmentation", CVPR 2023; methods.md section 9. The published networks have a loader each; here they take the
    rows of one batch in turns (both take the row of a batch that has only one). The first network predicts.
    """

    hyperparameters = DeSCOHyperparameters()
    views = ("strong",)
    # Two networks of one decoder, each with half of the patches, against one encoder with two decoders.
    memory_factor = 0.6

    @staticmethod
    def adapt_network(network: nn.Module, hp: DeSCOHyperparameters) -> nn.Module:
        """Return the planned network with dropout on the bottleneck and before its segmentation layer."""
        return DropoutUNet(network, hp.dropout)

    def set_up(self) -> None:
        """Build the second network."""
        self.second = self.add_network("second_network", self.another_network())

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return for each network the loss on its labelled patches and on the other's pseudo-labels."""
        weight = self.hp.pseudo_weight * self.ramp(self.hp.ramp_fraction)
        terms = {}
        for turn, name in enumerate(("", " second")):
            network, other = (self.network, self.second) if turn == 0 else (self.second, self.network)
            rows, image = self._own_rows(labeled.image, turn), unlabeled.strong
            target = [scale[rows] for scale in labeled.target]
            terms[f"supervised{name}"] = Term(self.supervised_loss(network(labeled.image[rows]), target), 1 - weight)
            pseudo = self._learn_from(other, network, image[self._own_rows(image, turn)])
            terms[f"pseudo{name}"] = Term(pseudo, weight, uses_unlabeled=True)
        return terms

    def _own_rows(self, patches: Tensor, turn: int) -> slice:
        """Every second row, the other half in the next iteration (the loader forces foreground into the last rows)."""
        return slice((turn + self.iteration) % 2, None, 2) if len(patches) > 1 else slice(None)

    def _learn_from(self, teacher: nn.Module, student: nn.Module, image: Tensor) -> Tensor:
        regions = self.label_manager.has_regions
        outputs = finest(student(image))
        with torch.no_grad():
            label = hard_labels(self.probabilities(teacher(image)), regions)
        mean = mean_of_passes(lambda: self.probabilities(teacher(with_noise(image, self.hp.noise))), self.hp.passes)
        maximum = maximal_entropy(outputs.shape[1], regions)
        threshold = entropy_threshold(self.hp.first_threshold, self.hp.last_threshold, self.ramp(), maximum)
        return weighted_cross_entropy(outputs, label, entropy(mean, regions) < threshold, regions)
