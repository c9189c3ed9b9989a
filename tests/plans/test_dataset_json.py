from __future__ import annotations

import json

import pytest

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.plans.dataset_json import label_values, load_dataset_json

GOOD = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}


def load(tmp_path, **changes):
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return load_dataset_json(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "has no 'labels'"),
        ({"file_ending": None}, "has no 'file_ending'"),
        ({"channel_names": None, "chanel_names": {"0": "CT"}}, "rename 'chanel_names'"),
        ({"channel_names": None, "modality": {"0": "CT"}}, "rename 'modality'"),
        ({"labels": ["background", "liver"]}, "'labels' is not an object"),
        ({"file_ending": 3}, "'file_ending' is not a text"),
        ({"channel_names": {"0": "CT", "2": "MRI"}}, "number the channels"),
        ({"labels": {"liver": 1}}, "no 'background'"),
        ({"labels": {"background": 0}}, "no foreground class"),
        ({"labels": {"background": 0, "liver": 1, "spleen": 3}}, r"\[0, 1, 3\] are not consecutive"),
        ({"labels": {"background": 0, "liver": "one"}}, "values of labels liver are no numbers"),
        ({"labels": {"background": 0, "ignore": 1, "liver": 2}}, "ignore label 1 is not the highest"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions_class_order"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]}, "list 2 values"),
    ],
)
def test_a_wrong_declaration_is_refused_in_a_sentence(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        load(tmp_path, **changes)


def test_all_missing_keys_are_named_at_once(tmp_path):
    with pytest.raises(DatasetError, match=r"2 problems(.|\n)*'labels'(.|\n)*'file_ending'"):
        load(tmp_path, labels=None, file_ending=None)


def test_regions_and_ignore_label_are_accepted(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    content = load(tmp_path, labels=labels, regions_class_order=[1, 2])
    assert label_values(content["labels"]) == [0, 1, 2, 3]


def test_a_missing_or_damaged_dataset_json_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        load_dataset_json(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        load_dataset_json(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DatasetError, match="one JSON object"):
        load_dataset_json(tmp_path)


def test_a_list_of_cases_that_is_none_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="'dataset' is no object with cases"):
        load(tmp_path, dataset=["case"])


def test_a_missing_key_does_not_hide_what_else_is_wrong(tmp_path):
    with pytest.raises(DatasetError, match=r"(?s)has 2 problems.*no 'channel_names'.*not consecutive"):
        load(tmp_path, channel_names=None, labels={"background": 0, "liver": 2})
