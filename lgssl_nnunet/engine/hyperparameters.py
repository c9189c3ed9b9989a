"""A method's hyper-parameters: a frozen dataclass, overridden by what the plans carry."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from lgssl_nnunet.errors import UsageError

T = TypeVar("T")

_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number"}


def override(defaults: T, values: Mapping[str, Any], owner: str) -> T:
    """Return a copy of the dataclass `defaults` with `values` put in, converted to each field's type.

    Args:
        defaults: a frozen dataclass instance.
        values: field name to value; strings (from the command line) are converted.
        owner: trainer name for messages.

    Raises:
        UsageError: unknown names or values of the wrong type, all of them in one sentence.
    """
    fields = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    problems, converted = [], {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
            hint = f" (did you mean {near[0]}?)" if near else ""
            problems.append(f"{name!r} is unknown{hint}")
            continue
        try:
            converted[name] = _convert(value, fields[name])
        except ValueError:
            problems.append(f"{name}={value!r} is not {_KINDS.get(type(fields[name]), type(fields[name]).__name__)}")
    if problems:
        known = ", ".join(f"{name}={value}" for name, value in fields.items())
        listing = f"It has: {known}." if known else "It has none: leave them out."
        raise UsageError(f"Hyper-parameters of {owner}: {'; '.join(problems)}. {listing}")
    try:
        return dataclasses.replace(defaults, **converted)
    except ValueError as error:
        raise UsageError(f"Hyper-parameters of {owner}: {error}.") from error


def request(planned: T, values: Mapping[str, Any], owner: str) -> T:
    """Return `override` for values that a user asks for, of which each must have an effect.

    A dataclass whose values can leave others without effect says so in a class variable `unused`: by field and value
    the names of those others. Stored plans are not checked, so that models trained before a name came in stay usable.

    Raises:
        UsageError: as `override`, or a value asked for differs from its default and has no effect.
    """
    chosen = override(planned, values, owner)
    try:
        check_effects(chosen, values)
    except ValueError as error:
        raise UsageError(f"Hyper-parameters of {owner}: {error}.") from error
    return chosen


def resolve(defaults: T, plans: Mapping[str, Any], owner: str) -> T:
    """Return `defaults` with the overrides recorded in the plans (`lgssl_train --set name=value`)."""
    training = plans.get("lgssl", {}).get("training", {})
    return override(defaults, training.get("hyperparameters", {}), owner)


def _convert(value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "yes"):
            return True
        if str(value).lower() in ("false", "0", "no"):
            return False
        raise ValueError(value)
    try:
        converted = type(default)(value)
    except TypeError as error:
        raise ValueError(value) from error
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(value)
    if isinstance(value, float) and converted != value:  # int(2.5) would be 2 without a word
        raise ValueError(value)
    return converted


def check_choices(values: Any, **choices: Sequence[str]) -> None:
    """Check fields of a dataclass against the values they may take.

    Raises:
        ValueError: a field holds another value.
    """
    for name, allowed in choices.items():
        value = getattr(values, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown, choose one of {', '.join(allowed)}")


def check_effects(values: Any, names: Collection[str]) -> None:
    """Check that of these fields none that differs from its default is left without effect (`unused`, see `request`).

    Raises:
        ValueError: one is.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(values)}
    for choice, names_by_value in getattr(values, "unused", {}).items():
        value = getattr(values, choice)
        idle = [
            name for name in names_by_value.get(value, ()) if name in names and getattr(values, name) != defaults[name]
        ]
        if idle:
            raise ValueError(f"{choice}={value} leaves {', '.join(idle)} without effect; leave that out")


def check_ranges(values: Any, **ranges: tuple[float, float | None]) -> None:
    """Check fields of a dataclass against a least and a greatest value (None: no limit).

    Raises:
        ValueError: a field lies outside.
    """
    for name, (least, greatest) in ranges.items():
        value = getattr(values, name)
        if value < least or (greatest is not None and value > greatest):
            limits = f"at least {least}" if greatest is None else f"between {least} and {greatest}"
            raise ValueError(f"{name}={value} must be {limits}")
