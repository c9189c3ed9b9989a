"""Which classes of several datasets are one, what the class is called, and what its prompt is."""

from __future__ import annotations

import pytest

from lgssl_nnunet.plans.merged_classes import (
    classes_of,
    look_alike,
    merge_classes,
    merged_prompts,
    parts_joined,
    parts_left_out,
)


def dataset(number, labels, channel="CT", **prompts):
    content = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, **{name: value for value, name in enumerate(labels, 1)}},
        "prompts": prompts,
    }
    return classes_of(f"Dataset{number}_D", content)


def table(merged):
    """Return the members of each class as "501:NAME"."""
    return {entry.name: [f"{m.dataset[7:10]}:{m.name}" for m in entry.members] for entry in merged}


def merge(*datasets, **options):
    merged, problems = merge_classes([member for classes in datasets for member in classes], **options)
    assert problems == []
    return merged


def problems_of(*datasets, **options):
    _, problems = merge_classes([member for classes in datasets for member in classes], **options)
    return [str(problem) for problem in problems]


def test_equal_words_and_names_of_the_table_are_one_class():
    first = dataset(501, ["Liver", "postcava", "kidney_left", "made up"])
    second = dataset(502, ["inferior vena cava", "hepar", "left kidney", "spleen"])
    merged = merge(first, second, dataset(503, ["Made_Up", "liver"]))
    assert table(merged) == {
        "Liver": ["501:Liver", "502:hepar", "503:liver"],
        "postcava": ["501:postcava", "502:inferior vena cava"],
        "kidney_left": ["501:kidney_left", "502:left kidney"],
        "made up": ["501:made up", "503:Made_Up"],
        "spleen": ["502:spleen"],
    }
    assert [entry.reason for entry in merged] == [
        "by the table of synonyms", "by the table of synonyms", "by the table of synonyms", "same words", "",
    ]  # fmt: skip


def test_a_prompt_says_more_than_a_name():
    first = dataset(501, ["liver", "tumour"], tumour="liver tumour")
    second = dataset(502, ["kidney", "tumour"], tumour="A computerized tomography of a kidney tumour")
    third = dataset(503, ["label_1"], label_1=["hepatic tumor", "The lesions of the liver."])
    merged = merge(first, second, third)
    assert table(merged) == {
        "liver": ["501:liver"],
        "liver tumour": ["501:tumour", "503:label_1"],
        "kidney": ["502:kidney"],
        "kidney tumour": ["502:tumour"],
    }


INSIDE, OUTSIDE = "A hypodense mass inside the liver.", "A mass that grows out of the kidney."


@pytest.mark.parametrize(
    ("prompt", "other"), [(INSIDE, OUTSIDE), (INSIDE, None), ([INSIDE, "It is dark."], [INSIDE, OUTSIDE])]
)
def test_sentences_that_differ_keep_classes_of_one_name_apart_and_are_no_names(prompt, other):
    first = dataset(501, ["tumour"], tumour=prompt)
    second = dataset(502, ["tumour"], **({} if other is None else {"tumour": other}))
    merged = merge(first, second)
    names = ["tumour (Dataset501_D)", "tumour (Dataset502_D)"]
    assert table(merged) == {names[0]: ["501:tumour"], names[1]: ["502:tumour"]}
    assert merged_prompts(merged, mixed=False) == {names[0]: prompt, names[1]: other or "tumour"}
    assert [(a.name, b.name) for a, b in look_alike(merged)] == [tuple(names)]
    assert list(table(merge(first, second, same=[["tumour", "501:tumour"]]))) == ["tumour"]


def test_equal_sentences_are_one_class():
    merged = merge(dataset(501, ["tumour"], tumour=INSIDE), dataset(502, ["label_1"], label_1=INSIDE.lower()))
    assert table(merged) == {"tumour": ["501:tumour", "502:label_1"]}
    assert merged[0].reason == "same words"


def test_a_phrase_tells_classes_of_one_name_apart_where_the_other_prompt_is_a_sentence():
    merged = merge(dataset(501, ["tumour"], tumour=INSIDE), dataset(502, ["tumour"], tumour="kidney tumour"))
    assert table(merged) == {"tumour": ["501:tumour"], "kidney tumour": ["502:tumour"]}


def test_classes_with_one_name_and_no_text_that_differs_get_the_name_of_their_dataset():
    merged = merge(dataset(501, ["lesion"]), dataset(502, ["lesion"]), keep_apart=["lesion"])
    assert list(table(merged)) == ["lesion (Dataset501_D)", "lesion (Dataset502_D)"]
    assert merged_prompts(merged, mixed=False) == {
        "lesion (Dataset501_D)": "lesion",
        "lesion (Dataset502_D)": "lesion",
    }


def test_a_user_joins_classes_under_the_first_name():
    first, second, third = dataset(501, ["PV"]), dataset(502, ["portal"]), dataset(503, ["portal", "x"])
    merged = merge(first, second, third, same=[["portal", "PV"]])
    assert table(merged) == {"portal": ["501:PV", "502:portal", "503:portal"], "x": ["503:x"]}
    assert merged[0].reason == "by --same"


def test_a_name_can_mean_the_class_of_one_dataset():
    first, second, third = dataset(501, ["x", "y"]), dataset(502, ["x"]), dataset(503, ["spleen"])
    merged = merge(first, second, third, same=[["spleen", "501:x"]], keep_apart=["Dataset502_D:x"])
    assert table(merged) == {"spleen": ["501:x", "503:spleen"], "y": ["501:y"], "x": ["502:x"]}


def test_what_is_joined_by_a_user_takes_its_synonyms_along():
    merged = merge(dataset(501, ["foie"]), dataset(502, ["liver"]), dataset(503, ["hepar"]), same=[["foie", "liver"]])
    assert table(merged) == {"foie": ["501:foie", "502:liver", "503:hepar"]}
    assert merged_prompts(merged, mixed=False) == {"foie": "liver"}


def test_two_classes_of_one_dataset_become_one_only_if_somebody_says_so():
    kidneys, kidney = dataset(501, ["left kidney", "right kidney"]), dataset(502, ["kidney"])
    merged = merge(kidneys, kidney, same=[["kidney", "left kidney", "right kidney"]])
    assert table(merged) == {"kidney": ["501:left kidney", "501:right kidney", "502:kidney"]}
    alone = merge(kidneys, dataset(502, ["spleen"]), same=[["both kidneys", "left kidney", "right kidney"]])
    assert table(alone)["both kidneys"] == ["501:left kidney", "501:right kidney"]
    (problem,) = problems_of(dataset(501, ["liver tumour", "liver lesion"]), kidney)
    assert problem.startswith(
        "Dataset501_D: has the classes 'liver tumour' and 'liver lesion', which are the same structure by their names; "
        'say so with --same "liver tumour=liver lesion", or keep one out of it with --keep_apart'
    )


def test_keeping_apart_is_for_every_dataset_or_for_one():
    classes = [dataset(number, ["liver"]) for number in (501, 502, 503)]
    assert len(merge(*classes, keep_apart=["liver"])) == 3
    one = merge(*classes, keep_apart=["502:liver"])
    assert sorted(table(one).values()) == [["501:liver", "503:liver"], ["502:liver"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"same": [["liver", "hepat"]]}, "--same liver=hepat: no dataset has a class 'hepat'; name a class of these: "),
        ({"same": [["livr", "501:liver"]]}, "--same livr=501:liver: joins one class only"),
        ({"keep_apart": ["background"]}, "--keep_apart: no dataset has a class 'background'"),
        ({"same": [["liver", "spleen"]], "keep_apart": ["spleen"]}, "is named by --same and by --keep_apart"),
        ({"same": [["a", "501:liver", "spleen"], ["b", "spleen", "x"]]}, "as another --same does; join all in one"),
        ({"same": [["x", "liver"]], "keep_apart": []}, None),
    ],
)
def test_names_that_mean_nothing_or_two_things_are_problems(options, message):
    found = problems_of(dataset(501, ["liver", "x"]), dataset(502, ["liver", "spleen"]), **options)
    assert (found == []) if message is None else any(message in problem for problem in found)


@pytest.mark.parametrize(
    ("same", "name"),
    [
        ([["kidney", "a", "b"], ["kidney", "c", "e"]], "kidney"),
        ([["kidney", "a", "b"], ["Kidney", "c", "e"]], "Kidney"),
        ([["501:x", "502:b"], ["503:x", "504:d"]], "x"),
    ],
)
def test_two_groups_cannot_make_one_class(same, name):
    sets = (dataset(501, ["a", "c", "x"]), dataset(502, ["b", "e"]), dataset(503, ["x"]), dataset(504, ["d"]))
    (problem,) = problems_of(*sets, same=same)
    shown = "=".join(same[1])
    assert problem == (
        f"--same {shown}: makes a class {name!r}, as another --same does; join all in one, or begin it with another "
        "name."
    )


@pytest.mark.parametrize("name", ["504:x", "Dataset504_D:x", "501:x"])
def test_a_new_name_is_not_that_of_a_dataset(name):
    (problem,) = problems_of(dataset(501, ["spleen"]), dataset(502, ["milz"]), same=[[name, "spleen", "milz"]])
    assert f"--same {name}=spleen=milz: no dataset has a class {name!r}; name a class of these: " in problem


def test_a_new_name_may_hold_a_colon():
    merged = merge(dataset(501, ["spleen"]), dataset(502, ["milz"]), same=[["organ: spleen", "spleen", "milz"]])
    assert list(table(merged)) == ["organ: spleen"]


def test_nnunets_own_names_are_no_classes():
    found = problems_of(dataset(501, ["a", "b"]), dataset(502, ["c"]), same=[["ignore", "a", "c"], ["b", "502:c"]])
    assert any("names Dataset502_D 'c' (1), as another --same does" in problem for problem in found)
    merged = merge(dataset(501, ["a"]), dataset(502, ["c"]), same=[["background", "a", "c"]])
    assert list(table(merged)) == ["a"]


def test_a_prompt_comes_along_where_the_name_says_no_structure():
    first = dataset(
        501, ["Anterior", "label_2"], channel="MRI", Anterior="anterior hippocampus", label_2="an odd thing"
    )
    second = dataset(502, ["liver", "left_atrium"], channel="MRI", liver="liver of a child")
    merged = merge(first, second)
    assert merged_prompts(merged, mixed=False) == {
        "Anterior": "anterior hippocampus",
        "label_2": "an odd thing",
        "liver": "liver of a child",
    }


def test_the_modality_of_some_images_is_said_of_none(caplog):
    first = dataset(501, ["a"], a="A computerized tomography of a liver")
    second = dataset(502, ["b", "c"], channel="MRI", b="The spleen, bright in an MR volume.", c="An odd thing.")
    merged = merge(first, second)
    expected = {"a": "A computerized tomography of a liver", "b": "The spleen, bright in an MR volume."}
    assert merged_prompts(merged, mixed=False) == {**expected, "c": "An odd thing."}
    assert not caplog.records
    assert merged_prompts(merged, mixed=True) == {**expected, "a": "liver", "c": "An odd thing."}
    assert "The prompt of 'b' tells one modality" in caplog.text


def test_pairs_that_look_alike_are_found_where_no_dataset_tells_them_apart():
    merged = merge(
        dataset(501, ["kidney", "liver", "galbladder"]), dataset(502, ["left kidney", "liver", "gallbladder"])
    )
    assert [(a.name, b.name) for a, b in look_alike(merged)] == [
        ("kidney", "left kidney"),
        ("galbladder", "gallbladder"),
    ]


def test_a_class_without_its_part_is_found_where_another_dataset_has_both():
    both, whole, part = dataset(501, ["liver", "liver tumour"]), dataset(503, ["hepar"]), dataset(504, ["liver tumour"])
    merged = merge(both, whole, part, dataset(505, ["liver", "liver tumour"]))
    assert [(name, a.name, b.name) for name, a, b in parts_left_out(merged)] == [
        ("Dataset503_D", "liver", "liver tumour")
    ]
    assert list(look_alike(merged)) == []
    assert list(parts_left_out(merge(both, part))) == []
    apart = merge(whole, part)
    assert list(parts_left_out(apart)) == []
    assert [(a.name, b.name) for a, b in look_alike(apart)] == [("hepar", "liver tumour")]


@pytest.mark.parametrize(
    ("datasets", "chain", "told"),
    [
        ([["left kidney", "right kidney"], ["left kidney"]], ["kidney", "left kidney", "right kidney"], ["502"]),
        ([["left kidney", "right kidney"], ["right kidney", "left kidney"]], ["left kidney", "right kidney"], []),
        ([["left kidney", "right kidney"], ["kidney"]], ["kidney", "left kidney", "right kidney"], []),
        ([["liver", "liver tumour"], ["liver tumour"], ["hepar"]], ["liver", "liver tumour"], ["502", "503"]),
        ([["portal vein"], ["PV"]], ["portal vein", "PV"], []),
        ([["left kidney"], ["right kidney"]], ["kidney", "left kidney", "right kidney"], ["501", "502"]),
        ([["left kidney"], ["kidney"]], ["kidney", "left kidney"], ["501"]),
        ([["hepar"], ["liver tumour"]], ["hepar", "liver tumour"], ["502"]),
        ([["left kidney"], ["kidney, left"]], ["left kidney", "kidney, left"], []),
    ],
)
def test_a_dataset_with_a_part_of_what_others_have_of_a_joined_class_is_told(datasets, chain, told):
    merged = merge(*(dataset(number, labels) for number, labels in enumerate(datasets, 501)), same=[chain])
    assert [name[7:10] for name, _, _ in parts_joined(merged)] == told
