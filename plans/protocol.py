"""Protocols: fixed lists of training, validation and test cases, published or made without the published leaks.

The lists are data, one file per dataset in `protocols/`, each with several protocols by name:

- `kind` (literature or clean), `title`, `source`, `order` (where the order of the lists comes from, or how it was
  drawn), `comparable` (which published numbers compare), `cautions` (leaks and other traps);
- `train` in published order, `validation`, `test`: case identifiers; `"test": "imagesTs"` with `num_test` stands for
  all cases of imagesTs, whose identifiers are not known here;
- `budgets`: numbers of labelled cases in publications; `labeled`: the published sets by number, where they are not the
  beginnings of one list;
- `patch_size` (x, y, z) and `batch_size` (labelled patches in a step) as published, null where there is no such number;
- `withdrawn`: listed cases that the official download lacks; `left_out`: unlisted cases that are never used. Both with
  the reason by identifier.

Validation and test cases are neither labelled nor unlabelled. Only the search for twins of training cases reads their
images; nothing opens their labels.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.files import read_json
from lgssl_nnunet.plans.cases import Case, RawDataset

logger = logging.getLogger(__name__)

PROTOCOLS_FOLDER = Path(__file__).parent / "protocols"
LITERATURE_CONFIGURATION = "3d_literature"
"""In the plans of a protocol: 3d_fullres with the published patch size, on the same preprocessed cases."""
MAX_SHOWN = 5


@dataclass(frozen=True)
class Protocol:
    """One protocol as its data file has it; the module's text explains the entries.

    Attributes:
        name: what `--protocol` takes.
        dataset: title of the dataset.
        conversion: name of the dataset for `lgssl_convert_dataset`.
        kind: "literature" or "clean".
        title: the lists in a few words.
        source: publications that the lists come from.
        order: where the order of the lists comes from, or how it was drawn.
        train: training cases; budgets label the first ones.
        validation: validation cases.
        test: test cases; None stands for all cases of imagesTs.
        num_test: number of test cases.
        budgets: published numbers of labelled cases.
        labeled: published labelled sets by number; empty if the beginnings of `train` are labelled.
        patch_size: published patch (x, y, z) in voxels.
        batch_size: published number of labelled patches in a step.
        withdrawn: reason by listed case that the official download lacks.
        left_out: reason by case that is not listed and never used.
        cautions: leaks and other traps.
        comparable: which published numbers compare with results under this protocol.
    """

    name: str
    dataset: str
    conversion: str
    kind: str
    title: str
    source: str
    order: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] | None
    num_test: int
    budgets: tuple[int, ...]
    labeled: Mapping[int, tuple[str, ...]]
    patch_size: tuple[int, ...] | None
    batch_size: int | None
    withdrawn: Mapping[str, str]
    left_out: Mapping[str, str]
    cautions: tuple[str, ...]
    comparable: str

    @property
    def held_out(self) -> tuple[str, ...]:
        """Listed cases that are not for training."""
        return (*self.validation, *(self.test or ()))

    def fits(self, dataset: RawDataset) -> bool:
        """Whether the dataset has a case of the lists."""
        return not {*self.train, *self.held_out}.isdisjoint(_present(dataset))


@dataclass(frozen=True)
class ProtocolCases:
    """What a protocol makes of a raw dataset.

    Attributes:
        protocol: the protocol.
        dataset: the dataset with the training cases of the protocol only; its `test` are those of the protocol.
        train: the training cases that there are, in the order of the protocol.
        validation: the validation cases that there are, sorted.
    """

    protocol: Protocol
    dataset: RawDataset
    train: tuple[str, ...]
    validation: tuple[str, ...]


def load_protocols() -> dict[str, Protocol]:
    """Return all protocols of the data files by name."""
    protocols = {}
    for file in sorted(PROTOCOLS_FOLDER.glob("*.json")):
        content = read_json(file)
        for name, entry in content["protocols"].items():
            protocols[name] = _read_protocol(name, content["dataset"], content["conversion"], entry)
    return protocols


def find_protocol(name: str) -> Protocol:
    """Return the protocol of this name.

    Raises:
        UsageError: there is none; the message names the nearest and lists all.
    """
    protocols = load_protocols()
    if name in protocols:
        return protocols[name]
    near = difflib.get_close_matches(name, protocols, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UsageError(f"--protocol {name}: there is no such protocol{hint} There are: {', '.join(protocols)}.")


def apply_protocol(protocol: Protocol, dataset: RawDataset) -> ProtocolCases:
    """Sort the cases of a dataset as a protocol asks, and say what is left out and what to beware of.

    Training cases keep their labels, unlisted cases of imagesUn stay unlabelled, all other cases are left out.

    Raises:
        UsageError: the protocol is one of another dataset.
        DatasetError: listed cases are missing, or imagesTs does not hold the test cases.
    """
    if not protocol.fits(dataset):
        _refuse_other_dataset(protocol, dataset)
    test = _test_cases(protocol, dataset)
    _require_listed_cases(protocol, dataset)
    train = tuple(name for name in protocol.train if name in dataset.cases)
    validation = tuple(sorted(set(protocol.validation) & _present(dataset)))
    barred = {*validation, *test, *protocol.left_out}
    extra = {name for name, case in dataset.unlabeled.items() if _in_images_un(case, dataset)} - barred - {*train}
    kept = {*train, *extra}
    used = replace(
        dataset,
        labeled={name: case for name, case in dataset.labeled.items() if name in kept},
        unlabeled={name: case for name, case in dataset.unlabeled.items() if name in kept},
        test=test,
    )
    _report(protocol, len(extra))
    _report_left_out(protocol, dataset, {*kept, *barred})
    return ProtocolCases(protocol, used, train, validation)


def shorten(names: Sequence[str]) -> str:
    """Return the names as one text, those after the fifth as a number."""
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _read_protocol(name: str, dataset: str, conversion: str, entry: Mapping[str, Any]) -> Protocol:
    test = None if entry["test"] == "imagesTs" else tuple(entry["test"])
    return Protocol(
        name=name,
        dataset=dataset,
        conversion=conversion,
        kind=entry["kind"],
        title=entry["title"],
        source=entry["source"],
        order=entry["order"],
        train=tuple(entry["train"]),
        validation=tuple(entry["validation"]),
        test=test,
        num_test=entry["num_test"] if test is None else len(test),
        budgets=tuple(entry["budgets"]),
        labeled={int(number): tuple(cases) for number, cases in entry.get("labeled", {}).items()},
        patch_size=None if entry["patch_size"] is None else tuple(entry["patch_size"]),
        batch_size=entry["batch_size"],
        withdrawn=dict(entry.get("withdrawn", {})),
        left_out=dict(entry.get("left_out", {})),
        cautions=tuple(entry["cautions"]),
        comparable=entry["comparable"],
    )


def _present(dataset: RawDataset) -> set[str]:
    return {*dataset.labeled, *dataset.unlabeled, *dataset.test}


def _in_images_un(case: Case, dataset: RawDataset) -> bool:
    return case.images[0].parent == dataset.folder / "imagesUn"


def _refuse_other_dataset(protocol: Protocol, dataset: RawDataset) -> None:
    fitting = [name for name, other in load_protocols().items() if other.fits(dataset)]
    fit = f"these fit it: {', '.join(fitting)}" if fitting else "no protocol fits it: leave --protocol out"
    raise UsageError(
        f"--protocol {protocol.name} is one of {protocol.dataset}, and {dataset.name} has none of its cases; {fit}."
    )


def _test_cases(protocol: Protocol, dataset: RawDataset) -> tuple[str, ...]:
    """Return the test cases that there are.

    Raises:
        DatasetError: they are all of imagesTs, and these are too few, too many or also training cases.
    """
    if protocol.test is not None:
        return tuple(sorted(set(protocol.test) & _present(dataset)))
    if len(dataset.test) != protocol.num_test:
        raise DatasetError(
            f"{dataset.folder / 'imagesTs'}: {protocol.name} tests on the {protocol.num_test} cases of this folder and "
            f"it holds {len(dataset.test)}; convert the complete download with lgssl_convert_dataset "
            f"{protocol.conversion}."
        )
    twice = [name for name in dataset.test if name in protocol.train]
    if twice:
        raise DatasetError(
            f"{dataset.folder / 'imagesTs'}: {shorten(twice)} would be test and training case of {protocol.name}; "
            "remove what does not belong there."
        )
    return dataset.test


def _require_listed_cases(protocol: Protocol, dataset: RawDataset) -> None:
    present = _present(dataset)
    absent = [name for name in protocol.train if name not in dataset.cases]  # imagesTs is never trained on
    absent += [name for name in protocol.held_out if name not in present]
    missing = [name for name in absent if name not in protocol.withdrawn]
    if missing:
        raise DatasetError(
            f"{dataset.name} lacks {len(missing)} of the cases of {protocol.name}: {shorten(missing)}; convert the "
            f"complete download with lgssl_convert_dataset {protocol.conversion}."
        )
    for name in absent:
        logger.warning("%s: %s is not there and is skipped (%s).", protocol.name, name, protocol.withdrawn[name])


def _report(protocol: Protocol, num_extra: int) -> None:
    logger.info("Protocol %s: %s. %s", protocol.name, protocol.title, protocol.source)
    logger.info("Published numbers: %s", protocol.comparable)
    for caution in protocol.cautions:
        logger.warning("%s: %s.", protocol.name, caution)
    if num_extra:
        logger.info(
            "%d cases of imagesUn are not of %s and stay unlabelled; published results did not have them.",
            num_extra,
            protocol.name,
        )


def _report_left_out(protocol: Protocol, dataset: RawDataset, known: set[str]) -> None:
    for name, reason in protocol.left_out.items():
        if name in _present(dataset):
            logger.info("%s leaves out %s: %s.", protocol.name, name, reason)
    others = sorted(_present(dataset) - known)
    if others:
        logger.info("%s does not mention %d cases, left out: %s.", protocol.name, len(others), shorten(others))
