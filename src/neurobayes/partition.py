"""Which scalars of a parameter pytree are random: the vector ``theta`` and its way back.

``theta`` holds the random scalars in pytree leaf order and, within a leaf, in
row-major order. Everything Bayesian happens on it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import trees
from ._typing import Array, Masks, Params
from .errors import ParameterError, SelectionError, nearest

# True by construction: indices come from ``np.flatnonzero`` of a mask of the leaf's shape.
_TRUSTED = {"mode": "promise_in_bounds", "unique_indices": True, "indices_are_sorted": True}


@dataclasses.dataclass(frozen=True)
class LeafSelection:
    """How much of one leaf is random: nothing, everything, or ``num_selected`` scalars."""

    path: str
    shape: tuple[int, ...]
    num_selected: int

    @property
    def is_frozen(self) -> bool:
        """Whether no scalar of the leaf is random."""
        return self.num_selected == 0

    @property
    def is_partial(self) -> bool:
        """Whether some scalars of the leaf are random and some are not."""
        return 0 < self.num_selected < math.prod(self.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["indices"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Which scalars of a parameter pytree are random; the others are frozen constants.

    A pytree itself: pass it to jitted functions as an argument. Its index
    arrays are dynamic, so another selection with as many scalars per leaf
    reuses the compiled program; its ``structure`` is static and hashable.

    Attributes
    ----------
    structure : one entry per leaf, in pytree order.
    indices : for each partly random leaf, in order, its sorted and unique flat positions.

    Examples
    --------
    >>> params = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}
    >>> masks = {"kernel": np.arange(6).reshape(3, 2) < 2}
    >>> partition = Partition.from_masks(masks, trees.shapes(params))
    >>> partition.split(params).tolist()
    [1.0, 1.0]
    >>> partition.merge(jnp.array([7.0, 8.0]), params)["kernel"].tolist()
    [[7.0, 8.0], [1.0, 1.0], [1.0, 1.0]]
    """

    structure: tuple[LeafSelection, ...]
    indices: tuple[Any, ...]

    @classmethod
    def from_masks(cls, masks: Masks, shapes: Mapping[str, tuple[int, ...]]) -> "Partition":
        """The partition that makes every scalar random where its mask is True.

        Parameters
        ----------
        masks : leaf path -> boolean array of the leaf's shape. A leaf without a mask is frozen.
        shapes : leaf path -> shape, for all leaves in pytree order (``trees.shapes(params)``).

        Raises
        ------
        SelectionError
            A mask belongs to no leaf, is not boolean, or has another shape than its leaf.
        """
        for path in masks:
            if path not in shapes:
                raise SelectionError(f"there is a mask for {path!r}, but no such leaf{nearest(path, shapes)}.")
        structure, indices = [], []
        for path, shape in shapes.items():
            if path not in masks:
                structure.append(LeafSelection(path, tuple(shape), 0))
                continue
            mask = np.asarray(masks[path])
            if mask.dtype != bool or mask.shape != tuple(shape):
                raise SelectionError(
                    f"the mask of {path!r} must be boolean with the leaf's shape {tuple(shape)}; "
                    f"got {mask.dtype} with shape {mask.shape}."
                )
            selected = np.flatnonzero(mask)
            entry = LeafSelection(path, tuple(shape), len(selected))
            structure.append(entry)
            if entry.is_partial:
                indices.append(selected.astype(np.int32 if mask.size <= np.iinfo(np.int32).max else np.int64))
        return cls(tuple(structure), tuple(indices))

    @classmethod
    def everything(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Partition":
        """All scalars random."""
        return cls(tuple(LeafSelection(p, tuple(s), math.prod(s)) for p, s in shapes.items()), ())

    @classmethod
    def nothing(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Partition":
        """All scalars frozen: ``theta`` is empty."""
        return cls(tuple(LeafSelection(p, tuple(s), 0) for p, s in shapes.items()), ())

    @property
    def size(self) -> int:
        """Number of random scalars, the length of ``theta``."""
        return sum(entry.num_selected for entry in self.structure)

    def split(self, params: Params) -> Array:
        """The random scalars of ``params`` as one vector, shape (size,), in the dtype of their leaves.

        Raises
        ------
        ParameterError
            ``params`` has other leaves or shapes than the partition.
        """
        leaves = self._leaves(params)
        parts = []
        for (entry, index), leaf in zip(self._walk(), leaves, strict=True):
            if not entry.is_frozen:
                flat = jnp.ravel(leaf)
                parts.append(flat if index is None else flat.at[index].get(**_TRUSTED))
        if not parts:
            return jnp.zeros(0, jnp.result_type(*leaves) if leaves else float)
        return jnp.concatenate(parts)

    def merge(self, theta: Array, params: Params) -> Params:
        """``params`` with its random scalars replaced by ``theta``; the inverse of ``split``.

        A frozen leaf is returned as it is and a wholly random one is made of
        ``theta`` alone, so that nothing computed from frozen leaves depends on
        ``theta`` and can be hoisted. Every leaf keeps its dtype.

        Raises
        ------
        ParameterError
            ``theta`` is not of shape (size,), or ``params`` does not fit the partition.
        """
        if jnp.shape(theta) != (self.size,):
            raise ParameterError(f"theta must have shape ({self.size},); got {jnp.shape(theta)}.")
        # One split and not a slice for each leaf: its gradient is one concatenation, not a sum of padded vectors.
        sizes = [entry.num_selected for entry in self.structure if not entry.is_frozen]
        parts = iter(jax.lax.split(jnp.asarray(theta), sizes)) if sizes else iter(())
        merged = []
        for (entry, index), leaf in zip(self._walk(), self._leaves(params), strict=True):
            if entry.is_frozen:
                merged.append(leaf)
                continue
            part = jnp.asarray(next(parts), jnp.result_type(leaf))
            flat = part if index is None else jnp.ravel(leaf).at[index].set(part, **_TRUSTED)
            merged.append(flat.reshape(entry.shape))
        return jax.tree.unflatten(jax.tree.structure(params), merged)

    def unravel(self, theta: Any) -> dict[str, Any]:
        """The random scalars by leaf path.

        Parameters
        ----------
        theta : shape (..., size), for instance draws of shape (chain, draw, size).

        Returns
        -------
        Leaf path -> array of shape ``(..., *leaf_shape)`` where the whole leaf is
        random and ``(..., num_selected)`` where only a part of it is. Frozen
        leaves are absent.
        """
        shape = jnp.shape(theta)
        if not shape or shape[-1] != self.size:
            raise ParameterError(f"the last axis of theta must have length {self.size}; got shape {shape}.")
        leaves, start = {}, 0
        for entry in self.structure:
            if not entry.is_frozen:
                part = theta[..., start : start + entry.num_selected]
                leaves[entry.path] = part if entry.is_partial else part.reshape((*shape[:-1], *entry.shape))
                start += entry.num_selected
        return leaves

    def masks(self) -> dict[str, np.ndarray]:
        """Leaf path -> boolean array of the leaf's shape, for all leaves; ``from_masks`` inverts it."""
        masks = {}
        for entry, index in self._walk():
            mask = np.full(math.prod(entry.shape), not (entry.is_frozen or entry.is_partial))
            if index is not None:
                mask[np.asarray(index)] = True
            masks[entry.path] = mask.reshape(entry.shape)
        return masks

    def counts(self) -> dict[str, int]:
        """Leaf path -> number of random scalars, for all leaves."""
        return {entry.path: entry.num_selected for entry in self.structure}

    def __repr__(self) -> str:
        total = sum(math.prod(entry.shape) for entry in self.structure)
        touched = sum(not entry.is_frozen for entry in self.structure)
        return f"<Partition: {self.size} of {total} scalars random, in {touched} of {len(self.structure)} leaves>"

    def _walk(self) -> Iterator[tuple[LeafSelection, Any]]:
        """Each leaf with its index array, or None where it is wholly frozen or random."""
        indices = iter(self.indices)
        for entry in self.structure:
            yield entry, next(indices) if entry.is_partial else None

    def _leaves(self, params: Params) -> list[Any]:
        """The leaves of ``params``, after a check that costs nothing once compiled."""
        got = {path: tuple(jnp.shape(leaf)) for path, leaf in trees.flatten(params).items()}
        expected = {entry.path: entry.shape for entry in self.structure}
        leaves = jax.tree.leaves(params)
        if got == expected and len(leaves) == len(expected):
            return leaves
        wrong = sorted(path for path in got.keys() | expected.keys() if got.get(path) != expected.get(path))
        if not wrong:
            raise ParameterError("two leaves of the parameters have the same path; keys must not contain dots.")
        path = wrong[0]
        raise ParameterError(
            f"the parameters do not fit the partition in {len(wrong)} leaves; the first is {path!r}: "
            f"expected shape {expected.get(path, 'no such leaf')}, got {got.get(path, 'no such leaf')}."
        )
