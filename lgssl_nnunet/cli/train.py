"""`lgssl_train`: trains a model."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, choose_device, command_parser, run_command, split_settings
from lgssl_nnunet.errors import TrainingStopped, UsageError

logger = logging.getLogger(__name__)

DEFAULT_TRAINER = "LGSSLTrainer"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: nnUNetv2_train's flags, and ours."""
    parser = command_parser(
        "lgssl_train",
        "Train a model on the labelled and unlabelled cases of a planned dataset.",
        "example:\n  lgssl_train 501 3d_fullres LGSSLTrainer\n  lgssl_train 501 3d_fullres 0 -tr SupervisedTrainer",
    )
    parser.add_argument("dataset_name_or_id", help="dataset id or name, for example 501")
    parser.add_argument("configuration", help="2d, 3d_fullres or 3d_lowres; with some protocols 3d_literature")
    parser.add_argument(
        "trainer_or_fold",
        nargs="?",
        default=None,
        help=f"trainer class (default {DEFAULT_TRAINER}; lgssl_info lists them), or, as in nnUNetv2_train, the fold",
    )
    parser.add_argument("-tr", default=None, help="trainer class, if the third word is a fold")
    parser.add_argument("-f", default=None, help="fold: all (default, every labelled case trains) or 0 to 4")
    parser.add_argument("-p", default=None, help="plans name (default: the newest that lgssl_plan_and_preprocess made)")
    ours = parser.add_argument_group(
        "options that become part of the model folder's name when they differ from the plans"
    )
    ours.add_argument("--epochs", type=int, default=None, help="number of epochs (default: as planned)")
    ours.add_argument("--iterations_per_epoch", type=int, default=None, help="steps per epoch (default: as planned)")
    ours.add_argument(
        "--unlabeled_batch_size", type=int, default=None, help="unlabelled patches per step (default: as labelled ones)"
    )
    ours.add_argument("--seed", type=int, default=None, help="training seed (default 0)")
    ours.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hyper-parameter of the method, listed in docs/trainers.md; may be repeated: --set dropout=0.2 --set ...",
    )
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="take -pretrained_weights also from a file that holds more than tensors and numbers, and run what it asks "
        "for: only if you trust its source like a program's",
    )
    parser.add_argument("-pretrained_weights", default=None, help="checkpoint file whose weights start the training")
    parser.add_argument(
        "-num_gpus",
        type=int,
        default=1,
        help="number of GPUs of this machine, or with -device cpu of processes (default 1)",
    )
    parser.add_argument("--npz", action="store_true", help="save the final validation's probabilities as .npz")
    parser.add_argument("--c", action="store_true", help="continue from the newest checkpoint of this run")
    parser.add_argument("--val", action="store_true", help="only run the final validation of a finished training")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best.pth instead of the final one")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    parser.add_argument("-device", default=None, help="cpu, cuda, cuda:1 or mps (default: chosen and printed)")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same weights to the bit when the run is repeated on this machine with as many threads",
    )
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar")
    add_common_arguments(parser)
    return parser


def understand_words(trainer_or_fold: str | None, trainer: str | None, fold: str | None) -> tuple[str, str]:
    """Return trainer and fold from the third word, `-tr` and `-f`.

    Raises:
        UsageError: the same thing was said twice and differently.
    """
    is_fold = trainer_or_fold is not None and (trainer_or_fold == "all" or trainer_or_fold.lstrip("-").isdigit())
    words = {
        "fold": (trainer_or_fold if is_fold else None, fold),
        "trainer": (None if is_fold else trainer_or_fold, trainer),
    }
    chosen = {}
    for name, given in words.items():
        values = {value for value in given if value is not None}
        if len(values) > 1:
            raise UsageError(f"Two different {name}s were given, {given[0]} and {given[1]}: leave one out.")
        chosen[name] = values.pop() if values else None
    return chosen["trainer"] or DEFAULT_TRAINER, chosen["fold"] or "all"


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Return name to value from `--set name=value` words.

    Raises:
        UsageError: a word without "=".
    """
    return split_settings(settings, "--set takes name=value")


def _run(args: argparse.Namespace) -> None:
    trainer, fold = understand_words(args.trainer_or_fold, args.tr, args.f)
    logger.info(
        "Understood: dataset %s, configuration %s, trainer %s, fold %s",
        args.dataset_name_or_id,
        args.configuration,
        trainer,
        fold,
    )
    from lgssl_nnunet.training import train

    folder = train(
        args.dataset_name_or_id,
        args.configuration,
        trainer,
        fold=fold,
        plans=args.p,
        epochs=args.epochs,
        iterations_per_epoch=args.iterations_per_epoch,
        unlabeled_batch_size=args.unlabeled_batch_size,
        seed=args.seed,
        deterministic=args.deterministic,
        hyperparameters=parse_settings(args.set),
        pretrained_weights=args.pretrained_weights,
        trust_checkpoint=args.trust_checkpoint,
        continue_training=args.c,
        only_validate=args.val,
        validate_best=args.val_best,
        export_probabilities=args.npz,
        disable_checkpointing=args.disable_checkpointing,
        num_gpus=args.num_gpus,
        # The processes that -num_gpus starts choose theirs, and their numbers of threads.
        device=choose_device(args.device) if args.num_gpus == 1 else args.device,
        progress=False if args.no_pbar else None,
    )
    print(f"Model: {folder}")


def _run_or_stop(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Train, and if the training is stopped, say how it goes on."""
    try:
        _run(args)
    except TrainingStopped as stopped:
        logger.warning("%s", stopped)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            logger.warning("To go on: the same torchrun command%s", "" if args.c else " with --c")
        elif not args.disable_checkpointing:
            logger.warning("To go on: lgssl_train %s", shlex.join([*words, *([] if args.c else ["--c"])]))
        return stopped.exit_code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    return run_command(lambda: _run_or_stop(args, words), args)


if __name__ == "__main__":
    sys.exit(main())
