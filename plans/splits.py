"""Which labelled cases belong to the budget.

A draw takes the first N cases of one permutation of the labelled cases. The permutation is the order of
`sha256("seed:case")`, so draws with one seed are nested (the 4 are among the 8), and a case that is added to the
dataset or removed from it does not reorder the others. A protocol draws nothing: its list, or its published sets, fix
the labelled cases.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lgssl_nnunet.errors import SplitError, UsageError
from lgssl_nnunet.plans.cases import RawDataset
from lgssl_nnunet.plans.partial_labels import missing_classes, partial_labels
from lgssl_nnunet.plans.protocol import Protocol, ProtocolCases, load_protocols, shorten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """The labelled cases that may be used, and how they were chosen.

    Attributes:
        labeled: identifiers, sorted.
        seed: seed of the draw; 0 if nothing was drawn.
        name: what the budget adds to the name of the plans, such as `_labeled8_s1`.
        description: the choice in words.
    """

    labeled: tuple[str, ...]
    seed: int
    name: str
    description: str


def permute(identifiers: Iterable[str], seed: int) -> list[str]:
    """Return the identifiers in the order of this seed."""
    return sorted(identifiers, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(), name))


def choose_budget(
    dataset: RawDataset, *, labeled: int | None = None, labeled_list: Path | str | None = None, seed: int = 0
) -> Budget:
    """Choose the labelled cases of a run.

    Args:
        dataset: the raw dataset.
        labeled: number of labelled cases to draw.
        labeled_list: text file with one identifier per line; lines starting with # are skipped.
        seed: seed of the draw.

    Raises:
        UsageError: both ways of choosing are given, or the list cannot be read.
        SplitError: more cases are asked for than are labelled, or a listed case is unknown or has no label.
    """
    if labeled is not None and labeled_list is not None:
        raise UsageError("--labeled and --labeled_list exclude each other; give one of them.")
    if labeled is not None:
        return _draw(dataset, labeled, seed)
    if seed:
        logger.warning("--seed %d draws nothing without --labeled; lgssl_train has a --seed of its own.", seed)
    if labeled_list is not None:
        return _listed(dataset, Path(labeled_list))
    return Budget(tuple(sorted(dataset.labeled)), 0, "", "all labelled cases")


def protocol_budget(cases: ProtocolCases, labeled: int | None = None) -> Budget:
    """Choose the labelled cases of a run under a protocol.

    Args:
        cases: the dataset's cases under the protocol.
        labeled: number of labelled cases; None for all training cases.

    Raises:
        SplitError: the protocol has no such number of labelled cases, or one of them has no label.
    """
    protocol = cases.protocol
    chosen = cases.train if labeled is None else _published_cases(cases, labeled)
    without = [name for name in chosen if name not in cases.dataset.labeled]
    if without:
        raise SplitError(
            f"{cases.dataset.name} has no label for {shorten(without)}, which {protocol.name} labels; add the files to "
            "labelsTr or choose a smaller --labeled."
        )
    if labeled is not None and protocol.kind == "literature" and labeled not in protocol.budgets:
        published = ", ".join(map(str, protocol.budgets)) or "not documented"
        logger.warning("--labeled %d: published numbers of labelled cases are %s.", labeled, published)
    number = "" if labeled is None else f"_labeled{labeled}"
    description = f"{len(chosen)} of the {len(cases.train)} training cases of {protocol.name}"
    return Budget(tuple(sorted(chosen)), 0, f"{number}_{protocol.name}", description)


def require_every_class(dataset: RawDataset) -> None:
    """Refuse a budget in which nothing teaches a class.

    Args:
        dataset: the raw dataset with the budget applied.

    Raises:
        SplitError: none of the labelled cases annotates some class.
    """
    partial = partial_labels(dataset)
    missing = missing_classes(dataset.dataset_json["labels"], partial, dataset.labeled)
    if missing:
        raise SplitError(
            f"{dataset.name}: none of the {len(dataset.labeled)} labelled cases of this budget annotates "
            f"{' and '.join(missing)}: choose another --seed, name cases that do with --labeled_list, or label more."
        )


def _published_cases(cases: ProtocolCases, number: int) -> tuple[str, ...]:
    """Return the published set of this size or, where sets are the beginnings of the list, its first cases."""
    protocol, available = cases.protocol, len(cases.train)
    if protocol.labeled:
        return _published_set(protocol, number)
    if number < 1:
        raise SplitError(f"--labeled {number}: at least one labelled case is needed.")
    if number > available:
        raise SplitError(
            f"--labeled {number}: {protocol.name} has only {available} training cases; ask for at most {available}."
        )
    return cases.train[:number]


def _published_set(protocol: Protocol, number: int) -> tuple[str, ...]:
    if number not in protocol.labeled:
        raise SplitError(
            f"--labeled {number}: the labelled sets of {protocol.name} are published for "
            f"{', '.join(map(str, protocol.labeled))} cases and not nested; give one of these numbers, or leave "
            "--labeled out to use all."
        )
    return protocol.labeled[number]


def _draw(dataset: RawDataset, number: int, seed: int) -> Budget:
    available = len(dataset.labeled)
    if number < 1:
        raise SplitError(f"--labeled {number}: at least one labelled case is needed.")
    if number > available:
        raise SplitError(
            f"--labeled {number}: {dataset.name} has only {available} labelled cases; "
            f"ask for at most {available} or add segmentations to labelsTr."
        )
    chosen = permute(dataset.labeled, seed)[:number]
    name = f"_labeled{number}" + (f"_s{seed}" if seed != 0 else "")
    return Budget(tuple(sorted(chosen)), seed, name, f"{number} of {available} labelled cases drawn with seed {seed}")


def _listed(dataset: RawDataset, path: Path) -> Budget:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labeled_list {path}: the file cannot be read ({error}); give a text file.") from None
    listed = {line.strip() for line in lines if line.strip() and not line.strip().startswith("#")}
    if not listed:
        raise SplitError(f"--labeled_list {path}: the file names no case; write one identifier per line.")
    unknown = sorted(listed.difference(dataset.cases))
    if unknown:
        raise SplitError(f"--labeled_list {path}: {dataset.name} has no case {', '.join(unknown)}; correct the list.")
    without = sorted(listed.difference(dataset.labeled))
    if without:
        raise SplitError(
            f"--labeled_list {path}: no label file for {', '.join(without)}; "
            "add it to labelsTr or take the case off the list."
        )
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", path.stem).strip("-") or "list"
    if re.fullmatch(r"labeled\d+(-s\d+)?", stem):
        raise UsageError(f"--labeled_list {path}: plans named {stem} are those of --labeled; rename the file.")
    if stem in load_protocols():
        raise UsageError(f"--labeled_list {path}: plans named {stem} are those of --protocol; rename the file.")
    return Budget(tuple(sorted(listed)), 0, f"_{stem}", f"{len(listed)} labelled cases listed in {path.name}")
