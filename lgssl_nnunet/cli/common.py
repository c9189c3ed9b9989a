"""What every command shares: console logging, error messages without tracebacks, folder flags, the device."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lgssl_nnunet.console import start_console_logging
from lgssl_nnunet.errors import LGSSLError, UsageError
from lgssl_nnunet.paths import use_data_folders
from lgssl_nnunet.signals import INTERRUPTED

if TYPE_CHECKING:
    import torch

_SYSTEM_REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and run the command again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "give a folder that you may write to, or its permissions"
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n) or use fewer processes"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or the network drive and run the command again"),
}
"""What a user can do about an error of the operating system that has nothing to do with this program."""

_FOLDER_FLAGS = {"raw": "nnUNet_raw", "preprocessed": "nnUNet_preprocessed", "results": "nnUNet_results"}


def command_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser whose description and examples keep their line breaks."""
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_common_arguments(parser: argparse.ArgumentParser, *, folders: bool = True) -> None:
    """Add `--debug` and, unless `folders` is False, `--raw`, `--preprocessed` and `--results`."""
    group = parser.add_argument_group("common to all commands")
    if folders:
        for flag, variable in _FOLDER_FLAGS.items():
            group.add_argument(
                f"--{flag}",
                metavar="FOLDER",
                help=f"use this folder instead of the one in the environment variable {variable}",
            )
    group.add_argument("--debug", action="store_true", help="show debug messages, and the traceback of an error")


def add_prompt_arguments(group: argparse._ActionsContainer) -> None:
    """Add what decides the prompts: `--prompts`, `--text_encoder` and `--ensemble_prompts`."""
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON file with a prompt, or a list of them, by class name (default: from dataset.json)",
    )
    group.add_argument(
        "--text_encoder",
        default="bank",
        metavar="ENCODER",
        help="what embeds the prompts: bank (shipped), minilm, file:BANK.npz, hf:FOLDER, biomedclip, hf-hub:ORG/NAME, "
        "local-dir:FOLDER or MODEL/PRETRAINED of open_clip; nothing is downloaded (default: bank)",
    )
    group.add_argument(
        "--ensemble_prompts",
        action="store_true",
        help="average every phrase over all templates of the modality (default: the first template)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what chooses a trained model: nnU-Net's `-d -p -tr -c -f`, or `-m`; and return the group."""
    group = parser.add_argument_group("which model")
    group.add_argument("-d", metavar="DATASET", help="id or name of the dataset, 501 or Dataset501_Liver")
    group.add_argument("-p", metavar="PLANS", help="plans identifier, for example LGSSLPlans_labeled8")
    group.add_argument("-tr", metavar="TRAINER", help="trainer, for example LGSSLTrainer")
    group.add_argument("-c", metavar="CONFIGURATION", help="configuration, for example 3d_fullres")
    group.add_argument(
        "-f",
        nargs="+",
        metavar="FOLD",
        help="folds, whose predictions are averaged: numbers or all; default: every finished fold, or all alone",
    )
    group.add_argument(
        "-m",
        metavar="MODEL",
        help="folder with plans.json and fold_*, or a bundle of lgssl_export_model, instead of -d -p -tr -c",
    )
    group.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="read a checkpoint that holds more than tensors and numbers, and run what it asks for: only if you trust "
        "its source like a program's",
    )
    return group


def add_processes_argument(parser: argparse.ArgumentParser, what: str = "worker processes") -> None:
    """Add `-np`, a number of processes that is at most 8 and at most one per core by default."""
    parser.add_argument(
        "-np",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help=f"{what}; 0: none (default: %(default)s)",
    )


def split_settings(words: Sequence[str], usage: str) -> dict[str, str]:
    """Return name to value from NAME=VALUE words.

    Args:
        words: what the user gave; a value may hold further "=".
        usage: which flag takes what, for the message.

    Raises:
        UsageError: words without "=".
    """
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise UsageError(f"{usage}, not {', '.join(wrong)}.")
    return dict(word.split("=", 1) for word in words)


def apply_common_arguments(arguments: argparse.Namespace) -> None:
    """Put the folder flags into nnU-Net's environment variables (a flag wins); has no other effect.

    Some nnU-Net modules copy these variables when they are imported, so this comes before any such import.
    """
    for flag, variable in _FOLDER_FLAGS.items():
        folder = getattr(arguments, flag, None)
        if folder:
            os.environ[variable] = str(Path(folder).expanduser().resolve())


def run_command(
    function: Callable[[], int | None],
    arguments: argparse.Namespace | None = None,
    *,
    use_folders: bool = True,
) -> int:
    """Run one command and return its exit status.

    Args:
        function: the work of the command; what it returns is the exit status, None means 0.
        arguments: the parsed arguments, for `--debug` and the folder flags.
        use_folders: set folder variables that are unset to folders under the current directory, and say so.

    Returns:
        0 for success, the error's `exit_code` for an error that the user can act on (its message goes to stderr,
        without a traceback unless `--debug`), 1 where the system refuses (a full disk, no permission), 130 when
        interrupted. Other exceptions are bugs and pass through.
    """
    debug = bool(getattr(arguments, "debug", False))
    start_console_logging(logging.DEBUG if debug else logging.INFO)
    try:
        if arguments is not None:
            apply_common_arguments(arguments)
        if use_folders:
            use_data_folders()
        return function() or 0
    except (LGSSLError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _SYSTEM_REFUSALS:
            raise
        if debug:
            logging.getLogger(__name__).debug("The error was raised here:", exc_info=True)
        print(f"{Path(sys.argv[0]).stem}: error: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    finally:
        logging.getLogger("lgssl_nnunet").propagate = True


def _sentence(error: LGSSLError | OSError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{error.strerror}; {_SYSTEM_REFUSALS[error.errno]}."


def choose_device(name: str | None) -> torch.device:
    """Return the device named by `-device`, or the best one there is, and give torch its threads.

    Imports torch when called. As in nnU-Net's commands, torch may use every core on a CPU, unless OMP_NUM_THREADS says
    otherwise, and one host thread on a GPU, where worker processes do the rest.
    """
    import torch

    from lgssl_nnunet.inference.device import choose_device as choose

    device = choose(name)
    if device.type != "cpu":
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    return device
