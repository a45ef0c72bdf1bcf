"""The one way to BlackJAX, which is optional and slow to import: engines load it when they run."""

from typing import Any

from ..errors import missing_extra


def load(needed_for: str) -> Any:
    """The ``blackjax`` package.

    Raises
    ------
    MissingExtraError
        When it is not installed; the message names the extra that brings it.
    """
    try:
        import blackjax
    except ImportError as error:
        raise missing_extra("blackjax", "blackjax", needed_for) from error
    return blackjax
