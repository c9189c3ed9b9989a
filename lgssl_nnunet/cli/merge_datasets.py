"""`lgssl_merge_datasets`: several raw datasets become one with the union of their classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, command_parser, run_command, split_settings

_DESCRIPTION = """\
Merge raw datasets into one with the union of their classes. dataset.json says which dataset annotates which class.

Classes of one structure become one: equal names, names that the shipped table of synonyms knows, and what --same says.
The classes are listed before anything is written. An interrupted merge continues when the command is run again."""

_EXAMPLES = """\
examples:
  lgssl_merge_datasets -d 501 502 503 -o 600 --dry_run
  lgssl_merge_datasets -d 501 502 503 -o Dataset600_Abdomen
  lgssl_merge_datasets -d 501 502 -o 600 --same "portal vein=PV" "spleen=501:label_2=milz" --keep_apart tumour
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = command_parser("lgssl_merge_datasets", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "-d", nargs="+", required=True, metavar="DATASET", help="ids or names of the raw datasets (required)"
    )
    parser.add_argument(
        "-o",
        required=True,
        metavar="OUTPUT",
        help="id or name of the merged dataset, 600 (Dataset600_Merged) or Dataset600_Abdomen (required)",
    )
    parser.add_argument(
        "--same",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=NAME",
        help="classes that are one structure; the first name is kept. DATASET:NAME means the class of one dataset "
        "(default: what names and the table of synonyms say)",
    )
    parser.add_argument(
        "--keep_apart",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="classes that are joined with no other, NAME or DATASET:NAME (default: none)",
    )
    parser.add_argument(
        "--channel_names",
        nargs="+",
        metavar="NAME",
        help='names of the channels, by which nnU-Net normalises, such as "CT or MRI" (default: those of the datasets)',
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy images and labels, for disks without links (default: link them)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list classes and problems, and write nothing (default: off)"
    )
    parser.add_argument(
        "-np",
        type=int,
        metavar="PROCESSES",
        help="worker processes that change label values; 0 for none (default: 8, at most one per core)",
    )
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar, for log files (default: off)")
    add_common_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Hand the arguments to `merge_datasets` and print the folder of the merged dataset."""
    from lgssl_nnunet.plans.merge import merge_datasets

    split_settings(arguments.same, "--same takes names of one structure, such as spleen=milz")
    folder = merge_datasets(
        arguments.d,
        arguments.o,
        same=[words.split("=") for words in arguments.same],
        keep_apart=arguments.keep_apart,
        channel_names=arguments.channel_names,
        copy=arguments.copy,
        dry_run=arguments.dry_run,
        num_processes=arguments.np,
        progress=not arguments.no_pbar,
    )
    print(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
