from __future__ import annotations

import pytest

from lgssl_nnunet.errors import SplitError


@pytest.fixture
def split(build_trainer):
    """`do_split` of a fold under plans that know these twins."""
    return lambda fold, twins: build_trainer("SupervisedTrainer", fold=fold, twins=twins).do_split()


@pytest.mark.parametrize("fold", range(5))
def test_no_case_is_trained_on_whose_twin_validates(fold, split, tiny_dataset):
    labeled = tiny_dataset().plans()["lgssl"]["split"]["labeled"]
    first, second = labeled[0], labeled[-1]
    plain_training, plain_validation = split(fold, [])
    training, validation = split(fold, [[first, second]])
    assert validation == plain_validation
    apart = (first in plain_validation) != (second in plain_validation)
    lost = {first, second} - set(plain_validation) if apart else set()
    assert training == [case for case in plain_training if case not in lost]


def test_twins_change_nothing_for_fold_all_and_for_plans_that_know_of_none(split, build_trainer, tiny_dataset):
    labeled = tiny_dataset().plans()["lgssl"]["split"]["labeled"]
    assert split("all", [labeled[:2]]) == (labeled, labeled)

    def forget(plans) -> None:
        plans["lgssl"].pop("twins", None)

    assert build_trainer("SupervisedTrainer", fold=0, changes=forget).do_split() == split(0, [])


def test_a_fold_without_any_case_left_is_refused(split, tiny_dataset):
    labeled = tiny_dataset().plans()["lgssl"]["split"]["labeled"]
    _, validation = split(0, [])
    with pytest.raises(SplitError, match="fold has a twin"):
        split(0, [[case, validation[0]] for case in labeled if case not in validation])


def test_an_unlabelled_twin_of_a_validation_case_is_not_seen_in_that_fold(build_trainer, tiny_dataset):
    cases = tiny_dataset().plans()["lgssl"]["split"]
    twins = [[cases["unlabeled"][0], cases["labeled"][0]]]
    for fold in range(5):
        trainer = build_trainer("LGSSLTrainer", fold=fold, twins=twins)
        seen = set(trainer.unlabeled_cases())
        assert (cases["unlabeled"][0] in seen) != (cases["labeled"][0] in trainer.do_split()[1])
        assert seen.issuperset(cases["unlabeled"][1:])
    assert build_trainer("LGSSLTrainer", twins=twins).unlabeled_cases() == sorted(cases["unlabeled"])
