"""From the words of a benchmark's command to its cells; everything that can be refused without training is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lgssl_nnunet.errors import LGSSLError, UsageError
from lgssl_nnunet.evaluation.benchmark.cells import Cell, method_label, parse_method
from lgssl_nnunet.inference.models import BASELINE
from lgssl_nnunet.plans.cases import RawDataset, load_raw_dataset
from lgssl_nnunet.plans.partial_labels import partial_labels
from lgssl_nnunet.plans.splits import choose_budget, require_every_class
from lgssl_nnunet.problems import first_of

logger = logging.getLogger(__name__)

_MOST_NAMED = 5

ALL = "all"


@dataclass(frozen=True)
class GridRequest:
    """What the cells are made of, as the user says it.

    Attributes:
        datasets: ids or names.
        trainers: methods as `parse_method` reads them.
        budgets: numbers of labelled cases, or "all".
        seeds: seeds of draw and training.
        iterations: optimiser steps; None as the planner's schedule has.
        configuration: such as "3d_fullres".
        planner: planner class.
        spacing: target spacing in mm (z y x), or None.
    """

    datasets: Sequence[int | str]
    trainers: Sequence[str]
    budgets: Sequence[int | str]
    seeds: Sequence[int]
    iterations: int | None
    configuration: str
    planner: str
    spacing: tuple[float, ...] | None


@dataclass(frozen=True)
class Method:
    """A trainer with settings."""

    trainer: str
    settings: tuple[tuple[str, Any], ...]
    needs_unlabeled: bool
    takes_partial_labels: bool
    has_source: bool


def build_grid(request: GridRequest) -> list[Cell]:
    """Return the cells in the order in which they are worked on: seed by seed, so that whole tables come early.

    Methods that need unlabelled cases are left out where the budget leaves none; with the budget "all" the baseline is
    always there, as upper bound.

    Raises:
        UsageError: whatever is wrong, all in one message.
    """
    problems: list[str] = []
    iterations = _iterations(request, problems)
    budgets = _budgets(request.budgets, problems)
    methods = _methods(request.trainers, problems)
    datasets = _datasets(request.datasets, problems)
    if not request.seeds or len(set(request.seeds)) != len(request.seeds) or min(request.seeds) < 0:
        problems.append("--seeds: give one or more whole numbers from 0, each once.")
    for dataset in datasets:
        problems += _problems_of_test_cases(dataset) + _problems_of_budgets(dataset, budgets, request.seeds, methods)
    if problems:
        raise UsageError("The benchmark cannot begin:\n" + "\n".join(f"  {problem}" for problem in problems))
    cells = []
    for seed in request.seeds:
        for dataset in datasets:
            for budget in budgets:
                cells += [
                    Cell(
                        dataset=dataset.name,
                        trainer=method.trainer,
                        budget=budget,
                        seed=seed,
                        iterations=iterations,
                        configuration=request.configuration,
                        planner=request.planner,
                        spacing=request.spacing,
                        settings=method.settings,
                    )
                    for method in _methods_of_budget(methods, dataset, budget)
                ]
    return cells


def _methods_of_budget(methods: Sequence[Method], dataset: RawDataset, budget: int | None) -> list[Method]:
    """Return the methods that can train on a budget, those that learn from another's model last.

    Cases that annotate some classes only are unlabelled in the others; methods that do not take them were refused.
    """
    left = bool(dataset.unlabeled) or (budget is not None and budget < len(dataset.labeled))
    leaves_some = left or bool(partial_labels(dataset))
    usable = [method for method in methods if leaves_some or not method.needs_unlabeled]
    left_out = [method_label(m.trainer, dict(m.settings)) for m in methods if m not in usable]
    if left_out:
        logger.info(
            "%s, %s labels: no unlabelled case is left for %s.", dataset.name, budget or ALL, ", ".join(left_out)
        )
    if budget is None and not any(m.trainer == BASELINE for m in usable):
        usable.append(_method(BASELINE))
    return sorted(usable, key=lambda method: method.has_source)


def _iterations(request: GridRequest, problems: list[str]) -> int:
    """Return the number of optimiser steps, and check what goes to planning unseen otherwise."""
    from lgssl_nnunet.plans.planner import find_planner

    if request.iterations is not None and request.iterations < 1:
        problems.append(f"--iterations {request.iterations}: give at least 1.")
    if request.spacing is not None and (len(request.spacing) != 3 or min(request.spacing) <= 0):
        problems.append("--overwrite_target_spacing: give three positive numbers in mm (z y x).")
    if request.configuration not in ("2d", "3d_fullres", "3d_lowres"):
        problems.append(f"-c {request.configuration}: give 2d, 3d_fullres or 3d_lowres.")
    try:
        schedule = find_planner(request.planner).schedule
    except LGSSLError as error:
        problems.append(str(error))
        return 1
    return request.iterations or schedule["num_epochs"] * schedule["iterations_per_epoch"]


def _budgets(words: Sequence[int | str], problems: list[str]) -> list[int | None]:
    """Return the budgets in ascending order, None (all) last."""
    wrong = [str(word) for word in words if word != ALL and (not str(word).isdecimal() or int(word) < 1)]
    if wrong or not words or len({str(word) for word in words}) != len(words):
        problems.append(f"--budgets {' '.join(map(str, words))}: give numbers of labelled cases or all, each once.")
    numbers = sorted(int(word) for word in words if str(word) not in wrong and word != ALL)
    return [*numbers, *([None] if ALL in words else [])]


def _methods(words: Sequence[str], problems: list[str]) -> list[Method]:
    methods = []
    for word in words:
        try:
            methods.append(_method(word))
        except LGSSLError as error:
            problems.append(str(error))
    if not words or len(set(methods)) != len(methods):
        problems.append("--trainers: give one or more methods, each once (a setting at its default changes nothing).")
    return methods


def _method(word: str) -> Method:
    from lgssl_nnunet.registry import find_trainer

    trainer, settings = parse_method(word)
    trainer_class = find_trainer(trainer)
    return Method(
        trainer,
        tuple(sorted(settings.items())),
        needs_unlabeled=bool(trainer_class.views),
        takes_partial_labels=trainer_class.supports_partial_labels,
        has_source=hasattr(trainer_class.hyperparameters, "source"),
    )


def _datasets(words: Sequence[int | str], problems: list[str]) -> list[RawDataset]:
    datasets = []
    for word in words:
        try:
            datasets.append(load_raw_dataset(word))
        except LGSSLError as error:
            problems.append(str(error))
    if not words or len({dataset.name for dataset in datasets}) != len(datasets):
        problems.append("-d: give one or more datasets, each once.")
    return datasets


def _problems_of_test_cases(dataset: RawDataset) -> list[str]:
    """Return why a dataset cannot be evaluated, or would be evaluated on its training cases."""
    remedy = "a benchmark needs test cases with references: move some labelled cases from imagesTr and labelsTr there"
    labels = dataset.folder / "labelsTs"
    if not dataset.test or not labels.is_dir():
        missing = "imagesTs" if not dataset.test else "labelsTs"
        return [f"{dataset.folder / missing} holds nothing; {remedy}."]
    ending = dataset.file_ending
    there = {file.name.removesuffix(ending) for file in labels.iterdir() if file.name.endswith(ending)}
    problems = []
    if without := sorted(set(dataset.test) - there):
        problems.append(
            f"{labels} lacks {first_of(without, _MOST_NAMED)}; add the references, or take the images out of imagesTs."
        )
    if surplus := sorted(there - set(dataset.test)):
        problems.append(
            f"{dataset.folder / 'imagesTs'} lacks {first_of(surplus, _MOST_NAMED)}, which labelsTs has; add the images."
        )
    if shared := sorted(set(dataset.test) & set(dataset.cases)):
        problems.append(
            f"{dataset.name}: {first_of(shared, _MOST_NAMED)} are in imagesTs and in training; remove one of the two."
        )
    return problems


def _problems_of_budgets(
    dataset: RawDataset, budgets: Sequence[int | None], seeds: Sequence[int], methods: Sequence[Method]
) -> list[str]:
    """Return what planning or training would refuse of the budgets, each once for all seeds."""
    problems: list[str] = []
    partial: set[str] = set()
    for budget in budgets:
        for seed in (0,) if budget is None else sorted({max(seed, 0) for seed in seeds}):
            try:
                drawn = dataset.with_labeled(choose_budget(dataset, labeled=budget, seed=seed).labeled)
                require_every_class(drawn)
            except LGSSLError as error:
                problems.append(str(error) if budget is None else f"seed {seed}: {error}")
                break
            partial |= partial_labels(drawn).keys()
    unfit = sorted({method.trainer for method in methods if not method.takes_partial_labels})
    if partial and unfit:
        problems.append(
            f"{dataset.name}: {first_of(sorted(partial), _MOST_NAMED)} annotate only some of the classes, which "
            f"{', '.join(unfit)} cannot learn from; leave out these trainers."
        )
    return problems
