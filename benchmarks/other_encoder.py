"""Embed the prompts of a dataset with WordLlama: a bank of another encoder, for the ablation of LGSSLTrainer.

    pip download --no-deps wordllama==0.4.0.post1
    python benchmarks/other_encoder.py nnUNet_raw/Dataset510_Hippocampus wordllama-*.whl wordllama.npz
    lgssl_benchmark -d 510 --trainers LGSSLTrainer:text_encoder=file:wordllama.npz ...

WordLlama is the token table of language models brought to 256 numbers; a sentence is the mean of its tokens, so word
order and context count for nothing. It is taken because its package holds its weights, and because it has nothing in
common with the shipped bank's all-MiniLM-L6-v2. Weights and tokenizer are read out of the downloaded archive; its code
is not run. Needs the packages `tokenizers` and `safetensors` (extra `text`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load
from tokenizers import Tokenizer

from lgssl_nnunet.text.bank import EmbeddingBank
from lgssl_nnunet.text.encoders import TextEncoder, embed_texts
from lgssl_nnunet.text.prompts import build_prompts

WEIGHTS = "wordllama/weights/l2_supercat_256.safetensors"
TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"


def load_wordllama(wheel: Path) -> TextEncoder:
    with zipfile.ZipFile(wheel) as archive:
        weights, tokenizer = archive.read(WEIGHTS), Tokenizer.from_str(archive.read(TOKENIZER).decode())
    table = load(weights)["embedding.weight"].astype(np.float32)
    return TextEncoder(
        "WordLlama l2_supercat_256",
        hashlib.sha256(weights).hexdigest(),
        lambda sentence: table[tokenizer.encode(sentence, add_special_tokens=False).ids].mean(axis=0),
    )


def write_bank(dataset_json: Path, wheel: Path, output: Path) -> None:
    prompts = build_prompts(json.loads(dataset_json.read_text()))
    texts = [text for prompt in prompts for text in prompt.texts]
    encoder = load_wordllama(wheel)
    sentences = tuple(text.sentence for text in texts)
    EmbeddingBank(sentences, embed_texts(texts, encoder), encoder.name, encoder.sha256).save(output, np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Embed a dataset's prompts with WordLlama.")
    parser.add_argument("dataset", type=Path, help="folder of the raw dataset")
    parser.add_argument("wheel", type=Path, help="the downloaded wordllama package")
    parser.add_argument("output", type=Path, help="bank to write, .npz")
    arguments = parser.parse_args()
    write_bank(arguments.dataset / "dataset.json", arguments.wheel, arguments.output)
