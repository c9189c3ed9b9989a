"""MC-Net+: decoders that upsample differently learn each other's sharpened predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest, rows
from lgssl_nnunet.engine.hyperparameters import check_ranges
from lgssl_nnunet.losses.consistency import mutual_consistency
from lgssl_nnunet.networks.decoders import MultiDecoderUNet, interpolating_twin
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class MCNetPlusHyperparameters:
    """Hyper-parameters of MC-Net+, with the values of its 3D experiments (methods.md section 4).

    Attributes:
        num_decoders: 3 for MC-Net+ (transposed convolution, linear and nearest interpolation), 2 for MC-Net (without
            the last).
        faithful_decoder: interpolating decoders upsample first and then convolve, as published in 3D, at 1.4 times the
            cost of the whole step.
        dropout: rate on the bottleneck, drawn per decoder.
        supervised_weight: weight of each decoder's supervised loss.
        consistency_weight: weight of the consistency after the ramp; 0.1 in the 2D experiments.
        ramp_fraction: share of the iterations over which that weight rises; 1 in the 2D experiments.
        temperature: of the sharpening.
        stop_gradient: sharpened predictions are targets only. False as released: the gradient through them pulls
            predictions that agree between 0.41 and 0.59 to 0.5.
    """

    num_decoders: int = 3
    faithful_decoder: bool = False
    dropout: float = 0.5
    supervised_weight: float = 0.5
    consistency_weight: float = 1.0
    ramp_fraction: float = 0.4
    temperature: float = 0.1
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, num_decoders=(2, 3), dropout=(0, 0.99), supervised_weight=(0, None))
        check_ranges(self, consistency_weight=(0, None), ramp_fraction=(0, 1), temperature=(0.01, 1))


class MCNetPlusTrainer(SemiSupervisedTrainer):
    """One encoder, and decoders whose predictions on all patches follow the sharpened predictions of the others.

    Source: Y. Wu, Z. Ge, D. Zhang, M. Xu, L. Zhang, Y. Xia, J. Cai, "Mutual Consistency Learning for Semi-supervised
    Medical Image Segmentation", Medical Image Analysis 2022; methods.md section 4. The article's pseudo-labels get no
    gradient, the released code's do (`stop_gradient`); sharpening is that of the softmax, where the code sharpens each
    class as if it were the only one. The supervised loss is nnU-Net's, and the first decoder predicts. Each decoder
    draws dropout on the bottleneck anew; there is none before its last layer.
    """

    hyperparameters = MCNetPlusHyperparameters()
    views = ("strong",)
    supports_several_gpus = True
    # Three decoders against two.
    memory_factor = 1.4

    @staticmethod
    def adapt_network(network: nn.Module, hp: MCNetPlusHyperparameters) -> nn.Module:
        """Return the planned network with further decoders that interpolate linearly and by the nearest voxel."""
        upsampling = (False, True)[: hp.num_decoders - 1]
        further = [interpolating_twin(network, hp.faithful_decoder, nearest) for nearest in upsampling]
        return MultiDecoderUNet(network, further, hp.dropout)

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss of every decoder, and the consistency on both kinds of patches.

        The two consistencies are weighted such that they add up to the published mean over all patches.
        """
        n = len(labeled.image)
        image = torch.cat([labeled.image, unlabeled.strong])
        outputs = self.network(image, every_decoder=True)
        supervised = [self.supervised_loss(rows(output, slice(n)), labeled.target) for output in outputs]
        logits = [finest(output) for output in outputs]
        weight, share = self.hp.consistency_weight * self.ramp(self.hp.ramp_fraction), n / len(image)
        return {
            "supervised": Term(torch.stack(supervised).sum(), self.hp.supervised_weight),
            "labelled consistency": Term(self._consistency([z[:n] for z in logits]), share * weight),
            "consistency": Term(self._consistency([z[n:] for z in logits]), (1 - share) * weight, uses_unlabeled=True),
        }

    def _consistency(self, logits: list[Tensor]) -> Tensor:
        return mutual_consistency(
            logits, self.hp.temperature, self.label_manager.has_regions, stop_gradient=self.hp.stop_gradient
        )
