"""The block of the plans that holds the classes' text and its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from lgssl_nnunet.errors import PromptError
from lgssl_nnunet.text.bank import structure_of, without_article
from lgssl_nnunet.text.encoders import EmbeddedText, PromptEmbeddings, embed_prompts
from lgssl_nnunet.text.prompts import Prompt, modality_of, phrase_of, templates


def text_block(prompts: Sequence[Prompt], embeddings: PromptEmbeddings, regions: bool = False) -> dict[str, Any]:
    """Return encoder, prompts and vectors; what was averaged is said only where something was, and regions only if so.

    Args:
        prompts: C prompts, one per output channel.
        embeddings: theirs.
        regions: whether the channels are overlapping regions.
    """
    block = {
        "encoder": embeddings.encoder,
        "prompts": embeddings.prompts,
        "embeddings": [[float(value) for value in row] for row in embeddings.embeddings],
        "sha256": embeddings.sha256,
    }
    if regions:
        block["regions"] = True
    if any(text.rewordings for prompt in prompts for text in prompt.texts):
        block["templates"] = list(templates(prompts[0].modality))
    several = {
        prompt.class_name: [text.sentence for text in texts]
        for prompt, texts in zip(prompts, embeddings.texts, strict=True)
        if len(texts) > 1
    }
    return block | {"several_texts": several} if several else block


def wordings(prompts: Sequence[Prompt], embeddings: PromptEmbeddings) -> list[list[str]]:
    """Return all that the classes are called, in lists of C: as given, as looked up, and as the bank names structures.

    Abbreviations and synonyms ("LV", "lkidney") tell the side only in the latter two. A class with fewer texts than
    another has an empty one.
    """
    names = [prompt.class_name for prompt in prompts]
    structures = [structure_of(name) or name for name in names]
    groups = [names, structures]
    for texts in zip_longest(*(prompt.texts for prompt in prompts), fillvalue=Prompt("", "")):
        phrases = [text.phrase or "" for text in texts]
        groups += [[text.sentence for text in texts], [structure_of(phrase) or phrase for phrase in phrases]]
    embedded = zip_longest(*embeddings.texts, fillvalue=EmbeddedText("", ""))
    return groups + [[text.sentence for text in texts] for texts in embedded]


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
    if not block.get("prompts"):
        raise PromptError(f"text_encoder={encoder}: these plans hold no prompts; run lgssl_plan_and_preprocess again.")
    prompts = [_prompt_of(sentence) for sentence in block["prompts"]]
    return text_block(prompts, embed_prompts(prompts, encoder), block.get("regions", False))


def _prompt_of(sentence: str) -> Prompt:
    """Return the prompt of a stored sentence, with its phrase if it has a template's form, as planning words it."""
    phrase = phrase_of(sentence)
    if phrase is None:
        return Prompt(sentence, sentence)
    bare = without_article(phrase)
    return Prompt(bare, sentence, bare, modality_of(sentence))
