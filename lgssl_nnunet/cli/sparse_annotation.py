"""`lgssl_sparse_annotation`: keep two orthogonal slices per labelled case and propagate their labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, add_processes_argument, command_parser, run_command

_DESCRIPTION = """\
Keep two orthogonal slices of every label and propagate them through the image, for DeSCOTrainer.

Works on planned and preprocessed 3D configurations and writes plans named PLANS_orthogonal. Running the command again
propagates only what is missing or has changed."""

_EXAMPLES = """\
examples:
  lgssl_sparse_annotation -d 501
  lgssl_sparse_annotation -d 501 -p LGSSLPlans_labeled8 --slices annotated.json
  lgssl_train 501 3d_fullres DeSCOTrainer -p LGSSLPlans_labeled8_orthogonal

annotated.json: {"case_01": {"z": 40, "y": 112}, ...}, slices of the image file counted from 0
exit status: 0 done, 2 plans, labels or slices that cannot be used (all are named)"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = command_parser("lgssl_sparse_annotation", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name, such as 501 (required)")
    parser.add_argument("-p", metavar="PLANS", help="plans name (default: the newest plans of the dataset)")
    parser.add_argument(
        "-c",
        nargs="+",
        default=["3d_fullres"],
        metavar="CONFIGURATION",
        help="3D configurations; the new plans have no other (default: 3d_fullres)",
    )
    parser.add_argument(
        "--slices",
        metavar="FILE",
        help="JSON file with two slices per labelled case (default: the middle slices along the first two axes)",
    )
    parser.add_argument(
        "--registration",
        default="simpleitk",
        metavar="NAME",
        help="simpleitk, or ants with the package antspyx (default: simpleitk)",
    )
    add_processes_argument(parser)
    parser.add_argument("--no_pbar", action="store_true", help="no progress bars, for log files (default: off)")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments), arguments)


def _run(arguments: argparse.Namespace) -> None:
    from lgssl_nnunet.plans.sparse_annotation import sparse_annotation

    file = sparse_annotation(
        arguments.d,
        plans=arguments.p,
        configurations=arguments.c,
        slices=arguments.slices,
        registration=arguments.registration,
        num_processes=arguments.np,
        progress=not arguments.no_pbar,
    )
    print(file)
