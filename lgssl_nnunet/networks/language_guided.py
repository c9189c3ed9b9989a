"""The language-guided U-Net: the plans' encoder, two decoders, and text prompts fused in at the deepest stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.networks.decoders import MultiDecoderUNet, interpolating_twin
from lgssl_nnunet.networks.tvsf import TextVisionSelectionFusion
from lgssl_nnunet.networks.unet import Logits, planned_unet
from lgssl_nnunet.text.adapter import AttentionPrompts, FixedVolumePrompts, learnable_std, prompt_embeddings

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

_TIES = ("class_map_weight", "alignment_weight")
_GUIDANCE = ("tvsf_stages", "residual_gate", "gate_start", "affine_norm", "stop_gradient")
PROMPT_MODES = {
    "fixed_volume": _TIES,
    "attention": (),
    "none": ("prompt_source", "text_encoder", *_GUIDANCE, *_TIES),
}
"""By mode the hyper-parameters of LG-SSL that it leaves without effect."""
PREDICTIONS = ("first", "mean")


class Language(NamedTuple):
    """What a training step may tie to the words.

    Attributes:
        image_feature: bottleneck feature of the image before the fusion, `(B, D, X, Y, Z)` (or 2D).
        prompt_feature: F^p, `(C, D)`; `(C, N)` for the fixed volume.
        class_logits: logits `(B, C, *S_k)` of the class map of each stage with TVSF, the bottleneck first; none for the
            fixed volume.
    """

    image_feature: torch.Tensor
    prompt_feature: torch.Tensor
    class_logits: list[torch.Tensor]


class GuidedStage(nn.Module):
    """Prompts and their fusion at one stage of the encoder."""

    def __init__(self, prompts: FixedVolumePrompts | AttentionPrompts, fusion: TextVisionSelectionFusion) -> None:
        super().__init__()
        self.prompts = prompts
        self.fusion = fusion


class LanguageGuidedUNet(MultiDecoderUNet):
    """One encoder, two decoders that upsample differently, and optionally prompts fused in at the deepest stages.

    Encoder and first decoder are those of the plans' network and keep their keys (`encoder.*`, `decoder.*`), so a stock
    checkpoint's weights fit them. Called with an image alone, it predicts.

    Args:
        network: a network built from the plans, with `.encoder` and `.decoder`; its modules are taken over.
        second_decoder: reads the same skips, see `interpolating_twin`.
        stages: prompts and fusion of the bottleneck, then of the stages above it; none: no text.
        dropout: rate of channel dropout on the fused bottleneck, drawn for each decoder by itself, in training only.
        prediction: "first" predicts with the first decoder alone, "mean" with the mean of both decoders' logits.

    Source: LG-SSL (2025); methods.md 2.3, 2.7 #15-#19.
    """

    def __init__(
        self,
        network: nn.Module,
        second_decoder: UNetDecoder,
        stages: Sequence[GuidedStage] = (),
        dropout: float = 0.0,
        prediction: str = "first",
    ) -> None:
        super().__init__(network, [second_decoder], dropout)
        # The bottleneck's have keys of their own, as in checkpoints from before there were further stages.
        self.prompts = stages[0].prompts if stages else None
        self.fusion = stages[0].fusion if stages else None
        self.further_stages = nn.ModuleList(stages[1:])
        self.prediction = prediction

    def forward(
        self, x: torch.Tensor, labeled_rows: int | None = None
    ) -> Logits | tuple[Logits, Logits, Language | None]:
        """Predict, or run both decoders for a training step.

        Args:
            x: images `(B, M, X, Y, Z)` (or 2D), labelled ones first.
            labeled_rows: how many of them are labelled; the prompt feature gets no gradient from the others. None:
                prediction.

        Returns:
            Without `labeled_rows` the predicted logits `(B, C, X, Y, Z)`. With it those of the first decoder, those of
            the second, and what can be tied to the words, None without prompts. With deep supervision on, lists of
            logits instead, full resolution first.
        """
        features = self.encoder(x)
        skips, class_logits = self._guide(features, labeled_rows)
        first = self.decoder(self.perturb(skips))
        if labeled_rows is None and self.prediction == "first":
            return first
        (second_decoder,) = self.further_decoders
        second = second_decoder(self.perturb(skips))
        if labeled_rows is None:
            return _mean(first, second)
        if self.prompts is None:
            return first, second, None
        return first, second, Language(features[-1], self.prompts.prompt_feature(), class_logits)

    def _guide(
        self, features: list[torch.Tensor], labeled_rows: int | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the skips, with prompts fused into the deepest features, and the class maps' logits."""
        skips, class_logits = list(features), []
        for depth, (prompts, fusion) in enumerate(self._stages(), start=1):
            tau, logits = prompts.attend(features[-depth], labeled_rows)
            skips[-depth], _ = fusion(features[-depth], tau)
            if logits is not None:
                class_logits.append(logits)
        return skips, class_logits

    def _stages(self) -> list[tuple[nn.Module, nn.Module]]:
        if self.prompts is None:
            return []
        return [(self.prompts, self.fusion), *((stage.prompts, stage.fusion) for stage in self.further_stages)]

    @torch.no_grad()
    def selection(self, x: torch.Tensor) -> torch.Tensor:
        """Return the selection map of images, for inspection.

        Args:
            x: images `(B, M, X, Y, Z)` (or 2D).

        Returns:
            `(B, 1, x, y, z)` at the resolution of the bottleneck, values in [0, 1].

        Raises:
            ValueError: the network has no prompts.
        """
        if self.fusion is None:
            raise ValueError("A network with prompt_mode 'none' has no selection map.")
        bottleneck = self.encoder(x)[-1]
        return self.fusion(bottleneck, self.prompts(bottleneck))[1]


def build_language_guided_unet(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
    *,
    prompt_mode: str = "attention",
    prompt_source: str = "text",
    stop_gradient: bool = True,
    gate_start: float | None = 0.0,
    affine_norm: bool = True,
    dropout: float = 0.0,
    faithful_decoder: bool = False,
    prediction: str = "first",
    tvsf_stages: int = 1,
) -> LanguageGuidedUNet:
    """Build a `LanguageGuidedUNet` from plans; needs no text encoder, the embeddings are in the plans.

    The plans' network is drawn first: with the same torch seed, encoder and first decoder start like a stock network.

    Args:
        plans_manager: plans with the block `lgssl.text.embeddings` (not needed for prompt_mode "none").
        configuration_manager: the configuration's architecture and patch size.
        num_input_channels: image channels M.
        num_output_channels: output channels C (classes with background, or regions).
        enable_deep_supervision: whether both decoders return lists of logits.
        prompt_mode: "fixed_volume" (published: tied to patch positions), "attention" (any patch size) or "none".
        prompt_source: "text", or the controls "random" and "shuffled", drawn under the plans' training seed, and
            "learned" (no embedding, a learnable vector of its size).
        stop_gradient: unlabelled rows do not train the prompt feature.
        gate_start: first value of gamma in `v + gamma * (m * s)`; None for the published `m * s`.
        affine_norm: learnable scale and shift in the fusion's normalisation (published: none).
        dropout: rate on the fused bottleneck, per decoder (published: 0.5).
        faithful_decoder: the published upsampling in the second decoder.
        prediction: "first" (published: the first decoder alone) or "mean" of both.
        tvsf_stages: at how many of the deepest stages prompts are fused in (published: 1, the bottleneck).

    Raises:
        PlansError: the plans lack embeddings for the output channels, or their architecture is no U-Net.
        UsageError: unknown prompt_mode or prompt_source, or more stages than the network has.
    """
    if prompt_mode not in PROMPT_MODES:
        raise UsageError(f"prompt_mode {prompt_mode!r} is unknown; choose one of {', '.join(PROMPT_MODES)}.")
    network = planned_unet(configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision)
    second_decoder = interpolating_twin(network, faithful=faithful_decoder)
    if prompt_mode == "none":
        return LanguageGuidedUNet(network, second_decoder, dropout=dropout, prediction=prediction)
    output_channels = network.encoder.output_channels
    if not 1 <= tvsf_stages <= len(output_channels):
        raise UsageError(f"tvsf_stages={tvsf_stages}: the planned network has {len(output_channels)} stages.")
    seed = plans_manager.plans.get("lgssl", {}).get("training", {}).get("seed", 0)
    text = plans_manager.plans.get("lgssl", {}).get("text") or {}
    embeddings = _planned_embeddings(text, num_output_channels, plans_manager.plans.get("plans_name", ""))
    embeddings = prompt_embeddings(prompt_source, embeddings, seed)
    options = {"stop_gradient": stop_gradient, "std": learnable_std(prompt_source)}
    stages = []
    for depth in range(1, tvsf_stages + 1):
        channels, shape = output_channels[-depth], feature_shape(configuration_manager, depth)
        if prompt_mode == "fixed_volume":
            prompts = FixedVolumePrompts(embeddings, channels, shape, **options)
        else:
            exclusive = not text.get("regions", False)
            prompts = AttentionPrompts(embeddings, channels, len(shape), exclusive=exclusive, **options)
        fusion = TextVisionSelectionFusion(channels, len(shape), affine_norm=affine_norm, gate_start=gate_start)
        stages.append(GuidedStage(prompts, fusion))
    return LanguageGuidedUNet(network, second_decoder, stages, dropout, prediction)


def _mean(first: Logits, second: Logits) -> Logits:
    """Average logits, as nnU-Net does over folds and mirrored copies."""
    if isinstance(first, torch.Tensor):
        return (first + second) / 2
    return [_mean(*pair) for pair in zip(first, second, strict=True)]


def feature_shape(configuration_manager: ConfigurationManager, depth: int = 1) -> tuple[int, ...]:
    """Compute a stage's spatial shape: the patch divided by the product of the strides per axis down to there.

    Args:
        configuration_manager: the configuration's patch and strides.
        depth: which stage, counted from the bottleneck (1).

    Raises:
        PlansError: the patch is not a multiple of it.
    """
    patch, strides = configuration_manager.patch_size, configuration_manager.pool_op_kernel_sizes
    total = [math.prod(axis) for axis in zip(*strides[: len(strides) + 1 - depth], strict=True)]
    if any(size % stride for size, stride in zip(patch, total, strict=True)):
        raise PlansError(
            f"The plans' patch size {list(patch)} must be a multiple of the network's total stride {total}."
        )
    return tuple(size // stride for size, stride in zip(patch, total, strict=True))


def _planned_embeddings(text: Mapping[str, Any], num_output_channels: int, plans_name: str) -> torch.Tensor:
    """Read the prompt embeddings `(C, T)` from the plans' block and check that they fit the output channels."""
    rows = text.get("embeddings") or []
    if len(rows) != num_output_channels or len({len(row) for row in rows}) != 1:
        raise PlansError(
            f"The plans {plans_name} hold {len(rows)} prompt embeddings of one length for {num_output_channels} output "
            "channels; run lgssl_plan_and_preprocess for this dataset."
        )
    return torch.tensor(rows, dtype=torch.float32)
