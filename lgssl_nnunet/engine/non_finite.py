"""Steps whose loss or gradient is not finite: they are left out, counted, and end the run if they do not stop."""

from __future__ import annotations

import logging
import math

from lgssl_nnunet.errors import TrainingError

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 5


class NonFiniteError(TrainingError):
    """Something that a step needs is not finite; raised before the optimiser's step.

    Args:
        what: what is not finite, as it stands in a sentence ("the loss term 'agreement'").
        value: its value.
        scale: by which the loss was multiplied for gradients in float16, 1 without a gradient scaler. Above 1 the scale
            itself can be the reason, and the scaler lowers it.
    """

    def __init__(self, what: str, value: float, scale: float = 1.0) -> None:
        super().__init__(f"{what} became {value}")
        self.scale = scale

    @classmethod
    def elsewhere(cls) -> NonFiniteError:
        """Return what a process raises that has nothing to complain of itself."""
        return cls("a loss term of another process", math.nan)


class NonFiniteGuard:
    """Counts the steps that were left out.

    Those that a gradient scaler leaves out on the way to the scale that fits do not count: they are no defect, and they
    end by themselves, because the scale falls until it fits or is 1.

    Attributes:
        skipped: in the whole run.
        in_a_row: since the last step that was done.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0

    def done(self) -> None:
        """Take note of a step that was done."""
        self.in_a_row = 0

    def skip(self, error: NonFiniteError, iteration: int) -> None:
        """Count a step that was left out, and say why.

        Raises:
            TrainingError: it is the fifth in a row.
        """
        if error.scale > 1:
            logger.info("Iteration %d is left out: gradients overflow at scale %g.", iteration, error.scale)
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise TrainingError(
                f"{MOST_IN_A_ROW} steps in a row could not be done, the last of them at iteration {iteration}, because "
                f"{error}: training stops, and the checkpoints are those from before. Look for images with extreme "
                "values, or train with a smaller learning rate."
            ) from error
        logger.warning("Iteration %d is skipped: %s (%d skipped so far).", iteration, error, self.skipped)

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
