"""The features of a linear output layer, read off the traced network instead of computed one weight at a time."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from .._typing import Array
from ..linearity import Pieces


class Product(NamedTuple):
    """A feature matrix ``(rows, features)``, None for a column of ones, times weights at ``slots`` of ``theta``."""

    features: Any
    slots: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class DenseHead:
    """Outputs of the form ``features.T @ theta[slots] + constant``, in which every scalar moves one output.

    Attributes
    ----------
    slots : (features, outputs) positions in ``theta``.
    kept : which slices of ``theta`` the features and the constant depend on.
    """

    slots: np.ndarray
    kept: tuple[int, ...]
    _closed: jex.ClosedJaxpr
    _products: tuple[Product, ...]

    def __call__(self, slices: Sequence[Array], carry: Any, num_rows: int) -> tuple[Array, Array]:
        """Features ``(features, rows)`` and the constant ``(rows, outputs)`` for the values of the kept slices."""
        values = iter(jex.jaxpr_as_fun(self._closed)(*slices, *jax.tree.leaves(carry)))
        # Rows last: XLA's matrix products on CPUs take half the time of those with a tall operand.
        dense = [None if p.features is None else next(values).T for p in self._products]
        dtype = jnp.result_type(*(part for part in (*dense, *slices) if part is not None))
        ones = jnp.ones((1, num_rows), dtype)
        features = jnp.concatenate([ones if part is None else part for part in dense])
        return features, sum(values, start=jnp.zeros((), dtype))


@functools.lru_cache(maxsize=64)
def dense_head(pieces: Pieces, linear: tuple[int, ...]) -> DenseHead | None:
    """The output as a matrix product with the slices of the blocks ``linear``; None where it is not plainly one."""
    jaxpr = pieces.closed.jaxpr
    inputs = list(zip(jaxpr.invars, pieces.bounds, pieces.owners, strict=False))
    # What depends on the weights is either weights alone, as an array of their positions, or a list of products
    # and constants.
    found: dict[Any, Any] = {v: np.arange(*bounds) for v, bounds, owner in inputs if owner in linear}
    independent = []
    for eqn in jaxpr.eqns:
        values = [None if isinstance(v, jex.Literal) else found.get(v) for v in eqn.invars]
        if all(value is None for value in values):
            independent.append(eqn)
            continue
        result = _value(eqn, values)
        if result is None:
            return None
        found[eqn.outvars[0]] = result
    output: Any = jaxpr.outvars[0]
    terms = None if isinstance(output, jex.Literal) else found.get(output)
    num_weights = sum(stop - start for _, (start, stop), owner in inputs if owner in linear)
    shape: Any = getattr(output.aval, "shape", ())
    if not isinstance(terms, list) or not _covers(terms, shape, num_weights):
        return None
    products = tuple(term for term in terms if isinstance(term, Product))
    results = [p.features for p in products if p.features is not None]
    results += [term for term in terms if not isinstance(term, Product)]
    kept = tuple(i for i, (_, _, owner) in enumerate(inputs) if owner not in linear)
    arguments = [jaxpr.invars[i] for i in kept] + list(jaxpr.invars[len(inputs) :])
    names = jex.DebugInfo("dense_head", "neurobayes.inference", None, None)
    early = jex.Jaxpr(jaxpr.constvars, arguments, results, independent, debug_info=names)
    return DenseHead(
        np.concatenate([p.slots for p in products]), kept, jex.ClosedJaxpr(early, pieces.closed.consts), products
    )


def _covers(terms: list[Any], shape: tuple[int, ...], num_weights: int) -> bool:
    """Whether the terms make up an output of that shape, with every weight in it once."""
    products = [term for term in terms if isinstance(term, Product)]
    if len(shape) != 2 or any(p.slots.shape[1] != shape[1] for p in products):
        return False
    if any(p.features is not None and p.features.aval.shape[0] != shape[0] for p in products):
        return False
    if any(term.aval.shape != shape for term in terms if not isinstance(term, Product)):
        return False
    slots = np.concatenate([p.slots.ravel() for p in products])
    return len(slots) == len(np.unique(slots)) == num_weights


def _value(eqn: Any, values: list[Any]) -> Any:
    """What an equation makes of weights and of sums of products; None if that is neither."""
    name = eqn.primitive.name
    if name == "dot_general":
        product = matrix_product(eqn, values)
        return None if product is None else [product]
    if name in ("add", "add_any"):
        return _sum(eqn, values)
    return moved(eqn, values[0]) if isinstance(values[0], np.ndarray) else None


def matrix_product(eqn: Any, values: list[Any]) -> Product | None:
    """Features times weights, in the order and shapes of a dense layer."""
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    features, weights = eqn.invars[0], values[1]
    if values[0] is not None or isinstance(features, jex.Literal) or not isinstance(weights, np.ndarray):
        return None
    if batch or features.aval.ndim != 2 or weights.ndim != 2 or tuple(left) != (1,):
        return None
    return Product(features, weights if tuple(right) == (0,) else weights.T)


def _sum(eqn: Any, values: list[Any]) -> list[Any] | None:
    terms = []
    for v, value in zip(eqn.invars, values, strict=True):
        if isinstance(value, list):
            terms += value
        elif isinstance(value, np.ndarray) and value.ndim == 2 and np.all(value == value[:1]):
            terms.append(Product(None, value[:1]))
        elif value is None and not isinstance(v, jex.Literal):
            terms.append(v)
        else:
            return None
    return terms


def moved(eqn: Any, slots: np.ndarray) -> np.ndarray | None:
    """The positions after an equation that only moves weights."""
    name, result = eqn.primitive.name, eqn.outvars[0].aval
    if name in ("reshape", "squeeze", "expand_dims"):
        return slots.reshape(result.shape)
    if name == "transpose":
        return slots.transpose(eqn.params["permutation"])
    if name == "broadcast_in_dim":
        at = eqn.params["broadcast_dimensions"]
        spread = [slots.shape[at.index(axis)] if axis in at else 1 for axis in range(result.ndim)]
        return np.broadcast_to(slots.reshape(spread), result.shape)
    return None
