"""The marginal likelihood of a Gaussian linear model, and its gradient in closed form.

    y_j ~ N(features.T @ w_j, noise_j^2)   with row weights r,    w_j ~ N(mean_j, std_j^2)   for each output j

With ``u = (w - mean) / std`` the posterior of ``u_j`` is Gaussian with precision

    A_j = I + S_j features diag(r) features.T S_j / noise_j^2.

Differentiating through its factorisation would cost several times as much as
the two matrix products that the gradient takes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._typing import Array, Key
from ..likelihoods import LOG_2PI


class Design(NamedTuple):
    """One linear model: rows last, outputs first, but for the weights' prior, which is ``(features, outputs)``."""

    features: Any
    targets: Any
    noise_std: Any
    row_weights: Any
    mean: Any
    std: Any


class _Solution(NamedTuple):
    """The posterior of ``u``: its mean (outputs, features), and the inverse of the precision's Cholesky factor."""

    mean: Any
    factor: Any
    inverse_factor: Any
    stacked: Any


def _solve(design: Design) -> _Solution:
    features, targets, noise_std, row_weights, mean, std = design
    num_features = features.shape[0]
    stacked = jnp.concatenate([features, targets - mean.T @ features])
    products = (features * row_weights) @ stacked.T
    scale = (std / noise_std).T
    identity = jnp.eye(num_features, dtype=features.dtype)
    precision = scale[:, :, None] * products[:, :num_features] * scale[:, None, :] + identity
    factor = jnp.linalg.cholesky(precision)
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.broadcast_to(identity, factor.shape), lower=True)
    pull = scale / noise_std[:, None] * products[:, num_features:].T
    solved = jnp.einsum("jlk,jl->jk", inverse, jnp.einsum("jlk,jk->jl", inverse, pull))
    return _Solution(solved, factor, inverse, stacked)


def _value(design: Design, solution: _Solution, residual: Array) -> tuple[Array, Array]:
    """The log marginal likelihood, and each output's weighted sum of squares at the posterior mean."""
    squares = (residual * residual) @ design.row_weights
    num_rows, noise_std = jnp.sum(design.row_weights), design.noise_std
    fit = num_rows * (LOG_2PI + 2.0 * jnp.log(noise_std)) + squares / noise_std**2
    log_factor = jnp.sum(jnp.log(jnp.diagonal(solution.factor, axis1=1, axis2=2)))
    return -0.5 * (jnp.sum(fit) + jnp.sum(solution.mean**2)) - log_factor, squares


def log_marginal(design: Design) -> Array:
    """Log density of the targets in nats, the weights integrated out.

    Differentiable (backwards, once) in features, targets and noise; row weights and prior are taken as constants.
    """
    fixed = (design.row_weights, design.mean, design.std)
    return _log_marginal(design.features, design.targets, design.noise_std, *map(jax.lax.stop_gradient, fixed))


@jax.custom_vjp
def _log_marginal(*arguments: Array) -> Array:
    design = Design(*arguments)
    solution = _solve(design)
    num_features = len(design.features)
    shift = design.std.T * solution.mean
    residual = solution.stacked[num_features:] - shift @ solution.stacked[:num_features]
    return _value(design, solution, residual)[0]


def _forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    design = Design(*arguments)
    solution = _solve(design)
    noise_std, num_features = design.noise_std[:, None], len(design.features)
    covariance = jnp.einsum("jlk,jlm->jkm", solution.inverse_factor, solution.inverse_factor)
    scale = (design.std / design.noise_std).T
    spread = jnp.einsum("jk,jkm,jm->km", scale, covariance, scale)
    shift = design.std.T * solution.mean
    outer = (design.mean.T + shift) / noise_std**2
    # One product gives the residuals and what the gradient in the features is made of.
    upper = jnp.concatenate([-(spread + outer.T @ shift), outer.T], axis=1)
    lower = jnp.concatenate([-shift, jnp.eye(len(shift), dtype=shift.dtype)], axis=1)
    combined = jnp.concatenate([upper, lower]) @ solution.stacked
    residual = combined[num_features:]
    value, squares = _value(design, solution, residual)
    weighted = design.row_weights * combined
    num_rows, noise_std = jnp.sum(design.row_weights), design.noise_std
    free = num_features - jnp.trace(covariance, axis1=1, axis2=2)
    slope = (free - num_rows + squares / noise_std**2) / noise_std
    return value, (weighted[:num_features], -weighted[num_features:] / noise_std[:, None] ** 2, slope)


def _backward(gradients: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    return (*(cotangent * gradient for gradient in gradients), None, None, None)


_log_marginal.defvjp(_forward, _backward)


def draw(design: Design, key: Key) -> Array:
    """An exact draw of the weights given the targets, ``(features, outputs)``."""
    solution = _solve(design)
    normals = jax.random.normal(key, solution.mean.shape, solution.mean.dtype)
    whitened = solution.mean + jnp.einsum("jlk,jl->jk", solution.inverse_factor, normals)
    return design.mean + design.std * whitened.T
