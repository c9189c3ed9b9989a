"""`lgssl_demo`: the whole pipeline on a made-up dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, command_parser, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = command_parser(
        "lgssl_demo",
        "Draw a small phantom dataset (6 labelled, 24 unlabelled, 8 test cases), then plan, train LGSSLTrainer and\n"
        "SupervisedTrainer, predict and evaluate. Takes a few minutes on two cores; needs no network and no GPU.",
        "example:\n  lgssl_demo\n  lgssl_demo -o somewhere_else --iterations 1000",
    )
    parser.add_argument(
        "-o", default="lgssl_demo", metavar="FOLDER", help="folder for everything that is written (default lgssl_demo)"
    )
    parser.add_argument("--iterations", type=int, default=None, help="steps of each trainer (default 320)")
    parser.add_argument("--seed", type=int, default=0, help="training seed of both trainers (default 0)")
    parser.add_argument("-device", default=None, help="cpu, cuda, cuda:1 or mps (default: chosen and printed)")
    parser.add_argument("--no_pbar", action="store_true", help="no progress bars")
    add_common_arguments(parser, folders=False)
    return parser


def _run(args: argparse.Namespace) -> None:
    from lgssl_nnunet.demonstration import ITERATIONS, demo

    iterations = ITERATIONS if args.iterations is None else args.iterations
    result = demo(args.o, iterations=iterations, seed=args.seed, device=args.device, progress=not args.no_pbar)
    print(f"\n{result.table()}\n\n{sum(result.seconds.values()):.0f} seconds, one seed, a made-up dataset.")
    print(f"Overlays: {result.overlays}\nEverything else: {result.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: _run(args), args, use_folders=False)
