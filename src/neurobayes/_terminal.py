"""What the command line shows while it works: a spinner, warnings and errors, one line each."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import typer

from . import errors


def stage(console: Any, text: str) -> contextlib.AbstractContextManager[Any]:
    """A spinner while the block runs, on a terminal only; four frames a second cost the run nothing."""
    if not console.is_terminal:
        return contextlib.nullcontext()
    from rich.text import Text

    return console.status(Text(text), refresh_per_second=4)


@contextlib.contextmanager
def warnings_as_lines(console: Any) -> Iterator[list[str]]:
    """Warnings as they come, one line each and each once; yields the list of their messages."""
    from rich.text import Text

    messages: list[str] = []

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in messages:
            messages.append(str(message))
            console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    with warnings.catch_warnings():
        for category in (
            errors.ConvergenceWarning,
            errors.CalibrationWarning,
            errors.UnitsWarning,
            errors.MemoryBudgetWarning,
        ):
            warnings.simplefilter("always", category)  # shown even where a filter of the caller hides them
        warnings.showwarning = show
        yield messages


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Errors that a user can mend as one red line on stderr, with exit status 2."""
    try:
        yield
    except (errors.NeuroBayesError, OSError) as error:
        from rich.console import Console
        from rich.text import Text

        message = " ".join(str(error).split())
        Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None
