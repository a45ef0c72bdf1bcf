"""Every error and warning the library raises on purpose.

A message names the argument, says what was given, and says how to mend it.
All errors derive from ``NeuroBayesError`` and from the built-in that a caller
would expect to catch.
"""

import difflib
from collections.abc import Iterable


class NeuroBayesError(Exception):
    """Base of all errors raised by neurobayes."""


class DataError(NeuroBayesError, ValueError):
    """X, y or another array has the wrong shape, type or values."""


class OptionError(NeuroBayesError, ValueError):
    """An option has a value or a combination that is not supported."""


class SelectionError(NeuroBayesError, ValueError):
    """A choice of Bayesian weights matches nothing, or something that does not exist."""


class ParameterError(NeuroBayesError, ValueError):
    """Given weights do not have the structure of the network."""


class TrainingError(NeuroBayesError, RuntimeError):
    """Deterministic training or sampling produced non-finite values."""


class ConvergenceError(NeuroBayesError, RuntimeError):
    """The draws should not be trusted; the message says what to change."""


class NotFittedError(NeuroBayesError, RuntimeError):
    """A prediction or a parameter was asked for before ``fit`` or ``train``."""


class CheckpointError(NeuroBayesError, ValueError):
    """A checkpoint folder belongs to another run or cannot be read."""


class MissingExtraError(NeuroBayesError, ImportError):
    """An optional dependency is not installed."""


class ConvergenceWarning(UserWarning):
    """The draws should not be trusted yet; the message says what to change."""


class CalibrationWarning(UserWarning):
    """The intervals are known to be too narrow or too wide in this setting."""


class UnitsWarning(UserWarning):
    """Given weights and given data do not seem to be in the same units."""


class MemoryBudgetWarning(UserWarning):
    """Something was computed again and again because keeping it would have taken too much memory."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (closest: 'Dense3')"``, or nothing where no known name is near ``name``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" (closest: {close[0]!r})" if close else ""


def unknown_choice(argument: str, got: object, known: Iterable[str]) -> OptionError:
    """The error for an option that is none of the known names."""
    known = list(known)
    return OptionError(f"{argument}={got!r} is not known{nearest(str(got), known)}. Choose one of: {', '.join(known)}.")


def missing_extra(package: str, extra: str, needed_for: str) -> MissingExtraError:
    """The error for an optional dependency that is absent, naming the extra that brings it."""
    return MissingExtraError(
        f"{needed_for} needs the package {package!r}, which is not installed. "
        f'Install it from the checkout with: pip install ".[{extra}]"'
    )
