from __future__ import annotations

import pytest

from lgssl_nnunet.errors import SplitError, UsageError
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.splits import choose_budget, permute

NAMES = [f"case_{index:03d}" for index in range(40)]


def test_draws_of_one_seed_are_nested_and_seeds_differ():
    order = permute(NAMES, 0)
    assert sorted(order) == NAMES
    assert order[:4] == permute(reversed(NAMES), 0)[:4]
    assert order[:8] != permute(NAMES, 1)[:8]


def test_removing_a_case_does_not_reorder_the_others():
    order = permute(NAMES, 3)
    assert permute([name for name in NAMES if name != order[5]], 3) == order[:5] + order[6:]


def test_the_budget_tells_number_and_seed_in_its_name(raw_dataset):
    raw_dataset(labeled=6)
    dataset = load_raw_dataset(901)
    four, two = choose_budget(dataset, labeled=4), choose_budget(dataset, labeled=2)
    assert set(two.labeled) < set(four.labeled)
    assert (four.name, four.seed) == ("_labeled4", 0)
    assert choose_budget(dataset, labeled=4, seed=7).name == "_labeled4_s7"
    assert choose_budget(dataset, seed=7).name == ""
    assert choose_budget(dataset).labeled == tuple(dataset.labeled)


def test_more_cases_than_are_labelled_are_refused(raw_dataset):
    raw_dataset(labeled=3)
    dataset = load_raw_dataset(901)
    with pytest.raises(SplitError, match="only 3 labelled cases"):
        choose_budget(dataset, labeled=4)
    with pytest.raises(SplitError, match="at least one"):
        choose_budget(dataset, labeled=0)


def test_a_list_chooses_the_cases_and_names_the_plans(raw_dataset, tmp_path):
    raw_dataset(labeled=3)
    file = tmp_path / "my split.txt"
    file.write_text("# chosen by hand\nlab_02\n\n  lab_00 \n")
    budget = choose_budget(load_raw_dataset(901), labeled_list=file)
    assert budget.labeled == ("lab_00", "lab_02")
    assert budget.name == "_my-split"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lab_00\nnobody\n", "no case nobody"),
        ("lab_00\nunl_00\n", "no label file for unl_00"),
        ("#\n", "names no case"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(raw_dataset, tmp_path, text, message):
    raw_dataset(labeled=2)
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(SplitError, match=message):
        choose_budget(load_raw_dataset(901), labeled_list=tmp_path / "list.txt")


def test_a_missing_list_and_two_ways_of_choosing_are_refused(raw_dataset, tmp_path):
    raw_dataset(labeled=2)
    dataset = load_raw_dataset(901)
    with pytest.raises(UsageError, match="cannot be read"):
        choose_budget(dataset, labeled_list=tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="exclude each other"):
        choose_budget(dataset, labeled=1, labeled_list=tmp_path / "nowhere.txt")


def test_a_list_may_not_take_the_plans_name_of_a_draw(raw_dataset, tmp_path):
    raw_dataset(labeled=2)
    for name in ("labeled8", "labeled8_s1"):
        file = tmp_path / f"{name}.txt"
        file.write_text("lab_00\n")
        with pytest.raises(UsageError, match="are those of --labeled; rename the file"):
            choose_budget(load_raw_dataset(901), labeled_list=file)
