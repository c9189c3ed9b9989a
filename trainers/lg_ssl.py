"""LG-SSL: language-guided semi-supervised segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, UnlabeledBatch, finest, rows
from lgssl_nnunet.engine.hyperparameters import check_choices, check_effects, check_ranges, resolve
from lgssl_nnunet.losses.consistency import agreement, difference_agreement, distill
from lgssl_nnunet.losses.language import alignment, class_map_loss
from lgssl_nnunet.losses.marginal import certain_labels
from lgssl_nnunet.networks.language_guided import PREDICTIONS, PROMPT_MODES, Language, build_language_guided_unet
from lgssl_nnunet.text.adapter import PROMPT_SOURCES
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer


@dataclass(frozen=True)
class LGSSLHyperparameters:
    """Hyper-parameters of LG-SSL; the published code states no loss weights (methods.md 2.7).

    Attributes:
        prompt_mode: "attention" (any patch size), "fixed_volume" (the published token volume) or "none" (no TVSF).
        prompt_source: "text", or a control: frozen "random" vectors, "learned" ones of the same size, or "shuffled"
            class names, which "attention" hardly notices without the weights below: its prompts are a set.
        text_encoder: encoder of the prompts, as for planning, in place of the planned one.
        tvsf_stages: at how many of the deepest stages text is fused in; 1, the bottleneck, is published.
        class_map_weight: weight of a cross-entropy between labels and the attention of positions to prompts; ours.
        alignment_weight: weight of the distance between a class's mean image feature and its prompt feature; ours.
        residual_gate: add the fused feature to the image feature, times a learnable gate; False is published.
        gate_start: value of that gate at the start.
        affine_norm: learnable scale and shift in TVSF's normalisations; False is the published form.
        stop_gradient: keep unlabelled patches from changing the prompt features.
        faithful_decoder: decoder 2 upsamples first and then convolves, as published, at 1.6 times the cost.
        dropout: rate on the fused bottleneck, drawn per decoder.
        agreement: form of the agreement term, "squared" (of probabilities) or "distill" (of logits, temperature 2).
        detach_labeled: the difference term leaves the labelled predictions alone; False as drawn in the figure.
        consistency_weight: weight of both consistency terms after the ramp.
        agreement_weight: weight of the agreement term within it.
        difference_weight: weight of the labelled-minus-unlabelled term within it.
        ramp_fraction: share of the iterations over which the consistency weight rises.
        prediction: decoder that predicts, "first" as published, or "mean" of both decoders' logits.
    """

    prompt_mode: str = "attention"
    prompt_source: str = "text"
    text_encoder: str = "planned"
    tvsf_stages: int = 1
    class_map_weight: float = 0.0
    alignment_weight: float = 0.0
    residual_gate: bool = True
    gate_start: float = 1.0
    affine_norm: bool = True
    stop_gradient: bool = True
    faithful_decoder: bool = False
    dropout: float = 0.5
    agreement: str = "squared"
    detach_labeled: bool = True
    consistency_weight: float = 1.0
    agreement_weight: float = 1.0
    difference_weight: float = 1.0
    ramp_fraction: float = 0.4
    prediction: str = "first"
    unused: ClassVar = {"prompt_mode": PROMPT_MODES, "residual_gate": {False: ("gate_start",)}}

    def __post_init__(self) -> None:
        check_choices(self, prompt_mode=PROMPT_MODES, prompt_source=PROMPT_SOURCES, agreement=("squared", "distill"))
        check_choices(self, prediction=PREDICTIONS)
        weights = dict.fromkeys((name for name in vars(self) if name.endswith("_weight")), (0, None))
        check_ranges(self, tvsf_stages=(1, None), dropout=(0, 0.99), ramp_fraction=(0, 1), **weights)
        check_effects(self, ("class_map_weight", "alignment_weight"))  # without attention they cannot be computed


class LGSSLTrainer(SemiSupervisedTrainer):
    """Two decoders guided by text, and their hybrid consistency on unlabelled patches.

    Source: "Language-Guided Visual Representation Learning for Medical Images", repository
    Lry777/Universal-Medical-SSL (2025); methods.md sections 2 and 2.7.
    """

    hyperparameters = LGSSLHyperparameters()
    views = ("strong",)
    supports_several_gpus = True
    supports_partial_labels = True
    pairs_batches = True

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the planned encoder with TVSF at its deepest stages and two decoders that upsample differently."""
        hp = resolve(cls.hyperparameters, plans_manager.plans, cls.__name__)
        return build_language_guided_unet(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            prompt_mode=hp.prompt_mode,
            prompt_source=hp.prompt_source,
            gate_start=hp.gate_start if hp.residual_gate else None,
            affine_norm=hp.affine_norm,
            stop_gradient=hp.stop_gradient,
            faithful_decoder=hp.faithful_decoder,
            dropout=hp.dropout,
            prediction=hp.prediction,
            tvsf_stages=hp.tvsf_stages,
        )

    def loss_terms(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch) -> dict[str, Term]:
        """Return supervised loss of both decoders, the hybrid consistency (methods.md 2.6) and ties to words (2.8)."""
        n = len(labeled.image)
        first, second, language = self.network(torch.cat([labeled.image, unlabeled.strong]), labeled_rows=n)
        both = [rows(outputs, slice(n)) for outputs in (first, second)]
        supervised = sum(0.5 * self.supervised_loss(outputs, labeled.target, labeled.known) for outputs in both)
        p1, q1 = self.probabilities(first).tensor_split([n])
        p2, q2 = self.probabilities(second).tensor_split([n])
        weight = self.hp.consistency_weight * self.ramp(self.hp.ramp_fraction)
        agree = agreement(q1, q2) if self.hp.agreement == "squared" else distill(finest(first)[n:], finest(second)[n:])
        differ = difference_agreement(p1, q1, p2, q2, detach_labeled=self.hp.detach_labeled)
        return {
            "supervised": Term(supervised),
            "agreement": Term(agree, weight * self.hp.agreement_weight, uses_unlabeled=True),
            "difference": Term(differ, weight * self.hp.difference_weight, uses_unlabeled=True),
            **self._language_terms(language, labeled),
        }

    def _language_terms(self, language: Language | None, labeled: LabeledBatch) -> dict[str, Term]:
        """Return the terms that tie image positions to words, where they have a weight."""
        if not (self.hp.class_map_weight or self.hp.alignment_weight):
            return {}
        n, terms, labels = len(labeled.image), {}, self.one_hot(labeled.target)
        if self.hp.class_map_weight:
            maps, counted = [logits[:n] for logits in language.class_logits], self.annotated(labeled.target)
            class_map = class_map_loss(maps, labels, counted, not self.label_manager.has_regions, labeled.known)
            terms["class map"] = Term(class_map, self.hp.class_map_weight)
        if self.hp.alignment_weight:
            labels = certain_labels(labels, labeled.known, not self.label_manager.has_regions)
            distance = alignment(language.image_feature[:n], language.prompt_feature, labels)
            terms["alignment"] = Term(distance, self.hp.alignment_weight)
        return terms
