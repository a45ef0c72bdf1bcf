"""Colours and figures that all plots share. Pyplot is never imported."""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def new_axes(ax: "Axes | None", *, square: bool) -> "Axes":
    """``ax``, or the axes of a new figure, with a light grid and two spines."""
    if ax is None:
        ax = new_figure(*((5.0, 5.0) if square else (6.0, 4.2))).subplots()
    light_grid(ax)
    return ax


def legend(ax: "Axes", location: Literal["upper left", "upper right"]) -> None:
    """A small legend on an almost opaque ground."""
    ax.legend(loc=location, frameon=True, framealpha=0.9, edgecolor="none", fontsize="small")


def one_output(**arrays: Any) -> list[np.ndarray]:
    """The arrays as float64 of one shape (n,)."""
    checked = []
    for name, array in arrays.items():
        values = np.asarray(array, np.float64)
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise errors.DataError(f"{name} has shape {values.shape}. Plot one output at a time: {name}[:, j].")
        if checked and len(values) != len(checked[0]):
            raise errors.DataError(f"{name} has {len(values)} rows but {next(iter(arrays))} has {len(checked[0])}.")
        checked.append(values)
    return checked
