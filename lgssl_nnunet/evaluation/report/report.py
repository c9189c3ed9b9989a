"""One self-contained page about a model or a folder of predictions: the function behind `lgssl_report`."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lgssl_nnunet.errors import DatasetError, UsageError, install_extra
from lgssl_nnunet.evaluation.evaluate import DEFAULT_WORKERS, evaluate
from lgssl_nnunet.evaluation.metrics import NOT_ANNOTATED, NOT_ANNOTATED_POLICY
from lgssl_nnunet.evaluation.part import name_for_group
from lgssl_nnunet.evaluation.report.curves import charts
from lgssl_nnunet.evaluation.report.facts import collect_facts, foreground_names, ignored_label
from lgssl_nnunet.evaluation.report.inputs import PREDICTION_RECORD, ReportCase, ReportInputs, find_inputs
from lgssl_nnunet.evaluation.report.overlays import color_indices, difference_map, draw_case
from lgssl_nnunet.evaluation.report.page import GENERATOR, CaseSection, Page, render
from lgssl_nnunet.evaluation.report.tables import rank_cases, worst_and_best
from lgssl_nnunet.evaluation.report.viewer import WITHOUT_VIEWER, ViewerCase, niivue_script, pack_case
from lgssl_nnunet.evaluation.report.volumes import SOFT_TISSUE, Volume, read_labels, read_volume, windowed
from lgssl_nnunet.files import link_file, write_atomically, write_json
from lgssl_nnunet.plans.cases import find_reader

logger = logging.getLogger(__name__)

REPORT = "lgssl_report.html"
VIEWER_CHARACTERS = 11_000_000
_MOST_NAMED = 20


def report(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    images: str | Path | None = None,
    cases: Sequence[str] | None = None,
    num_cases: int = 6,
    output: str | Path | None = None,
    model_folder: str | Path | None = None,
    dataset_json: str | Path | None = None,
    group: str | None = None,
    niivue: str | Path | None = None,
    results: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    num_processes: int = DEFAULT_WORKERS,
    progress: bool = True,
) -> Path:
    """Write one HTML file that shows curves, metrics, worst and best cases, and a viewer; it opens without a network.

    With worker processes a script needs the usual `if __name__ == "__main__":` around its code.

    Args:
        source: a model folder (its cross-validation is shown if there is one) or a folder of predictions.
        reference: folder of references; by default the one in the dataset's raw folder that fits most cases.
        images: folder of images; by default where prediction read them, or the raw folder that fits most cases.
        cases: the cases to show instead of the worst and the best.
        num_cases: how many cases to show, the worse half and the better half.
        output: the file; by default lgssl_report.html (of a group lgssl_report_GROUP.html) in `source`.
        model_folder: the model that made the predictions, if lgssl_predict's record does not lead to it.
        dataset_json: the dataset's description; by default the one in `source` or of the model.
        group: report the cases of one of the `groups` in dataset.json, by the classes that it annotates; None for all
            cases.
        niivue: a self-contained build of npm's @niivue/niivue; by default the script in the package ipyniivue.
        results: what `evaluate` returned for these cases; by default it is called.
        command: the command line that makes this report again; by default that of lgssl_report with these arguments.
        num_processes: worker processes for the metrics; 0 does the work in this process.
        progress: show bars (only on a terminal).

    Returns:
        The file that was written.

    Raises:
        DatasetError: folders or files are missing or do not fit.
        UsageError: cases without a prediction, a group that dataset.json does not have, predictions without any class
            that the references annotate, or an output that is no report and would be lost.
        MissingDependencyError: the file named in `niivue` is no NiiVue.
    """
    arguments = {"reference": reference, "images": images, "model_folder": model_folder, "dataset_json": dataset_json}
    folders = {name: Path(value).expanduser() if value else None for name, value in arguments.items()}
    source = Path(source).expanduser()
    inputs = find_inputs(source, **folders, group=group)
    file = Path(output).expanduser() if output else source / name_for_group(REPORT, group)
    _check(inputs, cases, num_cases, file)
    for damaged in inputs.damaged:
        logger.warning("%s is damaged and could not be read; copy it again or make it again.", damaged)
    script = niivue_script(Path(niivue).expanduser() if niivue else None)
    show_bars = progress and sys.stderr.isatty()
    if results is None and inputs.measured:
        results = _evaluate(inputs, num_processes, show_bars)
    shown = _shown_cases(inputs, cases, num_cases, results)
    sections = _draw_cases(inputs, shown, results, with_viewer=script is not None, progress=show_bars)
    page = Page(
        inputs=inputs,
        facts=collect_facts(inputs, command or _command(source, folders, group, cases, num_cases, output, niivue)),
        charts=charts(inputs.folds, foreground_names(inputs.dataset_json)),
        results=results,
        cases=sections,
        notes=_notes(inputs, results, script is None and bool(sections)),
        niivue=script,
    )
    write_atomically(file, lambda temporary: temporary.write_text(render(page), encoding="utf-8"))
    logger.info("The report is in %s (%.1f MB).", file, file.stat().st_size / 1e6)
    return file


def _check(inputs: ReportInputs, cases: Sequence[str] | None, num_cases: int, file: Path) -> None:
    if num_cases < 0:
        raise UsageError(f"--num_cases {num_cases}: it is a number of cases, 0 or more.")
    unknown = sorted(set(cases or ()) - {case.name for case in inputs.cases})
    if unknown:
        raise UsageError(
            f"--cases {' '.join(unknown)}: there is no such prediction in {inputs.source}; {_known_cases(inputs)}."
        )
    if file.is_dir() or file.suffix not in (".html", ".htm"):
        raise UsageError(f"-o {file}: the report is one file; give a name that ends in .html.")
    if not file.parent.is_dir():
        raise UsageError(f"-o {file}: the folder {file.parent} does not exist; create it or name another.")
    if file.is_file() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(f"-o {file} exists and is no report of lgssl_report; give another name.")


def _known_cases(inputs: ReportInputs) -> str:
    names = [case.name for case in inputs.cases]
    if not names:
        return "there is none at all, so leave --cases out"
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"choose among {', '.join(names[:_MOST_NAMED])}{more}"


def _evaluate(inputs: ReportInputs, num_processes: int, progress: bool) -> dict[str, Any]:
    """Evaluate the cases that have a reference, from links, so that nothing is written beside the predictions."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for case in inputs.measured:
            link_file(case.prediction, root / "prediction" / case.prediction.name)
            link_file(case.reference, root / "reference" / case.prediction.name)
        write_json(inputs.prediction_record, root / "prediction" / PREDICTION_RECORD)  # says which classes they hold
        try:
            return evaluate(
                root / "reference",
                root / "prediction",
                dataset_json=inputs.dataset_json,
                plans=inputs.plans,
                output=root / "summary.json",
                group=inputs.group,
                num_processes=num_processes,
                progress=progress,
            )
        except (DatasetError, UsageError) as error:
            message = str(error)
            for case in inputs.measured:
                message = message.replace(str(root / "prediction" / case.prediction.name), str(case.prediction))
                message = message.replace(str(root / "reference" / case.prediction.name), str(case.reference))
            raise type(error)(message.replace(str(root / "prediction"), str(inputs.source))) from error


def _shown_cases(
    inputs: ReportInputs, cases: Sequence[str] | None, num_cases: int, results: Mapping[str, Any] | None
) -> dict[str, str]:
    """Return why each case is shown, by case, in the order of the page."""
    if cases:
        return dict.fromkeys(cases, "chosen")
    if results is not None:
        return worst_and_best(rank_cases(results["cases"]), num_cases)
    return dict.fromkeys([case.name for case in inputs.cases[:num_cases]], "first in the alphabet")


def _draw_cases(
    inputs: ReportInputs,
    shown: Mapping[str, str],
    results: Mapping[str, Any] | None,
    *,
    with_viewer: bool,
    progress: bool,
) -> list[CaseSection]:
    by_name = {case.name: case for case in inputs.cases}
    sections = []
    for name, reason in tqdm(shown.items(), desc="Drawing cases", unit="case", disable=not progress):
        volumes = _Volumes(by_name[name], inputs)
        sections.append(
            CaseSection(
                name=name,
                reason=reason,
                results=[result for result in (results or {}).get("cases", ()) if result.case == name],
                pictures=draw_case(
                    volumes.image,
                    volumes.reference,
                    volumes.prediction,
                    volumes.maps,
                    volumes.ignored,
                ),
                viewer=volumes.packed(VIEWER_CHARACTERS // len(shown)) if with_viewer else None,
                remarks=volumes.remarks,
            )
        )
    return sections


class _Volumes:
    """The volumes of one case on the grid of its prediction; `remarks` says what is left out and why."""

    def __init__(self, case: ReportCase, inputs: ReportInputs) -> None:
        reader = find_reader(inputs.dataset_json, case.prediction)
        self.name = case.name
        self.ignored = ignored_label(inputs.dataset_json)
        self.remarks: list[str] = []
        self.prediction = read_labels(case.prediction, reader)
        self.reference = read_labels(case.reference, reader) if case.reference else None
        channels = inputs.dataset_json.get("channel_names", {})
        self.is_ct = str(channels.get("0", "")).lower() == "ct"
        self.image = self._background(case.image, reader, "image")
        maps = {name: self._background(file, reader, name) for name, file in case.selection_maps.items()}
        self.maps = {name: volume for name, volume in maps.items() if volume is not None}
        if self.image is not None and len(channels) > 1:
            self.remarks.append(f"The image is the first of {len(channels)} channels ({channels.get('0', '0')}).")

    def _background(self, file: Path | None, reader: type, kind: str) -> Volume | None:
        if file is None:
            if kind == "image":
                self.remarks.append("No image was found; the segmentations are shown on grey.")
            return None
        volume = read_volume(file, reader)
        if volume.voxels.shape != self.prediction.voxels.shape:
            self.remarks.append(f"The {kind} has another grid than the prediction and is not shown.")
            return None
        if kind == "image" and self.is_ct and volume.voxels.min() < SOFT_TISSUE[0]:  # else not in HU
            self.remarks.append("CT window: {:.0f} to {:.0f} HU.".format(*SOFT_TISSUE))
            return windowed(volume, SOFT_TISSUE)
        return windowed(volume)

    def packed(self, limit: int) -> ViewerCase:
        labels = {"prediction": color_indices(self.prediction)}
        if self.reference is not None:
            kinds = difference_map(self.reference.voxels, self.prediction.voxels, self.ignored)
            difference = replace(self.prediction, voxels=kinds)
            labels = {"reference": color_indices(self.reference), **labels, "difference": difference}
        return pack_case(self.name, self.image, labels, self.maps, limit)


def _notes(inputs: ReportInputs, results: Mapping[str, Any] | None, without_viewer: bool) -> list[str]:
    """Return sentences on what is missing from the page, so that nothing is dropped silently."""
    notes = []
    if inputs.group is not None:
        notes.append(f"This page is about the cases of the group {inputs.group} of dataset.json only.")
    if results is not None and inputs.written_classes:
        notes.append(
            f"The predictions hold {', '.join(inputs.written_classes)} only, so nothing else is measured. In the "
            "pictures the other classes of the reference count as a difference."
        )
    if results is not None and all(result.hd95 is None for result in results["cases"]):
        notes.append(f"Surface distances were not measured; they need {install_extra('evaluation')}.")
    partial = {result.case for result in (results or {}).get("cases", ()) if result.status == NOT_ANNOTATED}
    if partial:
        notes.append(
            f"{NOT_ANNOTATED_POLICY} This concerns {len(partial)} cases. In their pictures such a class may be missing "
            "from the reference, and what is predicted of it counts as a difference."
        )
    unmeasured = [case.name for case in inputs.cases if not case.reference]
    if not inputs.cases:
        notes.append(
            "This model has no cross-validation; to see metrics and cases, name a folder of its predictions instead."
        )
    elif not inputs.measured:
        notes.append("No references were found, so there are no metrics; name their folder with -ref.")
    elif unmeasured:
        notes.append(f"{len(unmeasured)} predictions have no reference and no metrics: {', '.join(unmeasured)}.")
    if inputs.without_prediction:
        missing = ", ".join(inputs.without_prediction)
        notes.append(f"{len(inputs.without_prediction)} references have no prediction and are not counted: {missing}.")
    if inputs.is_model and any(case.prediction.parent.parent.name == "fold_all" for case in inputs.cases):
        notes.append("The cases below were trained on (fold all), so their metrics say nothing about new scans.")
    if inputs.damaged:
        # By the last folder only, because reports are handed on.
        files = ", ".join(f"{file.parent.name}/{file.name}" for file in inputs.damaged)
        notes.append(f"Damaged, so it could not be read: {files}; copy it again, or make it again.")
    if without_viewer:
        notes.append(WITHOUT_VIEWER)
    return notes


def _command(
    source: Path,
    folders: Mapping[str, Path | None],
    group: str | None,
    cases: Sequence[str] | None,
    num_cases: int,
    output: str | Path | None,
    niivue: str | Path | None,
) -> list[str]:
    flags = {"reference": "-ref", "images": "-i", "model_folder": "-m", "dataset_json": "-djfile"}
    command = ["lgssl_report", str(source)]
    for name, folder in folders.items():
        command += [flags[name], str(folder)] if folder else []
    command += ["--group", group] if group is not None else []
    command += ["--cases", *cases] if cases else ["--num_cases", str(num_cases)]
    command += ["--niivue", str(niivue)] if niivue else []
    return command + (["-o", str(output)] if output else [])
