"""`lgssl_convert_dataset`: the download of a published dataset becomes a raw nnU-Net dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, command_parser, run_command

_DESCRIPTION = """\
Convert the download of a published dataset into a raw nnU-Net dataset. The layout of the download is recognised.

An interrupted conversion continues where it stopped when the command is run again."""

_EXAMPLES = """\
examples:
  lgssl_convert_dataset LA -i 2018_UTAH_MICCAI
  lgssl_convert_dataset BTCV -i RawData --link
  lgssl_convert_dataset LiTS -i LiTS --unlabeled more_liver_scans"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = command_parser("lgssl_convert_dataset", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("dataset", metavar="DATASET", help="LA, Pancreas, BTCV or LiTS")
    parser.add_argument("-i", required=True, metavar="DOWNLOAD", help="folder of the download (required)")
    parser.add_argument("-o", metavar="RAW_ROOT", help="folder for raw datasets (default: nnUNet_raw)")
    parser.add_argument(
        "-d", type=int, metavar="ID", help="id of the raw dataset (default: 501 LA, 502 Pancreas, 503 BTCV, 504 LiTS)"
    )
    parser.add_argument("--unlabeled", metavar="FOLDER", help="further images, which go into imagesUn (default: none)")
    parser.add_argument(
        "--link",
        action="store_true",
        help="link files of which no voxel changes, instead of copying them (default: off)",
    )
    parser.add_argument(
        "--keep_spacing",
        action="store_true",
        help="believe the headers of a layout that is known to have lost its spacing (default: off)",
    )
    parser.add_argument(
        "-np", type=int, metavar="PROCESSES", help="worker processes; 0 for none (default: 8, at most one per core)"
    )
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar, for log files (default: off)")
    add_common_arguments(parser, folders=False)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Hand the arguments to `convert_dataset` and print the folder of the raw dataset."""
    from lgssl_nnunet.dataset_conversion.datasets import convert_dataset

    folder = convert_dataset(
        arguments.dataset,
        arguments.i,
        output=arguments.o,
        dataset_id=arguments.d,
        unlabeled=arguments.unlabeled,
        link=arguments.link,
        keep_spacing=arguments.keep_spacing,
        num_processes=arguments.np,
        progress=not arguments.no_pbar,
    )
    print(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments), arguments, use_folders=False)


if __name__ == "__main__":
    raise SystemExit(main())
