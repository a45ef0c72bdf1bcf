"""The generalised Gauss-Newton curvature of a log likelihood in the random weights, and Gaussians made of it.

Everything is in whitened weights ``u = (theta - prior mean) / prior std``,
where the prior is standard normal and the curvature of the posterior is
``I + G`` with

    G = sum_i r_i S J_i^T H_i J_i S,    H_i = -d2 log p(y_i | f_i) / df_i^2,

or, where that depends on the target and may be negative, its mean over targets,
the Fisher information (noise that the network gives).

``G`` is never formed unless asked for: products with it are one forward and
one backward pass (Martens 2020, "New insights and perspectives on the natural
gradient method", JMLR 21).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import linearity
from .._typing import Array, Key
from ..likelihoods import HeteroskedasticGaussian
from ..log_density import Form, Terms
from ._kronecker import Basis, decomposed, factors, require_layers

OVERSAMPLING = 10
NUM_POWER_STEPS = 4
"""Extra directions and passes of the randomised eigensolver (Halko, Martinsson & Tropp 2011, SIAM Review 53)."""

MAX_EXACT_DIAGONAL = 4096
NUM_DIAGONAL_PROBES = 256
"""Up to this many weights the diagonal is exact; beyond, each entry has a relative error of about 9 %."""

_BATCH = 16
"""Directions put through the network side by side."""


class Spectrum(NamedTuple):
    """``G`` as ``vectors @ diag(values) @ vectors.T``; ``vectors`` None stands for the identity.

    Of Kronecker products the vectors are a ``Basis``, which multiplies as an array does.

    ``by_noise`` (values, noises) says how much of each eigenvalue comes from the outputs of each noise.
    """

    values: np.ndarray
    vectors: np.ndarray | Basis | None
    by_noise: np.ndarray


def to_position(u: Any, noise: Any, terms: Terms) -> Array:
    """The position for whitened weights and unconstrained noise."""
    return jnp.concatenate([jnp.asarray(terms.prior.mean) + jnp.asarray(terms.prior.std) * u, noise])


def spectrum(
    form: Form, key: Key, u: np.ndarray, noise: np.ndarray, terms: Terms, structure: str, rank: int
) -> Spectrum:
    """The curvature at a point: ``"full"``, ``"low_rank"`` (leading eigenpairs), ``"kronecker"`` or ``"diagonal"``."""
    if structure == "kronecker":
        pieces: Any = linearity.cut(form.hoisted, form.blocks, terms.carry) if form.blocks else None
        by_noise, basis = decomposed(require_layers(pieces), _factors(form, pieces, u, noise, terms), terms.prior.std)
        return Spectrum(by_noise.sum(axis=1), basis, by_noise)
    if structure == "diagonal":
        exact = form.num_theta <= MAX_EXACT_DIAGONAL
        compute: Any = _diagonal if exact else _probed_diagonal
        by_noise = np.asarray(compute(form, key, u, noise, terms), float)
        return Spectrum(by_noise.sum(axis=1), None, by_noise)
    if structure == "full":
        values, vectors = np.linalg.eigh(np.asarray(_dense(form, u, noise, terms), float))
    else:
        values, vectors = (np.asarray(x, float) for x in _leading(form, key, u, noise, terms, min(rank, len(u))))
    values = np.maximum(values, 0.0)
    if form.num_noise > 1:
        by_noise = np.asarray(_by_output(form, u, noise, terms, vectors.astype(np.float32)), float)
    else:
        by_noise = values[:, None]
    return Spectrum(values, vectors, by_noise)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _factors(form: Form, pieces: linearity.Pieces, u: Array, noise: Array, terms: Terms):
    position = to_position(u, noise, terms)
    row_weights = jnp.asarray(terms.row_weights)
    if form.num_noise > 1:
        scale = jnp.sqrt(row_weights)[None, :, None] / form.noise_std(position, terms.noise_prior)[:, None, None]
        roots = (scale * jnp.eye(form.num_noise)[:, None, :])[..., None]
    else:
        roots = _root(form, position, terms)[None]
    return factors(pieces, require_layers(pieces), position[: form.num_theta], terms.carry, roots, row_weights)


def _root(form: Form, position: Array, terms: Terms) -> Array:
    """Square roots of the weighted curvature of each row in its outputs, (rows, outputs, outputs): H = R R^T."""
    noise_std, outputs = form.noise_std(position, terms.noise_prior), form.outputs(position, terms.carry)
    if isinstance(form.likelihood, HeteroskedasticGaussian):
        roots = form.likelihood.fisher_root(outputs) * jnp.sqrt(jnp.asarray(terms.row_weights))[:, None]
        return roots[:, :, None] * jnp.eye(outputs.shape[-1])

    def log_prob(outputs, y):
        return form.likelihood.log_prob(outputs[None], y[None], noise_std)[0]

    curvature = -jax.vmap(jax.hessian(log_prob))(outputs, jnp.asarray(terms.y))
    values, vectors = jnp.linalg.eigh(curvature)
    scaled = jnp.maximum(values, 0.0) * jnp.asarray(terms.row_weights)[:, None]
    return vectors * jnp.sqrt(scaled)[:, None, :]


def _linearised(form: Form, u: Array, noise: Array, terms: Terms):
    """Roots of the rows' curvature, and the derivative of the outputs forwards and backwards."""
    _, forward = jax.linearize(lambda u: form.outputs(to_position(u, noise, terms), terms.carry), u)
    transposed = jax.linear_transpose(forward, u)
    return _root(form, to_position(u, noise, terms), terms), forward, lambda change: transposed(change)[0]


def _products(form: Form, u: Array, noise: Array, terms: Terms):
    """The map from rows ``(directions, size)`` to ``rows @ G``."""
    root, forward, backward = _linearised(form, u, noise, terms)

    def product(v):
        half = jnp.einsum("nkm,nk->nm", root, forward(v))
        return backward(jnp.einsum("nkm,nm->nk", root, half))

    return lambda rows: jax.lax.map(product, rows, batch_size=min(_BATCH, len(rows)))


@functools.partial(jax.jit, static_argnums=0)
def _dense(form: Form, u: Array, noise: Array, terms: Terms) -> Array:
    matrix = _products(form, u, noise, terms)(jnp.eye(len(u), dtype=u.dtype))
    return 0.5 * (matrix + matrix.T)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _leading(form: Form, key: Key, u: Array, noise: Array, terms: Terms, rank: int) -> tuple[Array, Array]:
    products = _products(form, u, noise, terms)
    width = min(rank + OVERSAMPLING, len(u))
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (len(u), width), u.dtype))
    basis = jax.lax.fori_loop(0, NUM_POWER_STEPS, lambda _, q: jnp.linalg.qr(products(q.T).T)[0], basis)
    small = products(basis.T) @ basis
    values, vectors = jnp.linalg.eigh(0.5 * (small + small.T))
    return values[-rank:], basis @ vectors[:, -rank:]


@functools.partial(jax.jit, static_argnums=0)
def _by_output(form: Form, u: Array, noise: Array, terms: Terms, vectors: Array) -> Array:
    """What each output adds to each eigenvalue, under Gaussian noise, ``(values, outputs)``."""
    _, forward, _ = _linearised(form, u, noise, terms)
    weights = jnp.asarray(terms.row_weights)[:, None]
    noise_std = form.noise_std(to_position(u, noise, terms), terms.noise_prior)

    def one(v):
        return jnp.sum(weights * forward(v) ** 2, axis=0) / noise_std**2

    return jax.lax.map(one, vectors.T, batch_size=min(_BATCH, vectors.shape[1]))


@functools.partial(jax.jit, static_argnums=0)
def _diagonal(form: Form, key: Key, u: Array, noise: Array, terms: Terms) -> Array:
    """Entries of the diagonal, one direction at a time, ``(size, noises)``."""
    if form.num_noise > 1:
        return _by_output(form, u, noise, terms, jnp.eye(len(u), dtype=u.dtype))
    root, forward, _ = _linearised(form, u, noise, terms)

    def one(m):
        return jnp.sum(jnp.einsum("nkm,nk->nm", root, forward(jax.nn.one_hot(m, len(u), dtype=u.dtype))) ** 2)

    return jax.lax.map(one, jnp.arange(len(u)), batch_size=min(_BATCH, len(u)))[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _probed_diagonal(form: Form, key: Key, u: Array, noise: Array, terms: Terms) -> Array:
    """The diagonal as the mean square of gradients along random signs, ``(size, noises)``."""
    root, _, backward = _linearised(form, u, noise, terms)
    groups = jnp.eye(form.num_noise) if form.num_noise > 1 else jnp.ones((1, root.shape[1]))

    def add(i, total):
        signs = jax.random.rademacher(jax.random.fold_in(key, i), root.shape[:2], root.dtype)
        change = jnp.einsum("nkm,nm->nk", root, signs)
        return total + jax.vmap(lambda group: backward(change * group))(groups) ** 2

    zeros = jnp.zeros((len(groups), len(u)), u.dtype)
    return jax.lax.fori_loop(0, NUM_DIAGONAL_PROBES, add, zeros).T / NUM_DIAGONAL_PROBES


@dataclasses.dataclass(frozen=True)
class GaussianApproximation:
    """A Gaussian over positions: the random weights, and independent of them the unconstrained noise.

    The weights' covariance is ``S (I + V diag(values) V^T)^-1 S``, the prior's outside the columns of ``V``.

    Attributes
    ----------
    mode : (size,) its centre.
    prior_std : (weights,) the diagonal of ``S``.
    eigenvalues : (rank,) curvature of the data in units of the prior's.
    eigenvectors : (weights, rank) the columns of ``V``, an array or a ``Basis``; None for the identity.
    noise_cov : (noises, noises) covariance of the unconstrained noise.
    noise_var : (noises,) mean noise variance.
    """

    mode: np.ndarray
    prior_std: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray | Basis | None
    noise_cov: np.ndarray
    noise_var: np.ndarray

    def moments(self, hoisted: Any, carry: Any, num_rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As ``predictive_moments``, of the first ``num_rows``."""
        mean, variance = predictive_moments(self, hoisted, carry)
        return mean[:num_rows], variance[:num_rows]

    @property
    def is_complete(self) -> bool:
        """Whether the curvature is known in all directions, so that moments take a pass per weight at most."""
        return len(self.eigenvalues) == len(self.prior_std) <= MAX_EXACT_DIAGONAL

    def draw(self, rng: np.random.Generator, num_draws: int) -> np.ndarray:
        """Independent positions ``(draws, size)`` in float32."""
        num_theta = len(self.prior_std)
        draws = np.empty((num_draws, len(self.mode)), np.float32)
        for_weights, for_noise = rng.spawn(2)
        shrink = 1.0 / np.sqrt(1.0 + self.eigenvalues)
        for first in range(0, num_draws, 256):  # bounds memory; the stream of numbers is one
            block = for_weights.standard_normal((min(256, num_draws - first), num_theta))
            if self.eigenvectors is None:
                block *= shrink
            else:
                block -= ((block @ self.eigenvectors) * (1.0 - shrink)) @ self.eigenvectors.T
            draws[first : first + 256, :num_theta] = self.mode[:num_theta] + self.prior_std * block
        normals = for_noise.standard_normal((num_draws, len(self.noise_cov)))
        draws[:, num_theta:] = self.mode[num_theta:] + normals @ np.linalg.cholesky(self.noise_cov).T
        return draws


def _as_array(vectors: np.ndarray | Basis) -> np.ndarray:
    return vectors.dense() if isinstance(vectors, Basis) else vectors


def predictive_moments(gaussian: GaussianApproximation, hoisted: Any, carry: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``f(x; mode)`` and variance ``J cov J^T`` of the linearised network, without noise, each ``(n, outputs)``.

    Draws of the weights put through the network itself have a larger variance
    where it is curved within the Gaussian's width (Immer, Korzepa & Bauer 2021,
    arXiv:2008.08646); this is the prediction the approximation is about.
    ``hoisted`` and ``carry`` are the split forward pass for the rows wanted, as
    for ``last_layer.analytic_moments``. It takes a pass per weight or, if they
    are fewer or the curvature is of low rank, per row: then give few rows.
    """
    size = len(gaussian.prior_std)
    theta = np.asarray(gaussian.mode[:size], np.float32)
    vectors = None if gaussian.eigenvectors is None else _as_array(gaussian.eigenvectors).astype(np.float32)
    shrink = (gaussian.eigenvalues / (1.0 + gaussian.eigenvalues)).astype(np.float32)
    mean, variance = _moments(
        hoisted, gaussian.is_complete, theta, np.float32(gaussian.prior_std), vectors, shrink, carry
    )
    return np.asarray(mean, float), np.asarray(variance, float)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(hoisted: Any, complete: bool, theta: Array, std: Array, vectors: Array | None, shrink: Array, carry: Any):
    outputs = functools.partial(_late, hoisted, carry)
    if complete and len(theta) <= math.prod(jax.eval_shape(outputs, theta).shape):
        mean, forward = jax.linearize(outputs, theta)

        def add(m, total):
            direction = jax.nn.one_hot(m, len(theta), dtype=theta.dtype) if vectors is None else vectors[:, m]
            return total + (1.0 - shrink[m]) * forward(std * direction) ** 2

        return mean, jax.lax.fori_loop(0, len(theta), add, jnp.zeros_like(mean))
    mean, backward = jax.vjp(outputs, theta)

    def variance(index):
        (slope,) = backward(jax.nn.one_hot(index, mean.size, dtype=mean.dtype).reshape(mean.shape))
        slope = slope * std
        along = slope if vectors is None else slope @ vectors
        if vectors is None:
            return jnp.sum(slope**2 * (1.0 - shrink))
        # Inside the columns the variance is a sum of positive terms; subtracting would cancel.
        outside = slope - vectors @ along
        return jnp.sum(outside**2) + jnp.sum(along**2 * (1.0 - shrink))

    variances = jax.lax.map(variance, jnp.arange(mean.size), batch_size=min(_BATCH, mean.size))
    return mean, variances.reshape(mean.shape)


def _late(hoisted: Any, carry: Any, theta: Array) -> Array:
    return hoisted.late(theta, carry)
