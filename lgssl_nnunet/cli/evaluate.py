"""`lgssl_evaluate`: compare predicted segmentations with references."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgssl_nnunet.cli.common import add_common_arguments, add_processes_argument, command_parser, run_command
from lgssl_nnunet.errors import install_extra

_EXAMPLES = f"""\
examples:
  lgssl_evaluate labelsTs segmentations
  lgssl_evaluate labelsTs segmentations --report --tolerance 2 --lesion_classes tumour
  lgssl_evaluate labelsTs segmentations --group Dataset501_LeftAtrium
  lgssl_evaluate labelsTs segmentations -djfile dataset.json -pfile plans.json -o results/summary.json

Prints the metrics per class and writes nnU-Net's summary.json and, beside it, summary_per_case.csv (every metric of
every class and case) and summary_per_class.json (the means). Dice, Jaccard, volume similarity and lesions need nothing;
surface distances need {install_extra("evaluation")}.
exit status: 0 done, 2 missing or unusable files (all are named)
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: nnUNetv2_evaluate_folder's arguments."""
    parser = command_parser(
        "lgssl_evaluate",
        "Compare predicted segmentations with references: overlap, surface distances, lesions.",
        _EXAMPLES,
    )
    parser.add_argument("reference", help="folder with the reference segmentations")
    parser.add_argument("prediction", help="folder with the predicted segmentations, under the same file names")
    parser.add_argument(
        "-djfile", metavar="FILE", help="dataset.json (default: the one that lgssl_predict left with the predictions)"
    )
    parser.add_argument(
        "-pfile", metavar="FILE", help="plans.json (default: the one that lgssl_predict left with the predictions)"
    )
    parser.add_argument("-o", metavar="FILE", help="the summary, ending in .json (default: PREDICTION/summary.json)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="MM",
        help="distance in mm up to which surfaces count as equal in the surface Dice (default: %(default)s)",
    )
    parser.add_argument(
        "--lesion_classes",
        nargs="*",
        metavar="NAME",
        help="classes of dataset.json whose lesions are counted one by one; without a name: none (default: those whose "
        "name says tumour, lesion, metastasis, cancer, carcinoma, nodule, cyst ...)",
    )
    parser.add_argument(
        "--group",
        metavar="NAME",
        help="evaluate the cases of this group of dataset.json, such as one of several merged datasets, by the classes "
        "that it annotates; the summary is then summary_NAME.json (default: all cases)",
    )
    parser.add_argument(
        "--no_surface_metrics",
        action="store_true",
        help="leave out the surface distances, which take most of the time (about 13 s for a liver in 512x512x200)",
    )
    add_processes_argument(parser)
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write lgssl_report.html (of a group lgssl_report_NAME.html) beside the summary; see lgssl_report",
    )
    parser.add_argument(
        "--chill", action="store_true", help="evaluate the cases that are there when predictions are missing"
    )
    add_common_arguments(parser, folders=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments, sys.argv[1:] if argv is None else argv), arguments, use_folders=False)


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    from lgssl_nnunet.evaluation.evaluate import evaluate
    from lgssl_nnunet.evaluation.tables import class_table

    results = evaluate(
        arguments.reference,
        arguments.prediction,
        dataset_json=arguments.djfile,
        plans=arguments.pfile,
        output=arguments.o,
        tolerance=arguments.tolerance,
        lesion_classes=arguments.lesion_classes,
        group=arguments.group,
        surface_metrics=not arguments.no_surface_metrics,
        num_processes=arguments.np,
        chill=arguments.chill,
    )
    print(class_table(results["classes"], results["tolerance"]))
    written = [results[file] for file in ("summary_file", "cases_file", "classes_file")]
    if arguments.report:
        written.append(_write_report(arguments, argv, results))
    print(f"\nWritten: {', '.join(map(str, written))}")


def _write_report(arguments: argparse.Namespace, argv: Sequence[str], results: dict[str, Any]) -> Path:
    from lgssl_nnunet.evaluation.part import name_for_group
    from lgssl_nnunet.evaluation.report.report import REPORT, report

    return report(
        arguments.prediction,
        reference=arguments.reference,
        dataset_json=arguments.djfile,
        output=results["summary_file"].with_name(name_for_group(REPORT, arguments.group)),
        group=arguments.group,
        results=results,
        command=["lgssl_evaluate", *argv],
        num_processes=arguments.np,
    )
