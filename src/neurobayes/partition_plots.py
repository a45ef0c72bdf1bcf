"""Pictures of a choice of Bayesian weights, and of a comparison of such choices; public as ``plots.partition`` etc."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from . import trees
from ._drawing import BLUE, ORANGE, light_grid, new_figure
from .errors import NotFittedError, OptionError, SelectionError
from .networks.base import Layer
from .weight_indices import pair_grids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .advisor import PartitionComparison
    from .subspaces import RandomPart

_FROZEN = "#e9ecef"
_MAX_CELLS = 96  # a finer grid would not be seen
_MAX_OUTLINED = 32
_MAX_PANELS = 24
_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One kernel with its bias, or leaves without a kernel: what one panel shows.

    ``share`` is the share of random weights of each (in, out) pair; ``strips`` are the vectors.
    """

    name: str
    kind: str
    share: np.ndarray | None
    strips: Mapping[str, np.ndarray]
    num_weights: int
    num_bayesian: int

    @property
    def is_uniform(self) -> bool:
        """Whether all weights are frozen, or all random."""
        return self.num_bayesian in (0, self.num_weights)

    @property
    def count(self) -> str:
        """How many weights are random, in words."""
        if self.is_uniform:
            return f"all {self.num_weights:,}" if self.num_bayesian else f"none of {self.num_weights:,}"
        return f"{self.num_bayesian:,} of {self.num_weights:,}"


def partition(model_or_partition: Any) -> "Figure":
    """Which weights of a network are Bayesian: a bar for each layer, and a heat map for each layer that is so in part.

    A heat map has one row for each input and one column for each output of the layer, for
    convolutions each channel, with the bias as a strip below. A cell is blue where weights are
    Bayesian, the darker the larger their share (of a convolution's window, or of a block of weights where
    a layer has more than a picture can show).

    Parameters
    ----------
    model_or_partition : a fitted ``PartialBNN``, whose layers appear in the order of calls; or a
        ``Partition`` (``model.partition``, or ``resolve(selector, info)``), in the order of its leaves.

    Returns
    -------
    A Matplotlib figure: ``plots.partition(model).savefig("weights.png")``.

    Raises
    ------
    NotFittedError
        The model has no partition yet.
    """
    layers, shapes, chosen = _layers_and_partition(model_or_partition)
    masks = chosen.masks()
    rows: list[_Unit] = []
    for layer in layers:
        units = list(_units(layer, shapes, masks))
        whole = _merged(layer, units)
        rows += [whole] if whole.is_uniform or len(units) == 1 else units
    panels = [unit for unit in rows if not unit.is_uniform]
    shown = panels[:_MAX_PANELS]
    lines = math.ceil(len(shown) / _COLUMNS)
    heights = [0.7 + 0.24 * len(rows), 2.7 * lines]
    figure = new_figure(8.4, sum(heights))
    parts = figure.subfigures(1 + bool(lines), 1, height_ratios=heights[: 1 + bool(lines)], squeeze=False)[:, 0]
    _overview(parts[0], rows, _headline(chosen))
    if lines:
        grid = parts[1].subfigures(lines, _COLUMNS, squeeze=False).ravel()
        for part, unit in zip(grid, shown, strict=False):
            _panel(part, unit)
        if len(panels) > len(shown):
            parts[1].suptitle(f"first {len(shown)} of {len(panels)} layers that are Bayesian in part", fontsize=9)
    return figure


def _headline(chosen: "RandomPart") -> str:
    from .subspaces import Subspace

    total = sum(mask.size for mask in chosen.masks().values())
    if isinstance(chosen, Subspace):
        return f"{total:,} weights move along {chosen.size:,} directions"
    return f"{chosen.size:,} of {total:,} weights are Bayesian"


def _layers_and_partition(given: Any) -> tuple[Sequence[Layer], Mapping[str, tuple[int, ...]], "RandomPart"]:
    from .models.base import InputTemplate, as_user_network, network_info
    from .partition import Partition
    from .subspaces import Subspace

    if isinstance(given, Partition | Subspace):
        shapes = {path: mask.shape for path, mask in given.masks().items()}
        names = dict.fromkeys(trees.parent(path) or path for path in shapes)
        return [_guessed(name, shapes) for name in names], shapes, given
    if not hasattr(given, "layer_context"):
        raise OptionError(f"plots.partition takes a fitted PartialBNN or a Partition; got {type(given).__name__}.")
    architecture, row_shape, chosen = given.layer_context()
    if chosen is None:
        raise NotFittedError(f"this {type(given).__name__} has no Bayesian weights to show yet. Call fit(X, y) first.")
    network = as_user_network(architecture)
    info = network_info(network, InputTemplate(tuple(row_shape), network.input_spec.tokens).example)
    return info.layers, info.shapes, chosen


def _guessed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Layer:
    """A layer told by its leaves alone: one matrix is dense, one kernel of more axes a convolution."""
    leaves = tuple(path for path in shapes if (trees.parent(path) or path) == name)
    ranks = [len(shapes[path]) for path in leaves if len(shapes[path]) > 1]
    if len(ranks) != 1:
        return Layer(name, "norm" if not ranks else "other", leaves)
    return Layer(name, "dense" if ranks == [2] else "conv", leaves)


def _units(layer: Layer, shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, np.ndarray]) -> Iterator[_Unit]:
    """The panels of a layer: one for each kernel, with the vectors beside it."""
    try:
        shares = {grid.leaf: grid.values(masks[grid.leaf]).mean(axis=-1) for grid in pair_grids(layer, shapes)}
    except SelectionError:  # a layer whose kernel cannot be told: the last axis counts the outputs
        matrices = [leaf for leaf in layer.leaves if len(shapes[leaf]) > 1]
        shares = {leaf: masks[leaf].reshape(-1, shapes[leaf][-1]).astype(float) for leaf in matrices}
    rest = [leaf for leaf in layer.leaves if leaf not in shares]
    for leaf, share in shares.items():
        beside = [other for other in rest if trees.parent(other) == trees.parent(leaf)]
        rest = [other for other in rest if other not in beside]
        name = layer.name if len(shares) == 1 else trees.parent(leaf) if _alone(leaf, shares) else leaf
        yield _unit(name, layer.kind, share, [leaf, *beside], masks)
    if rest:
        yield _unit(layer.name, layer.kind, None, rest, masks)


def _alone(leaf: str, others: Mapping[str, Any]) -> bool:
    return sum(trees.parent(other) == trees.parent(leaf) for other in others) == 1


def _unit(name: str, kind: str, share: np.ndarray | None, leaves: Sequence[str], masks: Mapping[str, Any]) -> _Unit:
    strips = {
        leaf.rpartition(trees.SEPARATOR)[2]: masks[leaf].ravel().astype(float)
        for leaf in leaves[0 if share is None else 1 :]
    }
    sizes, chosen = ([function(masks[leaf]) for leaf in leaves] for function in (np.size, np.sum))
    return _Unit(name, kind, share, strips, int(sum(sizes)), int(sum(chosen)))


def _merged(layer: Layer, units: Sequence[_Unit]) -> _Unit:
    if len(units) == 1:
        return units[0]
    sizes = sum(unit.num_weights for unit in units)
    return _Unit(layer.name, layer.kind, None, {}, sizes, sum(unit.num_bayesian for unit in units))


def _overview(part: Any, rows: Sequence[_Unit], headline: str) -> None:
    """One bar for each layer, filled by its share of Bayesian weights."""
    ax = part.subplots()
    positions = np.arange(len(rows))
    shares = np.array([unit.num_bayesian / max(unit.num_weights, 1) for unit in rows])
    ax.barh(positions, 1.0, height=0.62, color=_FROZEN, label="frozen")
    ax.barh(positions, np.where(shares > 0, np.maximum(shares, 0.006), 0), height=0.62, color=BLUE, label="Bayesian")
    for position, unit in zip(positions, rows, strict=True):
        ax.text(1.02, position, unit.count, va="center", fontsize=8, color="0.15" if unit.num_bayesian else "0.55")
    ax.set_yticks(positions, [f"{unit.name} ({unit.kind})" for unit in rows], fontsize=8)
    ax.set(xlim=(0, 1.28), ylim=(len(rows) - 0.4, -0.6))
    ax.set_title(headline, fontsize=11, loc="left")
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)


def _panel(part: Any, unit: _Unit) -> None:
    """The heat map of a kernel with its vectors as strips below."""
    images = [] if unit.share is None else [("", unit.share)]
    images += [(name, strip[None]) for name, strip in unit.strips.items()]
    heights = [12.0 if not name else 1.4 for name, _ in images]
    if unit.share is None:  # vectors alone: strips as low as beside a kernel
        heights.append(12.0)
    axes = part.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for empty in axes[len(images) :]:
        empty.set_axis_off()
    for ax, (name, share) in zip(axes, images, strict=False):
        _heat_map(ax, share)
        if name:
            ax.set_yticks([0], [name], fontsize=8)
            ax.set_xticks([])
        else:
            down, across = ("token", "feature") if unit.kind == "embedding" else ("in", "out")
            ax.set_ylabel(down, fontsize=8, labelpad=1)
            ax.set_xlabel(across, fontsize=8, labelpad=1)
    axes[0].set_title(f"{unit.name}\n{unit.count}", fontsize=9)


def _heat_map(ax: Any, share: np.ndarray) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    colours = LinearSegmentedColormap.from_list("share", [(0.0, _FROZEN), (0.3, "#9cc0dc"), (1.0, BLUE)])
    cells = _pooled(share)
    # One weight in a large block is still a weight: it is drawn well apart from none.
    values = np.where(cells > 0, 0.3 + 0.7 * cells, 0.0)
    extent = (-0.5, share.shape[1] - 0.5, share.shape[0] - 0.5, -0.5)
    ax.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    for count, axis in ((share.shape[1], ax.xaxis), (share.shape[0], ax.yaxis)):
        axis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        if count == 1:
            axis.set_ticks([0])
    ax.tick_params(labelsize=7, length=2, pad=1)
    if max(share.shape) <= _MAX_OUTLINED:  # white lines between the cells
        ax.set_xticks(np.arange(0.5, share.shape[1] - 1), minor=True)
        ax.set_yticks(np.arange(0.5, share.shape[0] - 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)


def _pooled(share: np.ndarray) -> np.ndarray:
    """Means over blocks, at most ``_MAX_CELLS`` of them along each axis."""
    for axis, size in enumerate(share.shape):
        if size > _MAX_CELLS:
            starts = np.arange(0, size, math.ceil(size / _MAX_CELLS))
            widths = np.diff([*starts, size])
            share = np.add.reduceat(share, starts, axis=axis) / np.expand_dims(widths, 1 - axis)
    return share


_PANELS = {
    "regression": (("nlpd", "held-out NLPD [nats]"), ("coverage", "coverage of 95 % intervals"), ("crps", "CRPS")),
    "classification": (("nll", "held-out NLL [nats]"), ("ece", "calibration error (ECE)"), ("accuracy", "accuracy")),
}


def partition_comparison(comparison: "PartitionComparison") -> "Figure":
    """Scores of each candidate on held-out rows, and its effective draws per second, one row per candidate.

    The best candidate is orange; candidates whose draws are not to be trusted are hollow, and those
    without a result are listed with the reason.

    Parameters
    ----------
    comparison : result of ``compare_partitions``.

    Returns
    -------
    A Matplotlib figure.
    """
    rows = comparison.table
    scored = [(place, row) for place, row in enumerate(rows) if row["status"] == "done"]
    figure = new_figure(11.0, 1.5 + 0.36 * len(rows))
    panels = [*_PANELS["regression" if comparison.is_regression else "classification"],
              ("ess_per_second", "effective draws per second")]  # fmt: skip
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (name, label) in zip(axes, panels, strict=True):
        light_grid(ax)
        if name == "coverage":
            ax.axvline(0.95, color="0.4", linewidth=1, linestyle="--")
        if name == "ess_per_second":
            ax.set_xscale("log")
        for place, row in scored:
            if not np.isfinite(row[name]):
                continue
            colour = ORANGE if row["name"] == comparison.best else BLUE
            filled = {"markerfacecolor": colour if row["ok"] else "white", "markeredgecolor": colour}
            if name in ("nlpd", "nll"):
                ax.hlines(place, row[name] - row["standard_error"], row[name] + row["standard_error"], color=colour)
            ax.plot(row[name], place, marker="o", markersize=7, linestyle="", **filled)
        ax.set_title(label, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.margins(x=0.12)
    axes[0].set_zorder(1)
    axes[0].patch.set_visible(False)
    for place, row in enumerate(rows):
        if row["status"] != "done":
            reason = shorten(f"{row['status']}: {row['note']}", 110, placeholder=" …")
            text = axes[0].text(
                0.02, place, reason, transform=axes[0].get_yaxis_transform(), fontsize=7, color="0.35", va="center",
                zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
            text.set_in_layout(False)  # it runs across all panels of its row
    sizes = [f"{row['num_bayesian']:,}" if row["num_bayesian"] is not None else "?" for row in rows]
    labels = [f"{row['name']} ({size})" for row, size in zip(rows, sizes, strict=True)]
    axes[0].set_yticks(range(len(rows)), labels, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(
        f"{comparison.num_held_out:,} held-out rows; in brackets the number of Bayesian weights; "
        "bars: one standard error; hollow: do not trust the draws", fontsize=9,
    )  # fmt: skip
    return figure
