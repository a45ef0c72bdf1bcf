"""Integrates the output layer out of a log density, and draws it back exactly.

Given all other random weights ``h`` and the noise, a Gaussian likelihood with
weights ``w`` that enter the output linearly makes ``w`` Gaussian:

    A = S^-1 + sum_ij r_i phi_ij phi_ij^T / noise_j^2,    m = argmax_w p(w, y | h, noise)
    log p(y, h, noise) = log p(y, m, h, noise) + (k log 2 pi - log det A) / 2

A sampler then moves in ``(h, noise)`` alone, where the posterior is better
conditioned: output weights and features no longer trade scales against each
other. Each draw of ``(h, noise)`` is completed by one exact draw of ``w``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import linearity
from .._typing import Array, Key
from ..likelihoods import LOG_2PI, Gaussian
from ..log_density import Form, LogDensity, Terms

MAX_COLLAPSED = 512
"""Largest number of weights integrated out: each gradient factorises a matrix of this size."""


@dataclasses.dataclass(frozen=True)
class CollapsedForm:
    """The log density with the linear pieces of ``theta`` integrated out.

    A position is the remaining pieces in order, then the unconstrained noise.
    """

    form: Form
    linear: tuple[int, ...]
    pieces: linearity.Pieces

    @property
    def num_noise(self) -> int:
        """Length of the noise at the end of a position."""
        return self.form.num_noise

    @property
    def num_theta(self) -> int:
        """Number of random weights that stay in a position."""
        return self.form.num_theta - len(self.linear_indices)

    @property
    def linear_indices(self) -> np.ndarray:
        """Where the integrated weights are in the full ``theta``."""
        return self._indices(linear=True)

    @property
    def kept_indices(self) -> np.ndarray:
        """Where the entries of a position are in the full position."""
        kept = self._indices(linear=False)
        return np.concatenate([kept, np.arange(self.form.num_noise) + self.form.num_theta])

    def _indices(self, *, linear: bool) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum(self.form.blocks)])
        chosen = [b for b in range(len(self.form.blocks)) if (b in self.linear) == linear]
        return np.concatenate([np.arange(starts[b], starts[b + 1]) for b in chosen] or [np.zeros(0, int)]).astype(int)

    def position_scale(self, terms: Terms) -> Array:
        """As for the full form, for the entries that stay."""
        return self.form.position_scale(terms)[self.kept_indices]

    def complete(self, position: Array, weights: Array) -> Array:
        """The full position out of a collapsed one and the integrated weights."""
        full = jnp.zeros(self.form.num_theta + self.form.num_noise, position.dtype)
        return full.at[self.kept_indices].set(position).at[self.linear_indices].set(weights)

    def conditional(self, position: Array, terms: Terms) -> tuple[Array, Array]:
        """Mean of the integrated weights in prior standard deviations from the prior mean, and its precision's factor.

        Returns ``(mean (k,), lower Cholesky factor (k, k))``.
        """
        at = self.linear_indices
        centre, std = jnp.asarray(terms.prior.mean)[at], jnp.asarray(terms.prior.std)[at]
        full = self.complete(position, centre)
        fixed = [full[start:stop] for start, stop in self.pieces.bounds]
        local = np.full(self.form.num_theta, -1)
        local[at] = np.arange(len(at))

        def outputs_at(u):
            weights = centre + std * u
            slices = [
                weights[local[start] : local[start] + stop - start] if owner in self.linear else value
                for (start, stop), owner, value in zip(self.pieces.bounds, self.pieces.owners, fixed, strict=True)
            ]
            return self.pieces(slices, terms.carry)

        outputs, pushed = jax.linearize(outputs_at, jnp.zeros(len(at)))
        features = jax.vmap(pushed)(jnp.eye(len(at)))  # (k, rows, outputs)
        noise_std = self.form.noise_std(self.complete(position, centre), terms.noise_prior)
        weighted = features * terms.row_weights[:, None] / noise_std**2
        precision = jnp.einsum("kij,lij->kl", weighted, features) + jnp.eye(len(at))
        factor = jnp.linalg.cholesky(precision)
        mean = jax.scipy.linalg.cho_solve((factor, True), jnp.einsum("kij,ij->k", weighted, terms.y - outputs))
        return mean, factor

    def __call__(self, position: Array, terms: Terms) -> Array:
        """The log joint density of the position and the data."""
        mean, factor = self.conditional(position, terms)
        at = self.linear_indices
        std = jnp.asarray(terms.prior.std)[at]
        # At its maximum the joint density does not change with the weights to first order (envelope theorem).
        weights = jax.lax.stop_gradient(jnp.asarray(terms.prior.mean)[at] + std * mean)
        joint = self.form(self.complete(position, weights), terms)
        log_volume = jnp.sum(jnp.log(std)) - jnp.sum(jnp.log(jnp.diagonal(factor)))
        return joint + 0.5 * len(at) * LOG_2PI + log_volume

    def draw(self, key: Key, position: Array, terms: Terms) -> Array:
        """The full position with an exact draw of the integrated weights."""
        mean, factor = self.conditional(position, terms)
        at = self.linear_indices
        noise = jax.scipy.linalg.solve_triangular(factor.T, jax.random.normal(key, mean.shape), lower=False)
        weights = jnp.asarray(terms.prior.mean)[at] + jnp.asarray(terms.prior.std)[at] * (mean + noise)
        return self.complete(position, weights)


def collapsed_form(log_density: LogDensity) -> CollapsedForm | None:
    """The form with its linear pieces integrated out; None where there are none, or nothing would remain."""
    form = log_density.form
    if type(form.likelihood) is not Gaussian or not form.blocks or form.hoisted.recomputes:
        return None
    pieces = linearity.cut(form.hoisted, form.blocks, log_density.terms.carry)
    if pieces is None:
        return None
    linear = pieces.affine_blocks(len(form.blocks))
    size = sum(form.blocks[block] for block in linear)
    if not linear or len(linear) == len(form.blocks) or size > MAX_COLLAPSED:
        return None
    return CollapsedForm(form, linear, pieces)


@functools.partial(jax.jit, static_argnums=0)
def complete_draws(form: CollapsedForm, key: Key, positions: Array, terms: Terms) -> Array:
    """Full positions ``(draws, size)`` for collapsed ones; draw i depends on the key and i alone."""

    def one(indexed):
        index, position = indexed
        return form.draw(jax.random.fold_in(key, index), position, terms)

    return jax.lax.map(one, (jnp.arange(len(positions)), positions))
