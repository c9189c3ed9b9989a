"""`lgssl_report`: one HTML file that shows a model or predictions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, add_processes_argument, command_parser, run_command
from lgssl_nnunet.errors import install_extra

_EXAMPLES = f"""\
examples:
  lgssl_report segmentations
  lgssl_report segmentations -ref labelsTs -i imagesTs -o report.html --num_cases 10
  lgssl_report nnUNet_results/Dataset501_Liver/LGSSLTrainer__LGSSLPlans__3d_fullres

The file opens in any browser, without a network: training curves, metrics per class and case, slices of the worst and
the best cases, and a 3D viewer if NiiVue is there ({install_extra("viewer")}).
exit status: 0 done, 2 missing or unusable folders and files (all are named)
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = command_parser("lgssl_report", "Write one HTML file that shows a model or predictions.", _EXAMPLES)
    parser.add_argument(
        "source",
        metavar="MODEL_OR_PREDICTIONS",
        help="a model folder (Trainer__Plans__configuration: curves, and its cross-validation if there is one) or a "
        "folder of predictions",
    )
    parser.add_argument(
        "-ref",
        "--reference",
        metavar="FOLDER",
        help="folder of references (default: labelsTs or labelsTr of the dataset in nnUNet_raw)",
    )
    parser.add_argument(
        "-i",
        metavar="FOLDER",
        help="folder of images (default: where lgssl_predict read them, else imagesTs, imagesTr or imagesUn)",
    )
    parser.add_argument(
        "-o",
        metavar="FILE",
        help="the report (default: lgssl_report.html in the folder given, of a group lgssl_report_NAME.html)",
    )
    parser.add_argument("-m", metavar="MODEL_FOLDER", help="the model behind predictions, where no record names it")
    parser.add_argument("-djfile", metavar="FILE", help="dataset.json (default: the one beside predictions or model)")
    parser.add_argument(
        "--group",
        metavar="NAME",
        help="report the cases of this group of dataset.json, such as one of several merged datasets, by the classes "
        "that it annotates (default: all cases)",
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="show these cases instead of the worst and best")
    parser.add_argument(
        "--num_cases",
        type=int,
        default=6,
        metavar="N",
        help="cases to show, half worst, half best (%(default)s)",
    )
    parser.add_argument(
        "--niivue",
        metavar="FILE",
        help="NiiVue's script, dist/niivue.umd.js of npm's @niivue/niivue (default: the one of the package ipyniivue)",
    )
    add_processes_argument(parser, "worker processes for the metrics")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments), arguments, use_folders=False)


def _run(arguments: argparse.Namespace) -> None:
    from lgssl_nnunet.evaluation.report.report import report

    report(
        arguments.source,
        reference=arguments.reference,
        images=arguments.i,
        cases=arguments.cases,
        num_cases=arguments.num_cases,
        output=arguments.o,
        model_folder=arguments.m,
        dataset_json=arguments.djfile,
        group=arguments.group,
        niivue=arguments.niivue,
        num_processes=arguments.np,
    )
