from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest

from lgssl_nnunet.errors import PromptError
from lgssl_nnunet.files import sha256
from lgssl_nnunet.text.bank import (
    AVERAGED_BANK,
    SHIPPED_BANK,
    EmbeddingBank,
    index_structures,
    load_structures,
    normalise,
    structure_names,
)
from lgssl_nnunet.text.build_bank import bank_texts
from lgssl_nnunet.text.encoders import MINILM_NAME, MINILM_SHA256
from lgssl_nnunet.text.prompts import MODALITIES, Prompt, build_prompts

BTCV = (
    "spleen,right kidney,left kidney,gallbladder,esophagus,liver,stomach,aorta,inferior vena cava,"
    "portal vein and splenic vein,pancreas,right adrenal gland,left adrenal gland"
)
LITS = "liver,liver tumor,Liver_Tumour"
HEART = "LA,left_atrium,Left Atrial,RV,MYO,heart_atrium_left,pulmonary_vein"
BRAIN = "edema,enhancing tumour,necrotic core,whole tumor,tumor core,stroke lesion,MS lesion,hippocampus head"
HIPPOCAMPUS = "anterior part of the hippocampus,posterior part of the hippocampus,hippocampus,hippocampus body"
PELVIS = "peripheral zone,transition zone,PZ,TZ,prostate,uterus,femoral_head_left,sacrum"
TOTAL = (
    "kidney_left,lung_upper_lobe_left,lung_middle_lobe_right,vertebrae_L5,vertebrae_C1,gluteus_maximus_right,"
    "iliac_artery_left,autochthon_left,iliopsoas_right,costal_cartilages,hip_left,small_bowel,urinary_bladder,"
    "portal_vein_and_splenic_vein,brachiocephalic_vein_left,common_carotid_artery_right,scapula_left,clavicula_right"
)
NAMES = ",".join([BTCV, LITS, HEART, BRAIN, HIPPOCAMPUS, PELVIS, TOTAL, "postcava,kidney tumor,pancreas,background"])


@pytest.fixture(scope="module")
def bank():
    return EmbeddingBank.load()


def prompt_of(name, channel="CT", **overrides):
    return build_prompts({"channel_names": {"0": channel}, "labels": {name: 0}}, overrides or None)[0]


def tiny_bank(**changes):
    content = {"prompts": ("liver", "A scan of a spleen."), "embeddings": np.eye(2, 3), "encoder": "x", "sha256": "y"}
    return EmbeddingBank(**{**content, **changes})


@pytest.mark.parametrize("path", [SHIPPED_BANK, AVERAGED_BANK])
def test_bank_loads_without_pickles_and_is_small(path):
    with np.load(path, allow_pickle=False) as content:
        assert set(content.files) == {"prompts", "embeddings", "encoder", "sha256"}
        assert content["embeddings"].dtype == np.float16
    assert path.stat().st_size < 500 * 1024


def test_shipped_vectors_are_those_that_published_plans_hold():
    assert sha256(SHIPPED_BANK) == "624991224044eecdf85fdf9e9b45f99a1c26dbf3dc1ec5e566e87e208615b2e1"


def test_averaged_bank_answers_the_same_prompts_in_other_vectors_of_the_same_encoder(bank):
    averaged = EmbeddingBank.load(AVERAGED_BANK)
    assert (averaged.prompts, averaged.encoder, averaged.sha256) == (bank.prompts, bank.encoder, bank.sha256)
    cosines = (averaged.embeddings * bank.embeddings).sum(axis=1)
    assert cosines.min() > 0.75
    assert cosines.max() < 0.99


def test_bank_records_the_encoder_and_its_checksum(bank):
    assert (bank.encoder, bank.sha256) == (MINILM_NAME, MINILM_SHA256)


def test_embeddings_are_finite_unit_vectors(bank):
    assert bank.embeddings.shape == (len(bank.prompts), 384)
    assert bank.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(bank.embeddings, axis=1), 1, atol=1e-6)


def test_bank_holds_at_least_120_structures_in_every_modality(bank):
    structures = load_structures()
    assert len(structures) >= 120
    assert list(bank.prompts) == [text.sentence for text in bank_texts(structures)]
    assert len(bank.prompts) == len(structures) * len(MODALITIES)


def test_no_two_sentences_share_a_vector_or_a_spelling(bank):
    assert len({normalise(prompt) for prompt in bank.prompts}) == len(bank.prompts)
    similarity = bank.embeddings @ bank.embeddings.T - 2 * np.eye(len(bank.prompts))
    assert similarity.max() < 0.998


def test_the_two_parts_of_the_hippocampus_differ(bank):
    parts = [bank.lookup(prompt_of(f"{side} part of the hippocampus", "MRI")) for side in ("anterior", "posterior")]
    assert 0.5 < float(parts[0].embedding @ parts[1].embedding) < 0.98


@pytest.mark.parametrize("channel", ["CT", "MRI", "PET"])
@pytest.mark.parametrize("name", sorted(set(NAMES.split(","))))
def test_common_class_names_are_found_in_the_sentence_of_their_modality(bank, name, channel):
    entry = bank.lookup(prompt_of(name, channel))
    opening = {"CT": "A computerized", "MRI": "A magnetic", "PET": "A medical"}[channel]
    assert entry is not None
    assert entry.sentence.startswith(opening)


@pytest.mark.parametrize(
    ("name", "sentence", "matched"),
    [
        ("Liver", "A computerized tomography of a liver", "sentence"),
        ("LEFT-KIDNEY", "A computerized tomography of a left kidney", "sentence"),
        ("the liver", "A computerized tomography of a liver", "class name"),
        ("kidney_left", "A computerized tomography of a left kidney", "synonym"),
        ("postcava", "A computerized tomography of an inferior vena cava", "synonym"),
    ],
)
def test_lookup_says_what_it_found_and_how(bank, name, sentence, matched):
    entry = bank.lookup(prompt_of(name))
    assert (entry.sentence, entry.matched) == (sentence, matched)


def test_sentence_of_another_modality_is_found_word_by_word(bank):
    sentence = "A magnetic resonance image of the liver."
    assert bank.lookup(Prompt("anything", sentence)).sentence == sentence.rstrip(".")


def test_whole_sentence_that_is_not_in_the_bank_is_not_replaced_by_the_class(bank):
    assert bank.lookup(prompt_of("liver", liver="A liver full of metastases.")) is None


def test_phrase_of_the_user_is_looked_up_instead_of_the_class(bank):
    assert bank.lookup(prompt_of("LA", LA="pancreas")).sentence.endswith("a pancreas")
    assert bank.lookup(prompt_of("liver", liver="some unheard organ")) is None


def test_every_name_stands_for_one_structure():
    structures = load_structures()
    names = structure_names()
    assert all(names[normalise(name)] == name for name in structures)
    with pytest.raises(PromptError, match="'X' stands for 'a' and for 'b'"):
        index_structures({"a": ["x"], "b": ["X"]})


def test_sided_names_are_known_with_the_side_at_the_end():
    assert index_structures({"left kidney": []}) == {"left kidney": "left kidney", "kidney left": "left kidney"}


def test_saved_bank_loads_the_same(tmp_path):
    tiny_bank().save(tmp_path / "bank.npz", dtype=np.float32)
    loaded = EmbeddingBank.load(tmp_path / "bank.npz")
    assert (loaded.prompts, loaded.encoder, loaded.sha256) == (tiny_bank().prompts, "x", "y")
    np.testing.assert_array_equal(loaded.embeddings, np.eye(2, 3))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        tiny_bank().save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_half_precision_keeps_the_direction(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 384))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tiny_bank(prompts=tuple(map(str, range(50))), embeddings=vectors).save(tmp_path / "bank.npz")
    loaded = EmbeddingBank.load(tmp_path / "bank.npz").embeddings
    assert (loaded * vectors).sum(axis=1).min() > 0.999999


def test_bare_phrases_of_a_bank_are_found(tmp_path):
    entry = tiny_bank().lookup(prompt_of("Liver"))
    assert (entry.sentence, entry.matched) == ("liver", "class name")


def write_arrays(path, **changes):
    arrays = {"prompts": np.array(["a"]), "embeddings": np.ones((1, 2)), "encoder": np.array("x"), **changes}
    arrays.setdefault("sha256", np.array("y"))
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": None}, "lacks the arrays sha256"),
        ({"prompts": np.array(["a", "b"])}, "2 prompts and 1 embeddings"),
        ({"prompts": np.array([{}], dtype=object)}, "cannot be read"),
        ({"prompts": np.array([1.0])}, "must hold"),
        ({"embeddings": np.ones(2)}, "must hold"),
        ({"embeddings": np.zeros((1, 2))}, "not finite or are all zero"),
        ({"embeddings": np.full((1, 2), np.nan)}, "not finite or are all zero"),
    ],
)
def test_damaged_bank_is_refused_by_name(tmp_path, changes, message):
    path = tmp_path / "bank.npz"
    write_arrays(path, **changes)
    with pytest.raises(PromptError, match=rf"{re.escape(str(path))}.*{message}"):
        EmbeddingBank.load(path)


def test_missing_or_truncated_bank_is_refused(tmp_path):
    with pytest.raises(PromptError, match="does not exist"):
        EmbeddingBank.load(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(SHIPPED_BANK.read_bytes()[:5000])
    with pytest.raises(PromptError, match="cannot be read"):
        EmbeddingBank.load(tmp_path / "cut.npz")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": np.array(["a", "b"])}, "must hold `encoder` and `sha256` as single texts"),
        ({"sha256": np.array(3.0)}, "must hold `encoder` and `sha256` as single texts"),
        ({"more": np.zeros(2**28, np.float32)}, "unpacks to 1 GB, which no bank has"),
    ],
)
def test_a_bank_with_other_arrays_is_refused(change, words, tmp_path):
    arrays = {"prompts": np.array(["liver"]), "embeddings": np.ones((1, 3)), "encoder": "x", "sha256": "y"}
    np.savez_compressed(tmp_path / "bank.npz", **{**arrays, **change})
    with pytest.raises(PromptError, match=words):
        EmbeddingBank.load(tmp_path / "bank.npz")


def test_a_member_that_is_no_array_is_refused(tmp_path):
    np.savez(tmp_path / "bank.npz", prompts=np.array(["liver"]), encoder="x", sha256="y")
    with zipfile.ZipFile(tmp_path / "bank.npz", "a") as archive:
        archive.writestr("embeddings.npy", b"no array")
    with pytest.raises(PromptError, match="embeddings is no array"):
        EmbeddingBank.load(tmp_path / "bank.npz")


def test_two_vectors_of_one_prompt_are_refused_and_equal_ones_are_not(tmp_path):
    path = tmp_path / "bank.npz"
    twice = {"prompts": ("Left_Atrium", "spleen", "left atrium."), "embeddings": np.eye(3)}
    tiny_bank(**twice).save(path)
    with pytest.raises(PromptError, match=rf"{re.escape(str(path))}.*'Left_Atrium'.*'left atrium\.'"):
        EmbeddingBank.load(path)
    tiny_bank(**twice | {"embeddings": np.eye(3)[[0, 1, 0]]}).save(path)
    assert len(EmbeddingBank.load(path).prompts) == 3
