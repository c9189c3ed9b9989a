"""TAC: labelled and unlabelled patches have the same class prototypes, in the encoder and in the gated skips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, rows
from lgssl_nnunet.engine.hyperparameters import check_choices, check_ranges, resolve
from lgssl_nnunet.losses.prototypes import DENOMINATORS, RESIZING, prototype_consistency
from lgssl_nnunet.networks.attention_gates import AttentionGatedUNet
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class TACHyperparameters:
    """Hyper-parameters of TAC (methods.md section 10).

    Attributes:
        attention_weight: weight of the prototypes of the gated skips (structure) after the ramp; published: 1, for
            `denominator` "batch", which halves the prototypes of two samples and makes their difference count a fourth.
        encoder_weight: weight of the prototypes of the encoder (context) after the ramp; published: 0.5, likewise.
        ramp_fraction: share of the iterations over which both weights rise; published: 0, no ramp.
        denominator: "sample" compares means over the class, averaged over samples; "batch" divides by the class's size
            in the whole batch and compares samples in pairs, as released.
        min_voxels: size from which on a sample has a class, at the resolution of the feature; published: 0, so that
            absent classes have a prototype of 0.
        mask_resize: how masks get the resolution of the features, "nearest" as published or "area" (thin structures).
        stop_gradient: unlabelled prototypes follow the labelled ones, which stay; published: False.
    """

    attention_weight: float = 0.25
    encoder_weight: float = 0.125
    ramp_fraction: float = 0.1
    denominator: str = "sample"
    min_voxels: float = 4.0
    mask_resize: str = "nearest"
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, attention_weight=(0, None), encoder_weight=(0, None), ramp_fraction=(0, 1))
        check_ranges(self, min_voxels=(0, None))
        check_choices(self, denominator=DENOMINATORS, mask_resize=tuple(RESIZING))


class TACTrainer(SemiSupervisedTrainer):
    """A U-Net with attention gates; class prototypes of unlabelled patches follow those of labelled ones.

    Source: J. Chen, J. Zhang, K. Debattista, J. Han, "Semi-supervised Unpaired Medical Image Segmentation Through
    Task-affinity Consistency", IEEE Transactions on Medical Imaging 2023; methods.md section 10. The supervised loss is
    nnU-Net's, gated skips are concatenated, and there is no dropout, which would zero other channels in either half of
    the batch. Presence of classes, means per sample with weights to match, fixed labelled prototypes and the ramp
    deviate from the released code; each has its switch.
    """

    hyperparameters = TACHyperparameters()
    views = ("strong",)
    supports_several_gpus = True

    @classmethod
    def check_request(cls, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse, too, batches that have no pairs where prototypes are compared in pairs."""
        super().check_request(plans, configuration, fold, dataset_json)
        if resolve(cls.hyperparameters, plans, cls.__name__).denominator == "batch":
            cls.check_pairs(plans, configuration)

    @staticmethod
    def adapt_network(network: nn.Module, hp: TACHyperparameters) -> nn.Module:
        """Return the planned network with gates on its skips."""
        return AttentionGatedUNet(network)

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss and the consistency of prototypes at every scale of both views."""
        n = len(labeled.image)
        outputs, encoded, gated = self.network(torch.cat([labeled.image, unlabeled.strong]), with_skips=True)
        consistency = partial(
            prototype_consistency,
            labeled_mask=self.one_hot(labeled.target),
            unlabeled_mask=self.probabilities(rows(outputs, slice(n, None))),
            denominator=self.hp.denominator,
            min_voxels=self.hp.min_voxels,
            resize=self.hp.mask_resize,
            stop_gradient=self.hp.stop_gradient,
        )
        ramp = self.ramp(self.hp.ramp_fraction)
        return {
            "supervised": Term(self.supervised_loss(rows(outputs, slice(n)), labeled.target)),
            "gated skips": Term(consistency(gated), self.hp.attention_weight * ramp, uses_unlabeled=True),
            "encoder": Term(consistency(encoded), self.hp.encoder_weight * ramp, uses_unlabeled=True),
        }
