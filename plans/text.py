"""The block of the plans that holds the classes' text and its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lgssl_nnunet.errors import PromptError
from lgssl_nnunet.text.encoders import PromptEmbeddings, embed_prompts
from lgssl_nnunet.text.prompts import Prompt, templates


def text_block(prompts: Sequence[Prompt], embeddings: PromptEmbeddings) -> dict[str, Any]:
    """Return encoder, prompts and vectors; what was averaged is said only where something was.

    Args:
        prompts: C prompts, one per output channel.
        embeddings: theirs.
    """
    block = {
        "encoder": embeddings.encoder,
        "prompts": embeddings.prompts,
        "embeddings": [[float(value) for value in row] for row in embeddings.embeddings],
        "sha256": embeddings.sha256,
    }
    if any(text.rewordings for prompt in prompts for text in prompt.texts):
        block["templates"] = list(templates(prompts[0].modality))
    several = {
        prompt.class_name: [text.sentence for text in texts]
        for prompt, texts in zip(prompts, embeddings.texts, strict=True)
        if len(texts) > 1
    }
    return block | {"several_texts": several} if several else block


def embed_again(block: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """Return a text block with the same prompts and the vectors of another encoder.

    Args:
        block: of the plans.
        encoder: as `lgssl_plan_and_preprocess --text_encoder` takes it.

    Raises:
        PromptError: the vectors are averages, whose wordings the plans do not hold, or the encoder cannot be used.
        UsageError: as `embed_prompts`.
        MissingDependencyError: the encoder needs a package that is not installed.
    """
    if "templates" in block or "several_texts" in block:
        raise PromptError(
            f"text_encoder={encoder}: these plans average several texts per class; plan with --text_encoder {encoder}."
        )
    prompts = [Prompt(sentence, sentence) for sentence in block["prompts"]]
    return text_block(prompts, embed_prompts(prompts, encoder))
