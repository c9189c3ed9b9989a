"""CAML: two networks learn from each other and from how voxels relate to labelled ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest, rows
from lgssl_nnunet.engine.hyperparameters import check_choices, check_ranges, resolve
from lgssl_nnunet.engine.memory import MemoryBank, check_sizes
from lgssl_nnunet.losses.consistency import mutual_consistency
from lgssl_nnunet.losses.correlation import SIMILARITIES, confident_agreements, correct_agreements, omni_correlation
from lgssl_nnunet.networks.cross_sample_attention import attend_after, attention_stage
from lgssl_nnunet.networks.decoders import interpolating_twin
from lgssl_nnunet.networks.embedding import EmbeddingHeads
from lgssl_nnunet.networks.unet import DropoutUNet
from lgssl_nnunet.plans.folds import fold_cases
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class CAMLHyperparameters:
    """Hyper-parameters of CAML, with its published values (methods.md section 8).

    Attributes:
        supervised_weight: weight of each network's supervised loss.
        consistency_weight: weight of the mutual consistency after the ramp.
        correlation_weight: weight of the correlation consistency after the ramp.
        ramp_fraction: share of the iterations over which both weights rise.
        temperature: of the sharpened predictions.
        stop_gradient: sharpened predictions are targets only; False as released.
        similarity: of a voxel and the memory, "cosine" or, as released, "dot".
        correlation_temperature: of that similarity.
        embedding_size: length of the embeddings.
        memory_size: embeddings kept per case and class (the code: all), 256 KiB on the device and in each checkpoint.
        memory_samples: embeddings per class drawn in a step; a class with fewer is left out.
        max_queries: unlabelled voxels per class in a step, for two classes; with more, each has fewer in proportion.
        attention_tokens: most positions of the stage with attention across samples.
        attention_dropout: rate within that attention.
        faithful_decoder: the auxiliary decoder interpolates first and then convolves, as published.
        dropout: rate on the bottlenecks and before the segmentation layers.
    """

    supervised_weight: float = 0.5
    consistency_weight: float = 1.0
    correlation_weight: float = 0.05
    ramp_fraction: float = 0.4
    temperature: float = 0.1
    stop_gradient: bool = True
    similarity: str = "cosine"
    correlation_temperature: float = 0.1
    embedding_size: int = 32
    memory_size: int = 2048
    memory_samples: int = 256
    max_queries: int = 12_800
    attention_tokens: int = 4096
    attention_dropout: float = 0.5
    faithful_decoder: bool = False
    dropout: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, supervised_weight=(0, None), consistency_weight=(0, None), correlation_weight=(0, None))
        check_ranges(self, ramp_fraction=(0, 1), temperature=(0.01, 1), correlation_temperature=(0.01, None))
        check_ranges(self, embedding_size=(1, None), memory_size=(1, None), memory_samples=(1, None), dropout=(0, 0.99))
        check_ranges(self, max_queries=(1, None), attention_tokens=(1, None), attention_dropout=(0, 0.99))
        check_choices(self, similarity=SIMILARITIES)


class CAMLTrainer(SemiSupervisedTrainer):
    """A vanilla network, and an auxiliary one that attends across the batch; they agree in prediction and correlation.

    Source: S. Gao, Z. Zhang, J. Ma, Z. Li, S. Zhang, "Correlation-Aware Mutual Learning for Semi-supervised Medical
    Image Segmentation", MICCAI 2023; methods.md section 8. Embeddings have 32 numbers as in the released code (64 are
    announced), similarity is the article's cosine (the code has the dot product), the memory holds voxels of earlier
    steps and grows as cases x classes x `memory_size` x `embedding_size`. Attention makes every term of the auxiliary
    network depend on the unlabelled patches. The vanilla network predicts.
    """

    hyperparameters = CAMLHyperparameters()
    views = ("strong",)
    supports_regions = False
    memory_factor = 1.3  # two networks of one decoder, and attention, against one encoder with two decoders

    @classmethod
    def check_request(cls, plans: dict, configuration: str, fold: int | str, dataset_json: dict) -> None:
        """Refuse, too, an attention limit that no stage of the network keeps, and sizes that leave no correlation."""
        super().check_request(plans, configuration, fold, dataset_json)
        hp, planned = resolve(cls.hyperparameters, plans, cls.__name__), PlansManager(plans)
        attention_stage(planned.get_configuration(configuration), hp.attention_tokens)
        cases, _ = fold_cases(plans["lgssl"], fold)
        check_sizes(hp, len(cases), planned.get_label_manager(dataset_json).num_segmentation_heads)

    @staticmethod
    def adapt_network(network: nn.Module, hp: CAMLHyperparameters) -> nn.Module:
        """Return the planned network with dropout on the bottleneck and before its segmentation layer."""
        return DropoutUNet(network, hp.dropout)

    def set_up(self) -> None:
        """Build the auxiliary network, an embedding head for each network, and the memory."""
        auxiliary = self.another_network()
        auxiliary.decoder = interpolating_twin(auxiliary, faithful=self.hp.faithful_decoder)
        stage = attention_stage(self.configuration_manager, self.hp.attention_tokens)
        attend_after(auxiliary.encoder, stage, self.hp.attention_dropout)
        self.auxiliary = self.add_network("auxiliary_network", auxiliary)
        heads = EmbeddingHeads(2, auxiliary.encoder.output_channels[0], self.hp.embedding_size)
        self.heads = self.add_network("embedding_heads", heads)
        self.memory = self.keep("memory", MemoryBank(self.hp.embedding_size, self.hp.memory_size, self.device))
        self.seen: dict[str, tuple] = {}

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return the supervised loss of both networks, and their consistency in prediction and in correlation."""
        n, image = len(labeled.image), torch.cat([labeled.image, unlabeled.strong])
        outputs, decoded = zip(*(net(image, with_features=True) for net in (self.network, self.auxiliary)), strict=True)
        logits, features = [finest(output) for output in outputs], [stages[0] for stages in decoded]
        supervised = [self.supervised_loss(rows(output, slice(n)), labeled.target) for output in outputs]
        consistency = mutual_consistency(logits, self.hp.temperature, False, stop_gradient=self.hp.stop_gradient)
        correlation = self._correlation(rows(logits, slice(n, None)), rows(features, slice(n, None)))
        self.seen = self._correct_voxels(labeled, logits, features)
        ramp = self.ramp(self.hp.ramp_fraction)
        return {
            "supervised": Term(supervised[0], self.hp.supervised_weight),
            "supervised auxiliary": Term(supervised[1], self.hp.supervised_weight, uses_unlabeled=True),
            "consistency": Term(consistency, self.hp.consistency_weight * ramp, uses_unlabeled=True),
            "correlation": Term(correlation, self.hp.correlation_weight * ramp, uses_unlabeled=True),
        }

    def extra_steps(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> None:
        """Put the step's labelled voxels into the memory, once the step is known to be sound."""
        for case, voxels in self.seen.items():
            self.memory.replace(case, *voxels)

    def _correlation(self, logits: list[Tensor], features: list[Tensor]) -> Tensor:
        """Compare how the networks relate the most confident unlabelled voxels to the memory."""
        queries = confident_agreements(*logits, most=self.hp.max_queries * 2 // logits[0].shape[1])
        memory = self.memory.sample(self.hp.memory_samples)
        embeddings = self.heads(features, queries)
        return omni_correlation(*embeddings, memory, self.hp.correlation_temperature, self.hp.similarity)

    @torch.no_grad()
    def _correct_voxels(self, labeled: LabeledBatch, logits: list[Tensor], features: list[Tensor]) -> dict[str, tuple]:
        """Return embeddings and classes of random voxels that both networks classify correctly, by case."""
        found = {}
        for case in dict.fromkeys(labeled.keys):
            own = [row for row, key in enumerate(labeled.keys) if key == case]
            positions, classes = correct_agreements(*rows([*logits, finest(labeled.target)], own), self.hp.memory_size)
            found[case] = self.heads.project(rows(features, own), positions), classes
        return found
