"""A low-dimensional plane through weight space, in the place of a choice of single weights."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import trees
from ._typing import Array, Params
from .errors import ParameterError
from .partition import Partition


@functools.partial(jax.tree_util.register_dataclass, data_fields=["centre", "basis"], meta_fields=["leaves"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """The weights ``centre + sum_k theta_k b_k``, with orthonormal directions ``b_k`` in the space of all weights.

    Has the interface of ``Partition`` where densities, engines and predictions
    need one. Since the directions are orthonormal, ``theta`` is measured in the
    units of the weights, and an independent Gaussian prior of the weights with
    one standard deviation, restricted to the plane, is the same Gaussian over
    ``theta``.

    Attributes
    ----------
    leaves : (path, shape) of each leaf, in pytree order.
    centre : the leaves' values at ``theta = 0``.
    basis : for each leaf its part of the directions, shape ``(size, *leaf_shape)``.

    Examples
    --------
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> plane = Subspace.of({"w": np.array([[3.0, 4.0]])}, params)
    >>> plane.merge(jnp.array([5.0]), params)["w"].tolist()
    [4.0, 6.0]
    >>> plane.split({"w": jnp.array([4.0, 6.0])}).tolist()
    [5.0]
    """

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    centre: tuple[Any, ...]
    basis: tuple[Any, ...]

    @classmethod
    def of(cls, directions: dict[str, np.ndarray], centre: Params) -> "Subspace":
        """The plane through ``centre`` along ``directions``, leaf path -> ``(k, *leaf_shape)``, made orthonormal.

        Raises
        ------
        ParameterError
            The directions are linearly dependent.
        """
        shapes = trees.shapes(centre)
        flat = np.concatenate([np.asarray(directions[path], float).reshape(len(directions[path]), -1)
                               for path in shapes], axis=1)  # fmt: skip
        orthonormal, triangle = np.linalg.qr(flat.T)
        diagonal = np.diag(triangle)
        if np.any(np.abs(diagonal) <= 1e-6 * np.linalg.norm(flat, axis=1).max()):
            raise ParameterError(f"the {len(flat)} directions of a subspace must be linearly independent.")
        rows = (orthonormal * np.sign(diagonal)).T.astype(np.float32)  # signs of the given directions
        rows[:, (flat == 0).all(axis=0)] = 0.0  # exactly: these weights are frozen
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        parts = np.split(rows, ends, axis=1)
        basis = tuple(part.reshape(-1, *shape) for part, shape in zip(parts, shapes.values(), strict=True))
        return cls(tuple(shapes.items()), tuple(np.asarray(leaf) for leaf in jax.tree.leaves(centre)), basis)

    @property
    def size(self) -> int:
        """Number of coordinates, the length of ``theta``."""
        return self.basis[0].shape[0]

    def split(self, params: Params) -> Array:
        """The coordinates of the point of the plane nearest to ``params``, shape (size,)."""
        pairs = zip(self.basis, self._leaves(params), self.centre, strict=True)
        return sum((jnp.tensordot(b, leaf - c, axes=jnp.ndim(c)) for b, leaf, c in pairs), jnp.zeros(self.size))

    def merge(self, theta: Array, params: Params) -> Params:
        """The weights at ``theta``, in the structure and dtypes of ``params``.

        Raises
        ------
        ParameterError
            ``theta`` is not of shape (size,), or ``params`` has other leaves.
        """
        if jnp.shape(theta) != (self.size,):
            raise ParameterError(f"theta must have shape ({self.size},); got {jnp.shape(theta)}.")
        merged = [
            (c + jnp.tensordot(theta, b, axes=1)).astype(jnp.result_type(leaf))
            for b, leaf, c in zip(self.basis, self._leaves(params), self.centre, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), merged)

    def unravel(self, theta: Any) -> dict[str, Any]:
        """``{"subspace": theta}``: coordinates belong to no leaf; ``merge`` gives the weights of one draw."""
        shape = jnp.shape(theta)
        if not shape or shape[-1] != self.size:
            raise ParameterError(f"the last axis of theta must have length {self.size}; got shape {shape}.")
        return {"subspace": theta}

    def masks(self) -> dict[str, np.ndarray]:
        """Leaf path -> boolean array, True where a weight differs from point to point of the plane."""
        return {path: np.any(np.asarray(b) != 0, axis=0) for (path, _), b in zip(self.leaves, self.basis, strict=True)}

    def counts(self) -> dict[str, int]:
        """Leaf path -> number of weights that differ from point to point; together they have ``size`` coordinates."""
        return {path: int(mask.sum()) for path, mask in self.masks().items()}

    def __repr__(self) -> str:
        total = sum(math.prod(shape) for _, shape in self.leaves)
        return f"<Subspace: {self.size} coordinates for {total} scalars in {len(self.leaves)} leaves>"

    def _leaves(self, params: Params) -> list[Any]:
        got = tuple((path, tuple(jnp.shape(leaf))) for path, leaf in trees.flatten(params).items())
        if got != self.leaves:
            raise ParameterError(
                "the parameters do not fit the subspace: they have the leaves "
                f"{', '.join(f'{path} {shape}' for path, shape in got)}."
            )
        return jax.tree.leaves(params)


RandomPart = Partition | Subspace
"""What the coordinates of a position may stand for."""
