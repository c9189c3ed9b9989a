"""`lgssl_info`: versions, folders, trainers, trained models, prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, command_parser, run_command

_EXAMPLES = """\
examples:
  lgssl_info
  lgssl_info --json --device
  export nnUNet_extTrainer=$(lgssl_info --ext_trainer_path)   # now nnUNetv2_* commands know our trainers
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = command_parser(
        "lgssl_info", "Show versions, folders and where each comes from, trainers, trained models, prompts.", _EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--device", action="store_true", help="also name the device that would compute (imports torch)")
    parser.add_argument(
        "--ext_trainer_path", action="store_true", help="print only the folder for nnU-Net's variable nnUNet_extTrainer"
    )
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments), arguments, use_folders=False)


def _run(arguments: argparse.Namespace) -> None:
    from lgssl_nnunet.installation import ext_trainer_path, format_info, info

    if arguments.ext_trainer_path:
        print(ext_trainer_path())
        return
    found = info(device=arguments.device)
    print(json.dumps(found, indent=2) if arguments.json else format_info(found))
