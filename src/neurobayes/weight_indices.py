"""Index tuples of single weights, and the masks they stand for.

A layer's kernel is seen as a grid of (in, out) pairs. What else the kernel has,
the window of a convolution, belongs to the pair as a whole.

=========== ========================= ==========================================
layer       index tuple               meaning
=========== ========================= ==========================================
dense       (in, out)                 one weight
conv        (in_channel, out_channel) the whole kernel window of the pair
embedding   (token, feature)          one weight
attention   (projection, in, out)     one weight of 'query', 'key', 'value' or
                                      'out'; heads and head size are one axis
=========== ========================= ==========================================

Leaves called ``kernel`` are stored (..., in, out), as Flax does; leaves called
``weight`` are stored (out, in, ...), as PyTorch and Equinox do. The tuples are
the same for both. Biases are never part of a pair.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from . import trees
from .errors import SelectionError
from .networks.base import Layer

PAIR_KINDS = ("dense", "conv", "attention", "embedding")
"""Kinds of layer whose weights come in pairs."""

_KERNEL_NAMES = ("kernel", "weight", "embedding")
_PROJECTIONS = {
    "query": ("query", "query_proj", "q_proj"),
    "key": ("key", "key_proj", "k_proj"),
    "value": ("value", "value_proj", "v_proj"),
    "out": ("out", "output_proj", "out_proj", "o_proj"),
}
_AXIS_NAMES = {"conv": ("in_channel", "out_channel"), "embedding": ("token", "feature")}


@dataclasses.dataclass(frozen=True)
class PairGrid:
    """A kernel seen as a grid of pairs, shape (num_in, num_out), each with a window of weights.

    Attributes
    ----------
    leaf, shape : path and shape of the kernel.
    in_axes, out_axes : the axes that count the inputs and the outputs; all others are the window.
    projection : which projection of an attention layer this is, else None.
    axis_names : what users call the two axes.
    """

    leaf: str
    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    projection: str | None = None
    axis_names: tuple[str, str] = ("in", "out")

    @property
    def num_in(self) -> int:
        """Number of inputs."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def num_out(self) -> int:
        """Number of outputs."""
        return math.prod(self.shape[axis] for axis in self.out_axes)

    @property
    def _order(self) -> tuple[int, ...]:
        pair = self.in_axes + self.out_axes
        return pair + tuple(axis for axis in range(len(self.shape)) if axis not in pair)

    def values(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf's values by pair, shape (num_in, num_out, window)."""
        window = math.prod(self.shape) // max(self.num_in * self.num_out, 1)
        return np.transpose(leaf, self._order).reshape(self.num_in, self.num_out, window)

    def mask(self, selected: np.ndarray) -> np.ndarray:
        """The leaf's mask for the selected pairs, a boolean array of shape (num_in, num_out)."""
        moved = tuple(self.shape[axis] for axis in self._order)
        num_pair_axes = len(self.in_axes + self.out_axes)
        pairs = selected.reshape(moved[:num_pair_axes] + (1,) * (len(moved) - num_pair_axes))
        return np.transpose(np.broadcast_to(pairs, moved), np.argsort(self._order)).copy()

    def index(self, position: int) -> tuple:
        """The index tuple of the pair at a flat position of the grid."""
        pair = divmod(int(position), self.num_out)
        return pair if self.projection is None else (self.projection, *pair)


def pair_grids(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> tuple[PairGrid, ...]:
    """The grids of a layer: one, or one per projection for attention.

    Raises
    ------
    SelectionError
        The layer has no kernel, or one whose axes do not say what is in and what is out.
    """
    if layer.kind not in PAIR_KINDS:
        raise SelectionError(
            f"layer {layer.name!r} is of kind {layer.kind!r} and has no kernel whose weights could be picked in pairs. "
            f"Pick single weights by leaf, for example {{{layer.leaves[0]!r}: [...]}}, or the whole layer by name."
        )
    if layer.kind == "attention":
        kernels = {name: _kernel_of(layer, shapes, prefixes) for name, prefixes in _PROJECTIONS.items()}
    else:
        kernels = {None: _kernel_of(layer, shapes, None)}
    if None in kernels.values():  # some projections are not enough: a ranking would silently leave the others out
        raise SelectionError(
            f"layer {layer.name!r} ({layer.kind}) does not say which leaf is which kernel: {', '.join(layer.leaves)}. "
            "Address a leaf by its own path with full-rank index tuples."
        )
    return tuple(_grid(layer, leaf, shapes[leaf], name) for name, leaf in kernels.items() if leaf is not None)


def _kernel_of(layer: Layer, shapes: Mapping[str, tuple[int, ...]], below: tuple[str, ...] | None) -> str | None:
    """The one leaf that is a kernel: by its name, else by being the only one with two axes or more."""
    leaves = [leaf for leaf in layer.leaves if len(shapes[leaf]) >= 2]
    if below is not None:
        leaves = [leaf for leaf in leaves if trees.parent(leaf).rpartition(trees.SEPARATOR)[2] in below]
    named = [leaf for leaf in leaves if leaf.rpartition(trees.SEPARATOR)[2] in _KERNEL_NAMES] or leaves
    return named[0] if len(named) == 1 else None


def _grid(layer: Layer, leaf: str, shape: tuple[int, ...], projection: str | None) -> PairGrid:
    rank = len(shape)
    out_first = leaf.rpartition(trees.SEPARATOR)[2] == "weight" and layer.kind != "embedding"
    if layer.kind == "conv":
        in_axes, out_axes = ((1,), (0,)) if out_first else ((rank - 2,), (rank - 1,))
    elif rank == 2:
        in_axes, out_axes = ((1,), (0,)) if out_first else ((0,), (1,))
    elif layer.kind == "attention" and rank == 3:  # heads and head size: outputs of all but the last projection
        in_axes, out_axes = ((0, 1), (2,)) if projection == "out" else ((0,), (1, 2))
    else:
        raise SelectionError(
            f"the kernel {leaf!r} of shape {shape} does not say which axes are in and which are out. "
            f"Address its weights by leaf, with {rank} numbers each: {{{leaf!r}: [{(0,) * rank}]}}."
        )
    return PairGrid(leaf, shape, in_axes, out_axes, projection, _AXIS_NAMES.get(layer.kind, ("in", "out")))


def leaf_mask(leaf: str, shape: tuple[int, ...], indices: Sequence[tuple]) -> np.ndarray:
    """The mask of one leaf addressed by full-rank index tuples."""
    names = tuple(f"axis {axis}" for axis in range(len(shape)))
    mask = np.zeros(shape, bool)
    for index in indices:
        _check_index(leaf, index, index, names, shape, f"shape {shape}")
        _set_once(mask, leaf, index, index)
    return mask


def layer_masks(layer: Layer, shapes: Mapping[str, tuple[int, ...]], indices: Sequence[tuple]) -> dict[str, np.ndarray]:
    """Leaf path -> mask for the pairs of one layer.

    Raises
    ------
    SelectionError
        An index tuple has the wrong length or type, is out of range, negative or repeated.
    """
    grids = {grid.projection: grid for grid in pair_grids(layer, shapes)}
    selected = {name: np.zeros((grid.num_in, grid.num_out), bool) for name, grid in grids.items()}
    for index in indices:
        projection, pair = _projection_of(layer, index, grids)
        grid = grids[projection]
        _check_index(
            layer.name, index, pair, grid.axis_names, (grid.num_in, grid.num_out), f"{grid.leaf} has shape {grid.shape}"
        )
        _set_once(selected[projection], layer.name, index, pair)
    return {grid.leaf: grid.mask(selected[name]) for name, grid in grids.items() if selected[name].any()}


def _projection_of(layer: Layer, index: tuple, grids: Mapping[str | None, PairGrid]) -> tuple[str | None, tuple]:
    if None in grids:
        return None, index
    if len(index) != 3 or index[0] not in grids:
        known = ", ".join(map(repr, grids))
        raise SelectionError(
            f"{layer.name!r}: a weight of an attention layer is (projection, in, out) with projection one of "
            f"{known}; got {index!r}."
        )
    return index[0], index[1:]


def _check_index(
    owner: str, index: tuple, numbers_: tuple, names: Sequence[str], sizes: Sequence[int], shape_text: str
) -> None:
    valid = ", ".join(f"{name} 0..{size - 1}" for name, size in zip(names, sizes, strict=True))
    whole = all(isinstance(n, numbers.Integral) and not isinstance(n, (bool, np.bool_)) for n in numbers_)
    if len(numbers_) != len(sizes) or not whole:
        problem = f"must hold {len(sizes)} whole number{'s' * (len(sizes) != 1)}"
    elif any(not 0 <= n < size for n, size in zip(numbers_, sizes, strict=True)):
        problem = "is out of range"
    else:
        return
    raise SelectionError(f"{owner!r}: weight index {index!r} {problem}. Valid: {valid or '()'} ({shape_text}).")


def _set_once(mask: np.ndarray, owner: str, index: tuple, position: tuple) -> None:
    if mask[position]:
        raise SelectionError(f"{owner!r}: weight index {index!r} is given twice. List each weight once.")
    mask[position] = True
