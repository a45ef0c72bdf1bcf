"""The Gauss-Newton matrix of dense layers as Kronecker products, and the basis of their eigenvectors.

Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored
approximate curvature"; for posteriors Ritter, Botev & Barber (2018), "A scalable
Laplace approximation for neural networks". Each layer's block is approximated by

    (sum_i r_i a_i a_i^T / sum_i r_i)  (x)  sum_i r_i g_i g_i^T

with the layer's inputs ``a_i`` and the derivatives ``g_i`` of the log likelihood's
square roots in its outputs. It is exact for one row, and for a linear model with
one output; between layers it knows no correlation.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from .._typing import Array
from ..errors import OptionError
from ..linearity import Pieces
from ._dense_head import Product, matrix_product, moved


class Layer(NamedTuple):
    """A dense layer: where its kernel, and below it its bias, are in ``theta``; its inputs; what follows its outputs.

    ``before`` gives inputs ``(rows, in)`` and outputs ``(rows, out)`` from the slices of ``theta``, ``after`` the
    network's outputs from this layer's outputs and the slices.
    """

    slots: np.ndarray
    has_bias: bool
    before: jex.ClosedJaxpr
    after: jex.ClosedJaxpr


@functools.lru_cache(maxsize=64)
def dense_layers(pieces: Pieces) -> tuple[Layer, ...] | None:
    """The layers that all slices of ``theta`` belong to; None if some weight enters in another way."""
    jaxpr = pieces.closed.jaxpr
    slots: dict[Any, np.ndarray] = {v: np.arange(*b) for v, b in zip(jaxpr.invars, pieces.bounds, strict=False)}
    products: dict[Any, Product] = {}
    biases: dict[Any, np.ndarray] = {}
    for eqn in jaxpr.eqns:
        values = [None if isinstance(v, jex.Literal) else slots.get(v) for v in eqn.invars]
        if all(value is None for value in values):
            continue
        output = eqn.outvars[0]
        product = matrix_product(eqn, values) if eqn.primitive.name == "dot_general" else None
        if product is not None:
            products[output] = product
        elif (bias := _bias_of(eqn, values, products)) is not None:
            biases[bias[0]] = bias[1]
        elif (rest := None if values[0] is None else moved(eqn, values[0])) is not None:
            slots[output] = rest
        else:
            return None
    layers = tuple(_layer(pieces.closed, v, product, biases.get(v)) for v, product in products.items())
    covered = np.concatenate([layer.slots.ravel() for layer in layers] or [np.zeros(0, int)])
    size = sum(stop - start for start, stop in pieces.bounds)
    return layers if len(covered) == len(np.unique(covered)) == size else None


def _bias_of(eqn: Any, values: list[Any], products: dict[Any, Product]) -> tuple[Any, np.ndarray] | None:
    """The product that weights are added to row by row, and their positions ``(1, out)``."""
    if eqn.primitive.name != "add":
        return None
    for v, value in ((eqn.invars[0], values[1]), (eqn.invars[1], values[0])):
        if value is not None and not isinstance(v, jex.Literal) and v in products and value.ndim == 2:
            return (v, value[:1]) if np.all(value == value[:1]) else None
    return None


def _layer(closed: jex.ClosedJaxpr, output: Any, product: Product, bias: np.ndarray | None) -> Layer:
    jaxpr, names = closed.jaxpr, jex.DebugInfo("dense_layer", "neurobayes.inference", None, None)
    parts = [product.slots] if bias is None else [product.slots, bias]
    before = jex.Jaxpr(jaxpr.constvars, jaxpr.invars, [product.features, output], jaxpr.eqns, debug_info=names)
    others = [eqn for eqn in jaxpr.eqns if output not in eqn.outvars]
    after = jex.Jaxpr(jaxpr.constvars, [output, *jaxpr.invars], jaxpr.outvars, others, debug_info=names)
    return Layer(
        np.concatenate(parts), bias is not None, jex.ClosedJaxpr(before, closed.consts),
        jex.ClosedJaxpr(after, closed.consts),
    )  # fmt: skip


def factors(
    pieces: Pieces, layers: tuple[Layer, ...], theta: Array, carry: Any, roots: Array, row_weights: Array
) -> list[tuple[Array, Array]]:
    """Both factors of each layer: ``(in, in)`` of its inputs and ``(groups, out, out)`` of its outputs.

    ``roots`` (groups, rows, outputs, columns) are square roots of the rows' weighted curvature, by noise.
    """
    arguments = [*(theta[start:stop] for start, stop in pieces.bounds), *jax.tree.leaves(carry)]
    found = []
    for layer in layers:
        inputs, outputs = jex.jaxpr_as_fun(layer.before)(*arguments)
        if layer.has_bias:
            inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[:, :1])], axis=1)
        of_inputs = (inputs * row_weights[:, None]).T @ inputs / jnp.sum(row_weights)
        after = jex.jaxpr_as_fun(layer.after)
        _, backward = jax.vjp(lambda s, after=after: after(s, *arguments)[0], outputs)
        columns = jnp.moveaxis(roots, -1, 1)  # (groups, columns, rows, outputs)
        slopes = jax.vmap(jax.vmap(lambda change, backward=backward: backward(change)[0]))(columns)
        found.append((of_inputs, jnp.einsum("gcni,gcnj->gij", slopes, slopes)))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Eigenvectors of Kronecker products as the columns of an orthogonal matrix that is never formed.

    ``layers`` holds (slots, eigenvectors of the inputs' factor, eigenvectors of the outputs'). Coefficients run
    over the layers, and in each over pairs of eigenvectors.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    is_transposed: bool = False
    __array_ufunc__ = None  # lets ``array @ basis`` come here

    @property
    def T(self) -> "Basis":
        """The transposed matrix, which is the inverse."""
        return dataclasses.replace(self, is_transposed=not self.is_transposed)

    def __matmul__(self, columns: np.ndarray) -> np.ndarray:
        return (np.asarray(columns).T @ self.T).T

    def __rmatmul__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        result, first = np.empty(rows.shape, np.result_type(rows, float)), 0
        for slots, left, right in self.layers:
            block = slice(first, first + slots.size)
            if self.is_transposed:
                result[..., slots] = left @ rows[..., block].reshape(*rows.shape[:-1], *slots.shape) @ right.T
            else:
                result[..., block] = (left.T @ rows[..., slots] @ right).reshape(*rows.shape[:-1], -1)
            first += slots.size
        return result

    def dense(self) -> np.ndarray:
        """The matrix itself."""
        return np.eye(sum(slots.size for slots, _, _ in self.layers)) @ self


def decomposed(
    layers: tuple[Layer, ...], found: list[tuple[Any, Any]], prior_std: np.ndarray
) -> tuple[np.ndarray, Basis]:
    """Eigenvalues ``(size, groups)`` by noise in units of the prior's, and the basis."""
    values, parts = [], []
    for layer, (of_inputs, of_outputs) in zip(layers, found, strict=True):
        std = np.asarray(prior_std, float)[layer.slots]
        if np.any(std != std[:, :1]):
            raise OptionError(
                "structure='kronecker' needs one prior standard deviation for all weights of a layer's kernel. Use "
                "structure='full', 'low_rank' or 'diagonal'."
            )
        scale, of_outputs = std[:, 0], np.asarray(of_outputs, float)
        left_values, left = np.linalg.eigh(scale[:, None] * np.asarray(of_inputs, float) * scale)
        _, right = np.linalg.eigh(of_outputs.sum(axis=0))
        by_group = np.einsum("ij,gik,kj->jg", right, of_outputs, right)
        values.append(
            (np.maximum(left_values, 0.0)[:, None, None] * np.maximum(by_group, 0.0)).reshape(-1, by_group.shape[1])
        )
        parts.append((layer.slots, left, right))
    return np.concatenate(values), Basis(tuple(parts))


def require_layers(pieces: Pieces | None) -> tuple[Layer, ...]:
    """The dense layers, or an error that says what the structure is for."""
    layers = None if pieces is None else dense_layers(pieces)
    if layers is None:
        raise OptionError(
            "structure='kronecker' is for whole dense layers: some Bayesian weight is of another kind of layer, of a "
            "layer used twice, or chosen without the rest of its kernel. Use structure='full', 'low_rank' or "
            "'diagonal'."
        )
    return layers
