from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from lgssl_nnunet.errors import MissingDependencyError, PromptError
from lgssl_nnunet.text import encoders
from lgssl_nnunet.text.bank import EmbeddingBank
from lgssl_nnunet.text.build_bank import bank_sentences
from lgssl_nnunet.text.encoders import MINILM_SHA256, embed_prompts, load_encoder, missing_packages, offline
from lgssl_nnunet.text.prompts import build_prompts

needs_minilm = pytest.mark.skipif(bool(missing_packages()), reason="the `text` extra is not installed")
needs_transformers = pytest.mark.skipif(bool(missing_packages(["transformers"])), reason="transformers is missing")


def prompts_of(*names, channel="CT"):
    return build_prompts({"channel_names": {"0": channel}, "labels": {name: i for i, name in enumerate(names)}})


@pytest.fixture
def no_text_extra(monkeypatch):
    monkeypatch.setattr(encoders, "missing_packages", lambda packages=encoders.TEXT_PACKAGES: list(packages))


def test_bank_gives_unit_vectors_and_says_what_was_used(no_text_extra):
    found = embed_prompts(prompts_of("background", "liver", "postcava"))
    assert found.encoder == "bank (all-MiniLM-L6-v2)"
    assert found.prompts[2] == "A computerized tomography of an inferior vena cava"
    assert found.sources == ["bank, by sentence", "bank, by sentence", "bank, by synonym"]
    assert found.sha256 == MINILM_SHA256
    assert found.embeddings.shape == (3, 384)
    assert found.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-6)


def test_bank_loads_neither_torch_nor_an_encoder():
    code = (
        "import sys; from lgssl_nnunet.text.prompts import build_prompts;"
        "from lgssl_nnunet.text.encoders import embed_prompts;"
        "embed_prompts(build_prompts({'labels': {'liver': 0}}));"
        "sys.exit(bool({'torch', 'transformers', 'open_clip'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_classes_without_a_prompt_are_refused_at_once_with_the_ways_out(no_text_extra):
    with pytest.raises(PromptError) as error:
        embed_prompts(prompts_of("background", "Fnord", "lliver", "liver"))
    message = str(error.value)
    assert "'Fnord'" in message
    assert "'lliver' ('A computerized tomography of a lliver'; near: 'liver')" in message
    assert "'background'" not in message
    for way_out in ("--prompts", ".[text]", "--text_encoder", "transformers"):
        assert way_out in message


def test_no_class_at_all_is_refused():
    with pytest.raises(PromptError, match="no class"):
        embed_prompts([])


def test_classes_with_one_embedding_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        embed_prompts(prompts_of("postcava", "IVC"))
    assert "Classes postcava and IVC have the same embedding" in caplog.text


def test_bank_file_is_used_and_named(tmp_path):
    path = tmp_path / "mine.npz"
    EmbeddingBank(("liver", "spleen"), np.eye(2, 5), "MyBERT", "abc").save(path)
    found = embed_prompts(prompts_of("liver", "lien"), f"file:{path}")
    assert (found.encoder, found.sha256) == ("file:mine.npz (MyBERT)", "abc")
    np.testing.assert_allclose(found.embeddings, np.eye(2, 5))
    with pytest.raises(PromptError, match=r"mine\.npz has no prompt for class 'pancreas'"):
        embed_prompts(prompts_of("liver", "pancreas"), f"file:{path}")


def test_minilm_without_the_extra_is_refused(no_text_extra):
    with pytest.raises(MissingDependencyError, match=r"transformers.*\.\[text\]"):
        embed_prompts(prompts_of("liver"), "minilm")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(PromptError, match="holds no text model"):
        embed_prompts(prompts_of("liver"), f"hf:{tmp_path}")


def test_offline_mode_is_undone(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    with offline():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["TRANSFORMERS_OFFLINE"] == "0"


def test_vector_that_is_not_finite_is_refused():
    broken = encoders.TextEncoder("broken", "", lambda sentence: [np.nan, 1.0])
    with pytest.raises(PromptError, match="broken"):
        broken.encode(["a"])


@needs_minilm
def test_bank_built_again_equals_the_shipped_one():
    bank = EmbeddingBank.load()
    rows = list(range(0, len(bank.prompts), 29))
    again = load_encoder("minilm").encode([bank.prompts[row] for row in rows])
    assert (again * bank.embeddings[rows]).sum(axis=1).min() > 0.99999


@needs_minilm
def test_minilm_embeds_what_the_bank_lacks_and_leaves_the_rest_to_it(caplog):
    prompts = prompts_of("background", "Fnord")
    with caplog.at_level(logging.WARNING):
        found = embed_prompts(prompts)
    assert "no prompt for class 'Fnord'" in caplog.text
    assert found.encoder == "bank and minilm (all-MiniLM-L6-v2)"
    assert found.sources == ["bank, by sentence", "minilm"]
    alone = embed_prompts(prompts, "minilm")
    assert alone.encoder == "minilm (all-MiniLM-L6-v2)"
    np.testing.assert_array_equal(found.embeddings[1], alone.embeddings[1])
    assert float(found.embeddings[0] @ alone.embeddings[0]) > 0.99999


@needs_minilm
def test_vector_does_not_depend_on_the_other_sentences():
    encoder = load_encoder("minilm")
    short = "A medical image of the liver"
    both = encoder.encode([short, "A medical image of the portal vein and splenic vein"])
    np.testing.assert_array_equal(encoder.encode([short])[0], both[0])


@needs_transformers
def test_text_model_in_a_local_folder_is_used(tmp_path):
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "liver", "spleen", "of", "tomography", "computerized"]
    folder = tmp_path / "TinyBERT"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    found = embed_prompts(prompts_of("liver", "spleen"), f"hf:{folder}")
    assert found.encoder == "hf:TinyBERT"
    assert found.embeddings.shape == (2, 8)
    assert len(found.sha256) == 64
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(PromptError, match="cannot be loaded"):
        embed_prompts(prompts_of("liver"), f"hf:{folder}")


def test_bank_sentences_hold_every_template():
    assert bank_sentences({"liver": []}) == [
        "A computerized tomography of a liver",
        "A magnetic resonance image of the liver",
        "A medical image of the liver",
    ]


TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_tiny_clip(folder):
    open_clip = pytest.importorskip("open_clip")
    torch = pytest.importorskip("torch")
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}), encoding="utf-8")
    model = open_clip.CLIP(**TINY_CLIP)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model.eval()


def test_open_clip_model_in_a_local_folder_is_used(tmp_path):
    import open_clip

    folder = tmp_path / "TinyCLIP"
    model = write_tiny_clip(folder)
    found = embed_prompts(prompts_of("liver", "spleen"), f"local-dir:{folder}")
    assert (found.encoder, found.embeddings.shape) == ("local-dir:TinyCLIP", (2, 8))
    expected = model.encode_text(open_clip.tokenize(found.prompts), normalize=True).detach().numpy()
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-5)
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(PromptError, match="holds no open_clip model"):
        embed_prompts(prompts_of("liver"), f"local-dir:{folder}")


def test_open_clip_model_in_the_hub_cache_is_used_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--lab--tiny"
    write_tiny_clip(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd", encoding="utf-8")
    found = embed_prompts(prompts_of("liver"), "hf-hub:lab/tiny")
    assert (found.encoder, found.embeddings.shape, len(found.sha256)) == ("hf-hub:lab/tiny", (1, 8), 64)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("biomedclip", r"hf download microsoft/BiomedCLIP.*models--microsoft--BiomedCLIP"),
        ("hf-hub:lab/model", r"hf download lab/model.*models--lab--model"),
        ("ViT-B-32/openai", r"not on this machine.*download"),
        ("ViT-B-32/unheard", r"neither a file nor a tag of ViT-B-32.*openai"),
        ("ViT-B32/openai", r"Unknown text encoder 'ViT-B32/openai'.*near: ViT-B-32"),
        ("bnak", r"Unknown text encoder 'bnak': use bank, minilm"),
    ],
)
def test_encoder_that_is_not_on_this_machine_is_refused_with_what_to_do(monkeypatch, tmp_path, encoder, message):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PromptError, match=message):
        embed_prompts(prompts_of("liver"), encoder)
