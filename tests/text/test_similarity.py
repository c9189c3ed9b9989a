from __future__ import annotations

import numpy as np
import pytest

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.text.bank import AVERAGED_BANK, SHIPPED_BANK, EmbeddingBank, load_structures
from lgssl_nnunet.text.prompts import MODALITIES, phrase_prompt
from lgssl_nnunet.text.similarity import SAME, SIMILAR, cosine_matrix, similar_pairs


def cosine(bank, modality, first, second):
    vectors = [bank.lookup(phrase_prompt(name, name, modality)).embedding for name in (first, second)]
    return cosine_matrix(np.stack(vectors))[0, 1]


def test_cosines_are_those_of_an_obvious_loop():
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    found = cosine_matrix(vectors)
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            assert found[i, j] == pytest.approx(float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)), abs=1e-6)
    np.testing.assert_array_equal(np.diag(found), 1)
    np.testing.assert_array_equal(found, found.T)


def test_cosines_of_equal_vectors_of_any_length_are_same_and_never_above_one():
    vector = np.random.default_rng(1).normal(size=384).astype(np.float32)
    cosines = cosine_matrix(np.stack([vector, 3 * vector, -vector]))
    assert SAME < cosines[0, 1] <= 1
    assert cosines[0, 2] >= -1


def test_pairs_above_the_threshold_are_named_once_most_similar_first():
    cosines = np.array([[1, 0.95, 0.5], [0.95, 1, 0.97], [0.5, 0.97, 1]])
    pairs = similar_pairs(["a", "b", "c"], cosines, 0.94)
    assert [str(pair) for pair in pairs] == ["b and c (0.970)", "a and b (0.950)"]
    assert [(pair.first, pair.second) for pair in similar_pairs(["a", "b", "c"], cosines, 0.95)] == [("b", "c")]
    assert similar_pairs(["a"], np.ones((1, 1)), -1) == []


@pytest.mark.parametrize("threshold", [1.5, -2, float("nan")])
def test_threshold_that_is_no_cosine_is_refused(threshold):
    with pytest.raises(UsageError, match=r"--threshold .*give a cosine from -1 to 1"):
        similar_pairs(["a"], np.ones((1, 1)), threshold)


@pytest.mark.parametrize("path", [SHIPPED_BANK, AVERAGED_BANK])
@pytest.mark.parametrize("modality", MODALITIES)
def test_default_threshold_lies_between_sides_and_other_close_classes(path, modality):
    bank, names = EmbeddingBank.load(path), load_structures()
    sided = [(name, name.replace("left", "right")) for name in names if "left" in name.split()]
    sided = [pair for pair in sided if pair[1] in names]
    assert len(sided) > 20
    assert min(cosine(bank, modality, *pair) for pair in sided) > SIMILAR
    assert cosine(bank, modality, "liver", "liver tumour") < SIMILAR


def test_parts_of_the_hippocampus_in_mri_are_told_apart():
    parts = [f"{side} part of the hippocampus" for side in ("anterior", "posterior")]
    assert 0.9 < cosine(EmbeddingBank.load(), "MRI", *parts) < SIMILAR
