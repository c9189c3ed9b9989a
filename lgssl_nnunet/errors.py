"""Errors that a user can act on. Each message names the file, the problem and the remedy in one sentence."""


class LGSSLError(Exception):
    """Base class; commands print the message without a traceback and exit with `exit_code`."""

    exit_code = 2


class UsageError(LGSSLError):
    """The command was called with arguments that do not fit together or name something unknown."""


class DatasetError(LGSSLError):
    """A raw dataset, image or label cannot be used as it is."""


class SplitError(LGSSLError):
    """The requested labelled cases or fold do not exist."""


class PlansError(LGSSLError):
    """A plans file is missing, unreadable or does not fit the request."""


class PromptError(LGSSLError):
    """A class has no usable text prompt or no embedding can be made for it."""


class CheckpointError(LGSSLError):
    """A model folder or checkpoint is missing, unfinished or damaged."""


class MissingDependencyError(LGSSLError):
    """An optional package is needed; the message names the extra to install."""


class TrainingError(LGSSLError):
    """Training had to stop, for example because a loss term became non-finite."""

    exit_code = 1


class TrainingStopped(LGSSLError):  # noqa: N818 (not an error: somebody asked for it)
    """Training ended between two steps because a signal or a STOP file asked for it; it can be continued.

    Its exit code is EX_TEMPFAIL, which job schedulers take as "try again"; after a STOP file it is 0.
    """

    exit_code = 75


def install_extra(extra: str) -> str:
    """Return how an extra of this package is installed, for messages: it comes from a checkout and is on no index."""
    return f'pip install -c constraints.txt -e ".[{extra}]" in the checkout'
