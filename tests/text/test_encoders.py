from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from lgssl_nnunet.errors import MissingDependencyError, PromptError, UsageError
from lgssl_nnunet.text import encoders
from lgssl_nnunet.text.bank import AVERAGED_BANK, SHIPPED_BANK, EmbeddingBank, load_structures
from lgssl_nnunet.text.build_bank import bank_texts
from lgssl_nnunet.text.encoders import (
    MINILM_SHA256,
    embed_dataset,
    embed_prompts,
    embed_texts,
    load_encoder,
    mean_directions,
    missing_packages,
    offline,
)
from lgssl_nnunet.text.prompts import Prompt, build_prompts

needs_minilm = pytest.mark.skipif(bool(missing_packages()), reason="the `text` extra is not installed")
needs_transformers = pytest.mark.skipif(bool(missing_packages(["transformers"])), reason="transformers is missing")


def prompts_of(*names, channel="CT", overrides=None, ensemble=False):
    labels = {name: i for i, name in enumerate(names)}
    return build_prompts({"channel_names": {"0": channel}, "labels": labels}, overrides, ensemble=ensemble)


def sources(found):
    return [[text.source for text in texts] for texts in found.texts]


def unit(*vectors):
    mean = np.mean(vectors, axis=0)
    return mean / np.linalg.norm(mean)


@pytest.fixture
def no_text_extra(monkeypatch):
    monkeypatch.setattr(encoders, "missing_packages", lambda packages=encoders.TEXT_PACKAGES: list(packages))


def test_bank_gives_unit_vectors_and_says_what_was_used(no_text_extra):
    found = embed_prompts(prompts_of("background", "liver", "postcava"))
    assert found.encoder == "bank (all-MiniLM-L6-v2)"
    assert found.prompts[2] == "A computerized tomography of an inferior vena cava"
    assert sources(found) == [["bank, by sentence"], ["bank, by sentence"], ["bank, by synonym"]]
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


def test_vectors_of_a_class_with_one_text_are_the_banks_bit_for_bit():
    bank = EmbeddingBank.load()
    found = embed_prompts(prompts_of("liver", "spleen"))
    rows = [bank.prompts.index(sentence) for sentence in found.prompts]
    np.testing.assert_array_equal(found.embeddings, bank.embeddings[rows])


@pytest.mark.parametrize(
    "names", [("inferior vena cava", "postcava", "IVC"), ("oesophagus", "esophagus"), ("liver tumour", "liver tumor")]
)
@pytest.mark.parametrize("ensemble", [False, True])
def test_synonyms_have_one_embedding(names, ensemble):
    found = embed_prompts(prompts_of(*names, ensemble=ensemble))
    assert len(set(found.prompts)) == 1
    np.testing.assert_array_equal(found.embeddings, found.embeddings[[0] * len(names)])


def test_several_texts_of_a_class_are_averaged_and_named(no_text_extra):
    alone = embed_prompts(prompts_of("liver", "spleen", "pancreas"))
    found = embed_prompts(prompts_of("liver", "pancreas", overrides={"liver": ["hepar", "lien"]}))
    assert sources(found) == [["bank, by synonym", "bank, by synonym"], ["bank, by sentence"]]
    assert [text.sentence for text in found.texts[0]] == alone.prompts[:2]
    assert found.prompts == [alone.prompts[0], alone.prompts[2]]
    np.testing.assert_allclose(found.embeddings[0], unit(*alone.embeddings[:2]), atol=1e-6)
    np.testing.assert_array_equal(found.embeddings[1], alone.embeddings[2])


def test_ensemble_takes_phrases_from_the_averaged_bank_and_sentences_from_the_other(no_text_extra):
    overrides = {"spleen": "A computerized tomography of a spleen."}
    found = embed_prompts(prompts_of("liver", "spleen", overrides=overrides, ensemble=True))
    for row, path in enumerate((AVERAGED_BANK, SHIPPED_BANK)):
        bank = EmbeddingBank.load(path)
        np.testing.assert_array_equal(found.embeddings[row], bank.embeddings[bank.prompts.index(found.prompts[row])])
    assert found.encoder == "bank (all-MiniLM-L6-v2)"


def test_texts_of_opposite_meaning_are_refused(tmp_path):
    path = tmp_path / "mine.npz"
    EmbeddingBank(("liver", "spleen"), np.array([[1.0, 0], [-1, 0]]), "MyBERT", "abc").save(path)
    with pytest.raises(PromptError, match="cancel each other: keep one of the texts"):
        embed_prompts(prompts_of("liver", overrides={"liver": ["liver", "spleen"]}), f"file:{path}")


def test_mean_directions_are_those_of_an_obvious_loop():
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = mean_directions(vectors, [3, 1, 2])
    for row, group in enumerate((vectors[:3], vectors[3:4], vectors[4:])):
        np.testing.assert_allclose(found[row], unit(*group), atol=1e-6)
    np.testing.assert_array_equal(found[1], vectors[3])


def test_encoder_averages_the_wordings_of_a_text_before_the_texts_of_a_class():
    words = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0]}
    encoder = encoders.TextEncoder("toy", "", words.__getitem__)
    texts = [Prompt("x", "a", "a", rewordings=("b",)), Prompt("x", "c")]
    np.testing.assert_allclose(embed_texts(texts, encoder), [unit(words["a"], words["b"]), words["c"]], atol=1e-6)


def test_dataset_is_embedded_with_its_prompt_file(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"b": ["liver", "pancreas"]}), encoding="utf-8")
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2}, "prompts": {"a": "lien"}}
    prompts, found = embed_dataset(description, path, ensemble=True)
    assert [len(prompt.texts) for prompt in prompts] == [1, 1, 2]
    assert all(text.rewordings for prompt in prompts for text in prompt.texts)
    assert found.prompts[1:] == ["A magnetic resonance image of the spleen", "A magnetic resonance image of the liver"]


def test_bank_file_cannot_average_templates(tmp_path):
    path = tmp_path / "mine.npz"
    EmbeddingBank(("liver",), np.eye(1, 5), "MyBERT", "abc").save(path)
    with pytest.raises(UsageError, match=r"--ensemble_prompts needs .*mine\.npz holds one vector per prompt: leave"):
        embed_prompts(prompts_of("liver", ensemble=True), f"file:{path}")


@pytest.mark.parametrize(("width", "sha256"), [(5, MINILM_SHA256), (384, "0" * 64)])
@pytest.mark.parametrize("ensemble", [False, True])
def test_bank_of_another_width_or_encoder_is_not_mixed_with_minilm(tmp_path, monkeypatch, width, sha256, ensemble):
    path = tmp_path / "other.npz"
    EmbeddingBank(("liver",), np.eye(1, width), "Other", sha256).save(path)
    monkeypatch.setattr(encoders, "SHIPPED_BANK", path)
    minilm = encoders.TextEncoder("minilm", MINILM_SHA256, lambda sentence: np.ones(384))
    monkeypatch.setattr(encoders, "_load_minilm", lambda: minilm)
    monkeypatch.setattr(encoders, "missing_packages", lambda: [])
    name = "minilm_averaged.npz" if ensemble else "minilm"
    with pytest.raises(
        PromptError, match=rf"other\.npz \(width {width}.* of {name} \(width 384.*--text_encoder minilm"
    ):
        embed_prompts(prompts_of("liver", "Fnord", ensemble=ensemble))


@needs_minilm
def test_weights_with_a_wrong_checksum_are_refused(monkeypatch):
    monkeypatch.setattr(encoders, "MINILM_SHA256", "0" * 64)
    with pytest.raises(PromptError, match=r"not all-MiniLM-L6-v2 \(SHA-256 53aa.*install the package again.*\[text\]"):
        load_encoder("minilm")


def test_text_longer_than_the_encoder_reads_is_warned_of(tmp_path, caplog):
    write_tiny_clip(tmp_path / "TinyCLIP")
    long = "The organ " + "that lies below the diaphragm " * 20 + "."
    with caplog.at_level(logging.WARNING):
        embed_prompts(prompts_of("liver", "spleen", overrides={"spleen": long}), f"local-dir:{tmp_path / 'TinyCLIP'}")
    (record,) = [record for record in caplog.records if "reads only the beginning" in record.message]
    assert "'The organ that lies" in record.message


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
def test_averaged_bank_built_again_equals_the_shipped_one():
    bank = EmbeddingBank.load(AVERAGED_BANK)
    texts = bank_texts(load_structures(), averaged=True)
    rows = list(range(0, len(texts), 101))
    again = embed_texts([texts[row] for row in rows], load_encoder("minilm"))
    assert (again * bank.embeddings[rows]).sum(axis=1).min() > 0.99999


@needs_minilm
def test_minilm_averages_the_templates_of_what_the_bank_lacks():
    prompts = prompts_of("liver", "Fnord", ensemble=True)
    found, alone = embed_prompts(prompts), embed_prompts(prompts, "minilm")
    assert sources(found) == [["bank, by sentence"], ["minilm"]]
    np.testing.assert_array_equal(found.embeddings[1], alone.embeddings[1])
    assert float(found.embeddings[0] @ alone.embeddings[0]) > 0.99999
    one = embed_prompts(prompts_of("Fnord"), "minilm")
    assert float(one.embeddings[0] @ alone.embeddings[1]) < 0.99


@needs_minilm
def test_minilm_embeds_what_the_bank_lacks_and_leaves_the_rest_to_it(caplog):
    prompts = prompts_of("background", "Fnord")
    with caplog.at_level(logging.WARNING):
        found = embed_prompts(prompts)
    assert "no prompt for class 'Fnord'" in caplog.text
    assert found.encoder == "bank and minilm (all-MiniLM-L6-v2)"
    assert sources(found) == [["bank, by sentence"], ["minilm"]]
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


def write_tiny_text_model(folder, kind, **changes):
    """Write a text model with random weights, of one of the classes of transformers."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "liver", "spleen", "of", "tomography", "computerized"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(words), **changes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


TINY_BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}


@needs_transformers
def test_text_model_in_a_local_folder_is_used(tmp_path):
    folder = tmp_path / "TinyBERT"
    write_tiny_text_model(folder, "Bert", **TINY_BERT)
    found = embed_prompts(prompts_of("liver", "spleen"), f"hf:{folder}")
    assert found.encoder == "hf:TinyBERT"
    assert found.embeddings.shape == (2, 8)
    assert len(found.sha256) == 64
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(PromptError, match="cannot be loaded"):
        embed_prompts(prompts_of("liver"), f"hf:{folder}")


@needs_transformers
def test_text_model_that_names_its_width_otherwise_is_used(tmp_path):
    layers = {"num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    write_tiny_text_model(tmp_path / "TinyMT5", "MT5", d_model=8, d_kv=4, d_ff=8, **layers)
    assert embed_prompts(prompts_of("liver", "spleen"), f"hf:{tmp_path / 'TinyMT5'}").embeddings.shape == (2, 8)


@needs_transformers
def test_text_model_of_an_architecture_that_open_clip_does_not_know_is_refused_with_those_it_knows(tmp_path):
    write_tiny_text_model(tmp_path / "Tiny", "DistilBert", dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    with pytest.raises(PromptError, match=r"Tiny is a distilbert, .*bert, .*xlm-roberta") as refused:
        load_encoder(f"hf:{tmp_path / 'Tiny'}")
    assert "download" not in str(refused.value)


def test_bank_texts_hold_every_modality_and_on_request_every_template():
    plain, averaged = bank_texts({"liver": []}), bank_texts({"liver": []}, averaged=True)
    assert [text.sentence for text in plain] == [
        "A computerized tomography of a liver",
        "A magnetic resonance image of the liver",
        "A medical image of the liver",
    ]
    assert [text.sentence for text in averaged] == [text.sentence for text in plain]
    assert [len(text.rewordings) for text in plain + averaged] == [0, 0, 0, 4, 4, 4]


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


def test_a_folder_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    EmbeddingBank(("liver",), np.eye(1, 3), "x", "y").save(tmp_path / "bank.npz")
    assert embed_prompts(prompts_of("liver"), "file:~/bank.npz").encoder == "file:bank.npz (x)"
    write_tiny_clip(tmp_path / "TinyCLIP")
    assert load_encoder("local-dir:~/TinyCLIP").name == "local-dir:TinyCLIP"


@needs_transformers
def test_a_text_model_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tiny_text_model(tmp_path / "TinyBERT", "Bert", **TINY_BERT)
    assert load_encoder("hf:~/TinyBERT").name == "hf:TinyBERT"


def test_a_weights_file_in_the_home_folder_is_found(monkeypatch, tmp_path):
    import torch

    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": TINY_CLIP})
    torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), tmp_path / "weights.pt")
    assert load_encoder("tiny/~/weights.pt").name == "tiny/weights.pt"
