"""DeSCO: two networks, each taught by one of two orthogonal slices, write pseudo-labels for each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lgssl_nnunet.data.sparse import OrthogonalDataset, follow_nearest
from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest, rows
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.engine.schedules import slice_trust
from lgssl_nnunet.losses.pseudo_labels import hard_labels
from lgssl_nnunet.losses.uncertainty import entropy, entropy_threshold, mean_of_passes
from lgssl_nnunet.losses.weighted import weighted_cross_entropy, weighted_dice_and_cross_entropy
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
        trust: weight of a propagated label per slice of distance in the first stage (sparse mode).
        trust_stages: equal stages of the training; from the second on a cosine takes that weight towards 0 (sparse
            mode).
    """

    pseudo_weight: float = 0.1
    ramp_fraction: float = 1.0
    noise: float = 0.1
    dropout: float = 0.5
    passes: int = 8
    first_threshold: float = 0.75
    last_threshold: float = 1.0
    trust: float = 0.95
    trust_stages: int = 6

    def __post_init__(self) -> None:
        check_ranges(self, pseudo_weight=(0, 1), ramp_fraction=(0, 1), noise=(0, None), dropout=(0, 0.99))
        check_ranges(self, passes=(1, None), first_threshold=(0, 1), last_threshold=(0, 1))
        check_ranges(self, trust=(0, 1), trust_stages=(1, None))


class DeSCOTrainer(SemiSupervisedTrainer):
    """Two networks on patches of their own; each learns the other's hard labels where the other is certain.

    Source: H. Cai, S. Li, L. Qi, Q. Yu, Y. Shi, Y. Gao, "Orthogonal Annotation Benefits Barely-supervised Medical Image
    Segmentation", CVPR 2023; methods.md section 9. Sparse mode, on plans of lgssl_sparse_annotation, is the published
    one: each network learns the labels propagated from one of two slices, weighted by their distance to it. Dense mode,
    on other plans, has whole labels and nnU-Net's loss on them. The published networks have a loader each; here they
    take the rows of one batch in turns (both take the row of a batch that has only one). The first network predicts.
    """

    hyperparameters = DeSCOHyperparameters()
    views = ("strong",)
    supports_sparse_annotation = True
    # Two networks of one decoder, each with half of the patches, against one encoder with two decoders.
    memory_factor = 0.6

    @staticmethod
    def adapt_network(network: nn.Module, hp: DeSCOHyperparameters) -> nn.Module:
        """Return the planned network with dropout on the bottleneck and before its segmentation layer."""
        return DropoutUNet(network, hp.dropout)

    def set_up(self) -> None:
        """Build the second network."""
        self.second = self.add_network("second_network", self.another_network())

    @property
    def is_sparse(self) -> bool:
        """Whether the plans have two slices per labelled case."""
        return "sparse_annotation" in self.settings

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """Return training cases, in sparse mode without their whole labels, and validation cases with them."""
        training, validation = super().get_tr_and_val_datasets()
        if self.is_sparse:
            training = OrthogonalDataset(self.preprocessed_dataset_folder, training.identifiers)
        return training, validation

    def get_training_transforms(self, *arguments: Any, **options: Any) -> Any:
        """Return nnU-Net's transforms; in sparse mode label and distance come from the same voxel."""
        transforms = super().get_training_transforms(*arguments, **options)
        return follow_nearest(transforms) if self.is_sparse else transforms

    def on_train_start(self) -> None:
        """Say in the log which mode the run is in."""
        super().on_train_start()
        labels = "sparse mode: two propagated slices per case" if self.is_sparse else "dense mode: whole labels"
        self.print_to_log_file(f"DeSCO trains in {labels}; the validation compares with whole labels.")

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return for each network the loss on its labelled patches and on the other's pseudo-labels."""
        weight = self.hp.pseudo_weight * self.ramp(self.hp.ramp_fraction)
        networks, terms = (self.network, self.second), {}
        own = [self._own_rows(labeled.image, turn) for turn in range(2)]
        images = [unlabeled.strong[self._own_rows(unlabeled.strong, turn)] for turn in range(2)]
        patches = [torch.cat([labeled.image[own[turn]], images[turn]]) for turn in range(2)]
        # With gradient first: older versions of torch keep the half-precision weights of a pass without one.
        outputs = [network(both) for network, both in zip(networks, patches, strict=True)]
        for turn, name in enumerate(("", " second")):
            n = len(patches[turn]) - len(images[turn])
            supervise = partial(self._sparse_loss, turn=turn) if self.is_sparse else self.supervised_loss
            loss = supervise(rows(outputs[turn], slice(n)), rows(labeled.target, own[turn]))
            terms[f"supervised{name}"] = Term(loss, 1 - weight)
            student = finest(rows(outputs[turn], slice(n, None)))
            pseudo = self._learn_from(networks[1 - turn], student, images[turn])
            terms[f"pseudo{name}"] = Term(pseudo, weight, uses_unlabeled=True)
        return terms

    def _own_rows(self, patches: Tensor, turn: int) -> slice:
        """Every second row, the other half in the next iteration (the loader forces foreground into the last rows)."""
        return slice((turn + self.iteration) % 2, None, 2) if len(patches) > 1 else slice(None)

    def _sparse_loss(self, outputs: Tensor | list[Tensor], target: Tensor | list[Tensor], turn: int) -> Tensor:
        """Return Dice and cross-entropy on one of the label maps, weighted by the distance to its slice."""
        label, steps = (finest(target)[:, channel : channel + 1] for channel in (turn, 2 + turn))
        trust = slice_trust(self.iteration, self.num_iterations, self.hp.trust, self.hp.trust_stages)
        weight = torch.where(steps > 0, trust ** (steps.float() - 1), 0.0)
        batch_dice = self.configuration_manager.batch_dice
        loss = partial(weighted_dice_and_cross_entropy, has_regions=False, batch_dice=batch_dice)
        return self.at_every_scale(loss, outputs, self.one_hot(label), weight)

    def _learn_from(self, teacher: nn.Module, outputs: Tensor, image: Tensor) -> Tensor:
        regions = self.label_manager.has_regions
        with torch.no_grad():
            label = hard_labels(self.probabilities(teacher(image)), regions)
        mean = mean_of_passes(lambda noisy: self.probabilities(teacher(noisy)), image, self.hp.noise, self.hp.passes)
        shares = self.hp.first_threshold, self.hp.last_threshold
        threshold = entropy_threshold(*shares, self.ramp(), outputs.shape[1], regions)
        return weighted_cross_entropy(outputs, label, entropy(mean, regions) < threshold, regions)
