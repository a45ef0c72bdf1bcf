"""Colours and figures that all plots share. Pyplot is never imported."""

from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6690", "#d1603d", "#8d99a6"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches.

    Raises
    ------
    MissingExtraError
        Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise errors.missing_extra("matplotlib", "plots", "Plotting") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def light_grid(ax: Any, axis: str = "both") -> None:
    """A light grid behind the data, and two spines."""
    ax.grid(color="0.9", linewidth=0.8, axis=axis)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
