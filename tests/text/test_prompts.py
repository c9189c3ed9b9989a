from __future__ import annotations

import json

import pytest

from lgssl_nnunet.errors import PromptError
from lgssl_nnunet.text.prompts import (
    MODALITIES,
    build_prompts,
    load_prompt_file,
    prompt_modality,
    template_sentence,
    templates,
)


def dataset(channels, labels, **more):
    return {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": labels, **more}


def sentences(*args, **more):
    return [prompt.sentence for prompt in build_prompts(dataset(*args, **more))]


def test_ct_takes_the_indefinite_article():
    assert sentences(["CT"], {"background": 0, "liver": 1, "aorta": 2}) == [
        "A computerized tomography of a background",
        "A computerized tomography of a liver",
        "A computerized tomography of an aorta",
    ]


def test_mri_takes_the_definite_article():
    assert sentences(["MRI"], {"background": 0, "left atrium": 1}) == [
        "A magnetic resonance image of the background",
        "A magnetic resonance image of the left atrium",
    ]


def test_other_channels_are_medical_images():
    assert sentences(["ultrasound"], {"background": 0, "Liver": 1})[1] == "A medical image of the liver"


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("uterus", "a"), ("ureter", "a"), ("ulna", "an"), ("MS lesion", "an"), ("IVC", "an"), ("T1", "a"), ("Eye", "an")],
)
def test_article_follows_the_sound_of_the_name(phrase, article):
    assert template_sentence(phrase, "CT") == f"A computerized tomography of {article} {phrase}"


@pytest.mark.parametrize(
    ("channels", "modality"),
    [
        (["CT"], "CT"),
        (["ct"], "CT"),
        (["CT_arterial", "CT_venous"], "CT"),
        (["Computed Tomography"], "CT"),
        (["T1", "T1ce", "T2", "FLAIR"], "MRI"),
        (["T1-weighted"], "MRI"),
        (["LGE"], "MRI"),
        (["MR"], "MRI"),
        (["CT", "PET"], "other"),
        (["PET/CT"], "other"),
        (["CT", "MRI"], "other"),
        (["noNorm"], "other"),
        ([], "other"),
    ],
)
def test_modality_follows_all_channels(channels, modality):
    assert prompt_modality(dataset(channels, {})) == modality


def test_version_one_files_name_their_channels_modality():
    assert prompt_modality({"modality": {"0": "CT"}}) == "CT"


def test_prompts_are_ordered_by_label_value():
    prompts = build_prompts(dataset(["CT"], {"spleen": 3, "background": 0, "liver": 1, "pancreas": [2]}))
    assert [prompt.class_name for prompt in prompts] == ["background", "liver", "pancreas", "spleen"]


def test_regions_have_a_prompt_each_and_background_none():
    labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3, "ignore": 4}
    prompts = build_prompts(dataset(["T1", "FLAIR"], labels, regions_class_order=[1, 2, 3]))
    assert [prompt.class_name for prompt in prompts] == ["whole tumor", "tumor core", "enhancing tumor"]
    assert prompts[0].sentence == "A magnetic resonance image of the whole tumor"


def test_ignore_never_has_a_prompt():
    prompts = build_prompts(dataset(["CT"], {"background": 0, "liver": 1, "ignore": 2}))
    assert [prompt.class_name for prompt in prompts] == ["background", "liver"]


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "b": 2, "a": 1},
        {"background": 0, "a": 1, "ignore": 2},
        {"background": 0, "all": [1, 2], "part": [2], "ignore": 3},
        {"background": 0, "all": [1, 2], "part": 2},
    ],
)
def test_there_is_one_prompt_for_each_channel_of_nnunets_network(labels):
    label_handling = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    manager = label_handling.LabelManager(labels, regions_class_order=[1, 2])
    assert len(build_prompts(dataset(["CT"], labels))) == manager.num_segmentation_heads


def test_names_are_made_readable():
    names = {"background": 0, "Left_Atrium": 1, "MS_lesion": 2, "LA": 3}
    assert [prompt.phrase for prompt in build_prompts(dataset(["MRI"], names))] == [
        "background",
        "left atrium",
        "MS lesion",
        "LA",
    ]


def test_phrase_of_dataset_json_goes_into_the_template():
    prompts = {"Anterior": "anterior part of the hippocampus"}
    found = build_prompts(dataset(["MRI"], {"background": 0, "Anterior": 1}, prompts=prompts))[1]
    assert found.sentence == "A magnetic resonance image of the anterior part of the hippocampus"
    assert (found.class_name, found.phrase) == ("Anterior", "anterior part of the hippocampus")


def test_phrase_with_an_article_keeps_it():
    assert template_sentence("the left lung", "CT") == "A computerized tomography of the left lung"


@pytest.mark.parametrize("text", ["A scan of a big liver", "The liver seen in CT", "liver, bright against spleen."])
def test_whole_sentence_is_used_as_it_stands(text):
    found = build_prompts(dataset(["CT"], {"background": 0, "liver": 1}), {"liver": text})[1]
    assert (found.sentence, found.phrase) == (text, None)


def test_prompt_file_wins_over_dataset_json():
    data = dataset(["CT"], {"background": 0, "a": 1, "b": 2}, prompts={"a": "liver", "b": "spleen"})
    assert [prompt.phrase for prompt in build_prompts(data, {"b": "pancreas"})] == ["background", "liver", "pancreas"]


def test_list_gives_a_class_several_texts_each_by_its_own_kind():
    block = {"liver": ["hepar", "The big organ below  the diaphragm.", "the left lobe"]}
    background, liver = build_prompts(dataset(["CT"], {"background": 0, "liver": 1}, prompts=block))
    assert [(text.class_name, text.phrase, text.sentence) for text in liver.texts] == [
        ("liver", "hepar", "A computerized tomography of a hepar"),
        ("liver", None, "The big organ below the diaphragm."),
        ("liver", "the left lobe", "A computerized tomography of the left lobe"),
    ]
    assert background.texts == (background,)


def test_list_of_one_text_is_that_text():
    data = dataset(["CT"], {"background": 0, "liver": 1})
    assert build_prompts(data, {"liver": ["hepar"]}) == build_prompts(data, {"liver": "hepar"})


def test_ensemble_words_phrases_in_every_template_and_leaves_sentences_alone():
    block = {"liver": ["liver", "the left lobe", "The big organ."]}
    background, liver = build_prompts(dataset(["CT"], {"background": 0, "liver": 1}, prompts=block), ensemble=True)
    assert background.rewordings[0] == "A CT scan showing the background"
    phrase, own_article, sentence = liver.texts
    assert (phrase.sentence, *phrase.rewordings) == (
        "A computerized tomography of a liver",
        "A CT scan showing the liver",
        "CT imaging of the liver",
        "A slice through the liver in computed tomography",
        "The outline of the liver in a CT volume",
    )
    assert own_article.rewordings[1] == "CT imaging of the left lobe"
    assert sentence.rewordings == ()


def test_ensemble_leaves_the_first_sentence_as_it_was():
    data = dataset(["MRI"], {"background": 0, "left atrium": 1})
    plain, ensemble = build_prompts(data), build_prompts(data, ensemble=True)
    assert [prompt.sentence for prompt in plain] == [prompt.sentence for prompt in ensemble]
    assert not any(prompt.rewordings for prompt in plain)


def test_no_template_names_another_modality():
    words = {"CT": ("MR", "magnetic"), "MRI": ("CT", "tomography"), "other": ("CT", "MR", "magnetic", "tomography")}
    for modality in MODALITIES:
        assert len(set(templates(modality))) == len(templates(modality)) > 1
        for template in templates(modality):
            assert template.count("{}") == 1
            assert not any(word in template for word in words[modality])


@pytest.mark.parametrize("block", [{"lung": "left lung"}, {"ignore": "nothing"}])
def test_prompt_for_an_unknown_class_is_refused_with_the_known_ones(block):
    data = dataset(["CT"], {"background": 0, "liver": 1, "ignore": 2})
    with pytest.raises(PromptError, match=r"names '(lung|ignore)'.*'background', 'liver'"):
        build_prompts(data, block)
    with pytest.raises(PromptError, match=r"dataset\.json names '(lung|ignore)'"):
        build_prompts({**data, "prompts": block})


@pytest.mark.parametrize(
    "value", [3, "", "  ", ".", None, [], ["liver", ""], ["liver", 3], [["liver"]], {"a": "liver"}]
)
def test_prompt_that_is_no_text_is_refused(value):
    with pytest.raises(PromptError, match="'liver'"):
        build_prompts(dataset(["CT"], {"background": 0, "liver": 1}), {"liver": value})


def test_prompt_block_that_is_no_mapping_is_refused():
    with pytest.raises(PromptError, match="must map class names"):
        build_prompts(dataset(["CT"], {"background": 0}, prompts=["liver"]))


@pytest.mark.parametrize("labels", [None, {}, {"background": 0, "liver": "one"}, {"background": 0, "a": 1, "b": 1}])
def test_labels_without_one_name_for_each_value_are_refused(labels):
    with pytest.raises(PromptError, match=r"dataset\.json"):
        build_prompts({"channel_names": {"0": "CT"}, "labels": labels})


def test_prompt_file_is_read(tmp_path):
    path = tmp_path / "prompts.json"
    content = {"liver": "Liver mit Umlaut ä", "spleen": ["spleen", "lien"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_prompt_file(path) == content


@pytest.mark.parametrize(
    "content", [None, b"{", b"[]", b"{}", b'{"liver": 1}', b'{"liver": " "}', b'{"liver": []}', b"\xff\xfe\x00"]
)
def test_bad_prompt_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=r"prompts\.json"):
        load_prompt_file(path)
