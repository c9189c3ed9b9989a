"""`lgssl_prompts`: the prompt of every class, where its embedding comes from, and how alike the classes are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, add_prompt_arguments, command_parser, run_command
from lgssl_nnunet.text.similarity import SIMILAR

_DESCRIPTION = """\
Show the prompt of every class, where its embedding comes from, and how alike the classes are to the text encoder.

Reads dataset.json of a raw dataset, planned or not; writes nothing but the plot."""

_EXAMPLES = """\
examples:
  lgssl_prompts -d 501
  lgssl_prompts -d 501 --prompts prompts.json -o cosines.png
  lgssl_prompts -d 501 --text_encoder biomedclip --ensemble_prompts

exit status: 0 done, also with classes that are hardly told apart, 2 a class without a usable prompt or embedding"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = command_parser("lgssl_prompts", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset id or name, such as 501 (required)")
    add_prompt_arguments(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        default=SIMILAR,
        metavar="COSINE",
        help="warn of classes whose vectors have a larger cosine; the default fits the shipped bank, where left and "
        "right lie above it (default: %(default)s)",
    )
    parser.add_argument("-o", metavar="FILE", help="draw the cosines into this PNG file (default: no plot)")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments), arguments, use_folders=False)


def _run(arguments: argparse.Namespace) -> None:
    from lgssl_nnunet.plans.prompt_overview import format_overview, prompts

    overview = prompts(
        arguments.d,
        prompts=arguments.prompts,
        text_encoder=arguments.text_encoder,
        ensemble_prompts=arguments.ensemble_prompts,
        threshold=arguments.threshold,
        output=arguments.o,
    )
    print(format_overview(overview))
    if arguments.o:
        print(f"\nWritten: {arguments.o}")
