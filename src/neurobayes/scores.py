"""Scores of single weights that need data: how much the likelihood asks of each weight at the trained values.

Gradients are taken row by row, in chunks of rows whose gradients together hold
about ``VALUES_PER_CHUNK`` numbers, so that memory follows the size of the
network and not that of the data.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import data, trees
from ._typing import Array, Params, State
from .likelihoods import Categorical, Gaussian, HeteroskedasticGaussian, Likelihood
from .networks.base import Network
from .training import Rows

VALUES_PER_CHUNK = 2**24
MAX_ROWS_PER_CHUNK = 128


def fisher(
    network: Network, params: Params, state: State, rows: Rows, likelihood: Likelihood, noise_std: Any
) -> Params:
    """The diagonal of the empirical Fisher information: mean squared gradient of a row's log likelihood.

    ``mean_i (d log p(y_i | f(x_i; w), noise) / dw)^2`` at ``params``, by the targets as they
    are (not by targets drawn from the model).

    Parameters
    ----------
    rows : (n, …) inputs and targets in working units; rows of ``real`` zero do not count.
    noise_std : (d,) noise of each output in the same units; ignored by classes.

    Returns
    -------
    Pytree shaped like ``params``.
    """
    sums = _sum_over_rows(_squared_gradient, network, likelihood, params, state, rows, noise_std)
    count = np.float32(np.sum(np.asarray(rows.real)))
    return jax.tree.map(lambda leaf: np.asarray(leaf) / count, sums)


def ggn_diagonal(
    network: Network, params: Params, state: State, rows: Rows, likelihood: Likelihood, noise_std: Any
) -> Params:
    """The diagonal of the generalised Gauss-Newton matrix of the negative log likelihood, summed over rows.

    ``sum_i diag(J_i' H_i J_i)``, with ``J_i`` the Jacobian of the outputs by the weights and
    ``H_i`` the curvature of the likelihood in the outputs: ``1 / noise_std**2`` for numbers,
    ``diag(p) - p p'`` for classes. Exact, at the price of one gradient for each row and output.
    Arguments and result as for ``fisher``.
    """
    sums = _sum_over_rows(_squared_curvature, network, likelihood, params, state, rows, noise_std)
    return jax.tree.map(np.asarray, sums)


def laplace_variance(
    network: Network,
    params: Params,
    state: State,
    rows: Rows,
    likelihood: Likelihood,
    noise_std: Any,
    prior_std: Params,
) -> Params:
    """The posterior variance of each weight in the diagonal Laplace approximation.

    ``1 / (GGN + 1 / prior_std**2)``, with the diagonal of ``ggn_diagonal``. ``prior_std`` is
    shaped like ``params``; the other arguments are as for ``fisher``.
    """
    curvature = ggn_diagonal(network, params, state, rows, likelihood, noise_std)
    return jax.tree.map(lambda ggn, std: 1.0 / (ggn + 1.0 / np.asarray(std) ** 2), curvature, prior_std)


def curvature_factor(likelihood: Likelihood, outputs: Array, y: Array, noise_std: Array) -> Array:
    """Columns ``l_k`` with ``sum_k l_k l_k' = H``, the curvature of one row's likelihood in its outputs; ``(d, d)``.

    That of the Fisher information for the library's own likelihoods. Others are differentiated twice, and directions
    of negative curvature are left out.
    """
    if type(likelihood) is Gaussian:
        return jnp.diag(jnp.broadcast_to(1.0 / noise_std, outputs.shape))
    if type(likelihood) is Categorical:
        p = jax.nn.softmax(outputs)
        return (jnp.eye(len(p)) - p[:, None]) * jnp.sqrt(p)
    if isinstance(likelihood, HeteroskedasticGaussian):
        return jnp.diag(likelihood.fisher_root(outputs))
    hessian = jax.hessian(lambda f: -likelihood.log_prob(f[None], y[None], noise_std)[0])(outputs)
    values, vectors = jnp.linalg.eigh(hessian)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))


def _squared_gradient(
    network: Network, likelihood: Likelihood, params: Params, state: State, x, y, noise_std
) -> Params:
    def log_likelihood(params):
        return likelihood.log_prob(network.apply(params, state, x[None]), y[None], noise_std)[0]

    return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params))


def _squared_curvature(
    network: Network, likelihood: Likelihood, params: Params, state: State, x, y, noise_std
) -> Params:
    outputs, pull_back = jax.vjp(lambda params: network.apply(params, state, x[None])[0], params)
    columns = curvature_factor(likelihood, outputs, y, noise_std).T

    def add(total, column):  # one output at a time, so that memory does not grow with their number
        (gradient,) = pull_back(column)
        return jax.tree.map(lambda t, g: t + g**2, total, gradient), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), columns)[0]


def _sum_over_rows(
    quantity: Callable[..., Params],
    network: Network,
    likelihood: Likelihood,
    params: Params,
    state: State,
    rows: Rows,
    noise_std: Any,
) -> Params:
    """The sum of ``quantity`` over the real rows."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    size = len(rows.real)
    chunk = int(np.clip(VALUES_PER_CHUNK // max(1, trees.num_scalars(params)), 1, min(MAX_ROWS_PER_CHUNK, size)))
    padded = -(-size // chunk) * chunk
    x, y = (data.pad_rows(np.asarray(part), padded).reshape(-1, chunk, *part.shape[1:]) for part in (rows.x, rows.y))
    real = np.pad(np.asarray(rows.real, np.float32), (0, padded - size)).reshape(-1, chunk)
    noise_std = np.asarray(noise_std, np.float32)
    return _sum_over_chunks(quantity, network, likelihood, params, state, Rows(x, y, real), noise_std)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sum_over_chunks(quantity, network, likelihood, params, state, chunks: Rows, noise_std) -> Params:
    def add(total, rows):
        each = jax.vmap(lambda x, y: quantity(network, likelihood, params, state, x, y, noise_std))(rows.x, rows.y)
        return jax.tree.map(lambda t, e: t + jnp.tensordot(rows.real, e, axes=1), total, each), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), chunks)[0]
