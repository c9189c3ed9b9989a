"""Hyper-parameters from the command line and from plans."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from lgssl_nnunet.engine.hyperparameters import check_choices, check_ranges, override, resolve
from lgssl_nnunet.errors import UsageError


@dataclass(frozen=True)
class Numbers:
    weight: float = 1.0
    steps: int = 3
    gate: bool = True
    mode: str = "attention"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError("weight must not be negative")


def test_words_are_converted_to_the_type_of_the_field():
    found = override(Numbers(), {"weight": "2", "steps": "5", "gate": "false", "mode": "none"}, "X")
    assert found == Numbers(2.0, 5, False, "none")
    assert [type(value) for value in vars(found).values()] == [float, int, bool, str]


@pytest.mark.parametrize(
    ("word", "value"),
    [("True", True), ("1", True), ("yes", True), ("no", False), ("0", False), ("FALSE", False), (False, False)],
)
def test_switches_take_the_usual_words(word, value):
    assert override(Numbers(), {"gate": word}, "X").gate is value


def test_the_defaults_are_left_as_they_are():
    defaults = Numbers()
    assert override(defaults, {}, "X") == defaults
    override(defaults, {"weight": 5}, "X")
    assert defaults.weight == 1.0


def test_all_problems_come_in_one_sentence():
    with pytest.raises(UsageError) as caught:
        override(Numbers(), {"wieght": 1, "steps": "many", "gate": "maybe", "weight": "heavy"}, "XTrainer")
    message = str(caught.value)
    assert "Hyper-parameters of XTrainer" in message
    for problem in (
        "'wieght' is unknown (did you mean weight?)",
        "steps='many' is not a whole number",
        "gate='maybe' is not true or false",
        "weight='heavy' is not a finite number",
    ):
        assert problem in message
    assert "It has: weight=1.0, steps=3, gate=True, mode=attention." in message


def test_a_name_without_a_near_one_is_told_the_known_ones():
    with pytest.raises(UsageError, match=r"'zzz' is unknown\. It has: weight"):
        override(Numbers(), {"zzz": 1}, "X")


def test_a_value_that_the_method_refuses_is_a_usage_error():
    with pytest.raises(UsageError, match="weight must not be negative"):
        override(Numbers(), {"weight": "-1"}, "X")


@pytest.mark.parametrize("value", [2.5, "2.5"])
def test_a_fraction_is_no_whole_number(value):
    with pytest.raises(UsageError, match="is not a whole number"):
        override(Numbers(), {"steps": value}, "X")


@pytest.mark.parametrize("value", [None, [1]])
def test_a_value_of_no_usable_type_is_a_usage_error(value):
    with pytest.raises(UsageError, match="is not a finite number"):
        override(Numbers(), {"weight": value}, "X")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(UsageError, match="is not a finite number"):
        override(Numbers(), {"weight": value}, "X")


@pytest.mark.parametrize("plans", [{}, {"lgssl": {}}, {"lgssl": {"training": {"seed": 1}}}])
def test_plans_without_overrides_give_the_defaults(plans):
    assert resolve(Numbers(), plans, "X") == Numbers()


def test_plans_carry_overrides():
    plans = {"lgssl": {"training": {"hyperparameters": {"steps": 7}}}}
    assert resolve(Numbers(), plans, "X").steps == 7


@dataclass(frozen=True)
class Bounded:
    """Fields with choices and limits."""

    form: str = "a"
    rate: float = 0.5
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, form=("a", "b"))
        check_ranges(self, rate=(0, 1), weight=(0, None))


@pytest.mark.parametrize("values", [{"form": "b"}, {"rate": 0.0}, {"rate": 1.0}, {"weight": 0.0}, {"weight": 1e9}])
def test_values_up_to_the_limits_are_taken(values):
    changed = override(Bounded(), values, "X")
    assert {name: getattr(changed, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"form": "c"}, "form='c' is unknown, choose one of a, b"),
        ({"rate": -0.1}, "rate=-0.1 must be between 0 and 1"),
        ({"rate": 1.1}, "rate=1.1 must be between 0 and 1"),
        ({"weight": -1.0}, "weight=-1.0 must be at least 0"),
    ],
)
def test_values_outside_are_refused_with_the_limits(values, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        override(Bounded(), values, "XTrainer")
