"""The curvature of a log density at a point, from gradients at simulated targets.

For targets drawn from the likelihood itself, the outer product of the gradient
of the log likelihood has the Fisher information as its mean (for Gaussian and
categorical likelihoods that is the generalised Gauss-Newton matrix). A few
dozen gradients therefore give its diagonal, and a few per dimension all of it,
whatever the network.
"""

import functools

import jax
import jax.numpy as jnp

from .._typing import Array, Key
from ..log_density import Form, Terms

NUM_PROBES = 64


@functools.partial(jax.jit, static_argnums=(0, 4))
def simulated_scores(form: Form, key: Key, position: Array, terms: Terms, num_probes: int) -> Array:
    """Gradients of the log likelihood at simulated targets, ``(num_probes, size)``."""

    def log_likelihood(position, y):
        return jnp.sum(terms.row_weights * form.log_likelihood(position, terms._replace(y=y)))

    def one(key):
        noise_std = form.noise_std(position, terms.noise_prior)
        y = form.likelihood.sample(key, form.outputs(position, terms.carry), noise_std)
        return jax.grad(log_likelihood)(position, y)

    return jax.lax.map(one, jax.random.split(key, num_probes))


@functools.partial(jax.jit, static_argnums=(0, 4))
def inverse_mass(form: Form, key: Key, position: Array, terms: Terms, dense: bool) -> Array:
    """An approximate posterior covariance at ``position``: ``(size,)`` variances, or ``(size, size)``.

    Fisher information plus prior precision, inverted.
    """
    size = position.shape[0]
    scores = simulated_scores(form, key, position, terms, max(NUM_PROBES, 4 * size) if dense else NUM_PROBES)
    prior_precision = jnp.concatenate([1.0 / terms.prior.std**2, _noise_precision(form, position, terms)])
    if not dense:
        return 1.0 / (jnp.mean(scores**2, axis=0) + prior_precision)
    precision = scores.T @ scores / scores.shape[0] + jnp.diag(prior_precision)
    return jnp.linalg.inv(precision)


def _noise_precision(form: Form, position: Array, terms: Terms) -> Array:
    """The curvature of the noise's log prior, ``(num_noise,)``; one where it is less or the prior is not concave.

    That of a backbone's noise, which left-out rows have measured, is far greater than what its own rows say.
    """
    first = position.shape[0] - form.num_noise

    def log_prior(noise):
        return form.log_prior(jnp.concatenate([position[:first], noise]), terms)

    return jnp.maximum(-jnp.diagonal(jax.hessian(log_prior)(position[first:])), 1.0)
