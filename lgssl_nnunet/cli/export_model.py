"""`lgssl_export_model`: put a trained model into one file to hand on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, add_model_arguments, command_parser, run_command

_EXAMPLES = """\
examples:
  lgssl_export_model -d 501 -o liver.zip
  lgssl_export_model -d 501 -tr UAMTTrainer -f 0 1 2 3 4 -o liver.zip
  lgssl_export_model -d 501 -tr SupervisedTrainer -o liver_for_nnunet.zip --stock

The file is a bundle: weights as safetensors, plans.json, dataset.json, versions and checksums. It names no case, and
nothing in it can be run. lgssl_predict -m liver.zip segments with it on any machine. --stock writes a zip file for
nnUNetv2_install_pretrained_model_from_zip instead.
Without -d, -tr, -p, -c the model is chosen as lgssl_predict chooses it, and printed.
exit status: 0 done, 2 no such model, or a method that --stock cannot serve
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: nnUNetv2_export_model_to_zip's flags for one configuration, and -m of lgssl_predict."""
    parser = command_parser("lgssl_export_model", "Put a trained model into one file to hand on.", _EXAMPLES)
    parser.add_argument("-o", required=True, metavar="FILE", help="the file, for example liver.zip")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument(
        "--stock",
        action="store_true",
        help="write a zip file that nnU-Net installs and predicts with, without this package; for methods whose "
        "network is the plans' network alone, others are refused",
    )
    add_model_arguments(parser).add_argument(
        "-chk",
        nargs="+",
        default=["checkpoint_final.pth"],
        metavar="NAME",
        help="file names of the checkpoints that go along (default: checkpoint_final.pth)",
    )
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments), arguments)


def _run(arguments: argparse.Namespace) -> None:
    from lgssl_nnunet.inference.export_model import export_model

    export_model(
        arguments.o,
        dataset=arguments.d,
        configuration=arguments.c,
        folds=arguments.f,
        plans=arguments.p,
        trainer=arguments.tr,
        checkpoints=arguments.chk,
        model_folder=arguments.m,
        stock=arguments.stock,
        overwrite=arguments.overwrite,
        trust_checkpoint=arguments.trust_checkpoint,
    )
