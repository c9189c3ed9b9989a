"""Which folder is which dataset."""

from __future__ import annotations

import pytest

from lgssl_nnunet.paths import dataset_number, is_dataset, is_plain_name


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Dataset007_Liver", 7),
        ("Dataset501_A_b-c", 501),
        ("Dataset1501_Large", 1501),
        ("Dataset501b_Liver", None),
        ("Dataset501", None),
        ("Dataset07_Liver", None),
        ("MyDataset501_Liver", None),
    ],
)
def test_the_number_of_a_dataset_is_read_from_its_whole_name(name, number):
    assert dataset_number(name) == number


@pytest.mark.parametrize("wanted", [7, "7", "07", "007", "Dataset007_Liver"])
def test_every_spelling_of_an_id_finds_the_dataset(wanted):
    assert is_dataset("Dataset007_Liver", wanted)
    assert not is_dataset("Dataset070_Liver", wanted)


@pytest.mark.parametrize(
    "name", ["", ".", "..", " . ", "a/b", "a\\b", "../a", "a\0", "a\n", "\ud800", "x" * 256, 3, None]
)
def test_what_could_name_a_file_elsewhere_or_none_is_no_plain_name(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["liver_001", "a b.c", "é", "x" * 255, "undecodable \udcff"])
def test_names_that_files_have_are_plain(name):
    assert is_plain_name(name)
