"""The errors of saq_fx: each message names what was at fault (layer, operator, shape, pattern) and what to do."""


class SaqError(Exception):
    """Base of every error that saq_fx raises on purpose."""


class PrecisionError(SaqError, ValueError):
    """A bit-width, precision, policy or budget that makes no sense."""


class PatternError(SaqError, KeyError):
    """A layer name or pattern that matches nothing."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InfeasibleBudgetError(SaqError, ValueError):
    """A budget below the cheapest assignment; the message names the smallest feasible one."""


class TracingError(SaqError, RuntimeError):
    """A model that could not be captured as a graph."""


class PassError(SaqError, RuntimeError):
    """A compiler pass whose input, contract or rewrite failed."""


class CalibrationError(SaqError, RuntimeError):
    """Clipping levels that cannot be set from the data given."""


class TrainingError(SaqError, RuntimeError):
    """A training or search step that cannot go on."""


class CheckpointError(SaqError, RuntimeError):
    """A file that does not hold what it should, or does not fit the model."""


class MissingExtraError(SaqError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""


def with_notes(error: BaseException) -> str:
    """An error's message, and the notes that were added on its way."""
    return " ".join((str(error) or type(error).__name__, *getattr(error, "__notes__", ())))
