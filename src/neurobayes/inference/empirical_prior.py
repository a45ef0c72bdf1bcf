"""Prior scales of the Bayesian weights learnt from the data, one for each layer's leaf.

The network is linearised at the trained weights, where the weights integrate
out in closed form; the scales with the largest evidence times their prior are
kept (empirical Bayes; MacKay 1992, "A practical Bayesian framework for
backpropagation networks", Neural Computation 4). For an output layer under
Gaussian noise the evidence is exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from .._optimise import least
from .._typing import Array, Key
from ..log_density import Form, LogDensity, Terms
from ._gauss_newton import spectrum, to_position

MAX_DENSE = 1500
"""Up to this many weights the whole curvature is used, beyond its diagonal."""

LOG_SPREAD = 1.0
"""Standard deviation of the logarithm of each scale a priori: 95 % between 1/7 and 7 times the one given."""


def learn_scales(density: LogDensity, key: Key, start: np.ndarray) -> np.ndarray:
    """Factors on the prior standard deviations, one for each block of ``density.form.blocks``.

    Parameters
    ----------
    start : position of the trained weights, with the noise.
    """
    form, terms = density.form, density.terms
    blocks = form.blocks or (form.num_theta,)
    theta, noise = start[: form.num_theta], start[form.num_theta :]
    u = ((theta - np.asarray(terms.prior.mean)) / np.asarray(terms.prior.std)).astype(np.float32)
    structure = "full" if form.num_theta <= MAX_DENSE else "diagonal"
    found = spectrum(form, key, u, noise, terms, structure, rank=0)
    slope = np.asarray(_slope(form, u, noise, terms), float)
    if found.vectors is None:
        curvature = np.asarray(found.values, float)
        pull = slope + curvature * u
    else:
        curvature = (found.vectors * found.values) @ found.vectors.T
        pull = slope + curvature @ u
    members = np.repeat(np.arange(len(blocks)), blocks)

    def negative(logs: np.ndarray) -> tuple[float, np.ndarray]:
        value, by_weight = _log_evidence(curvature, pull, np.exp(logs)[members])
        gradient = np.bincount(members, by_weight, minlength=len(blocks))
        return 0.5 * np.sum((logs / LOG_SPREAD) ** 2) - value, logs / LOG_SPREAD**2 - gradient

    bounds = [(-6.0 * LOG_SPREAD, 6.0 * LOG_SPREAD)] * len(blocks)
    best = least(negative, np.zeros(len(blocks)), bounds)
    return np.exp(best.x)


@functools.partial(jax.jit, static_argnums=0)
def _slope(form: Form, u: Array, noise: Array, terms: Terms) -> Array:
    """Gradient of the log likelihood in the whitened weights."""

    def log_likelihood(u):
        return jnp.sum(terms.row_weights * form.log_likelihood(to_position(u, noise, terms), terms))

    return jax.grad(log_likelihood)(u)


def _log_evidence(curvature: np.ndarray, pull: np.ndarray, scale: np.ndarray) -> tuple[float, np.ndarray]:
    """Log evidence of the linearised model up to a constant, and its derivative by the logarithm of each scale.

    ``curvature`` is the matrix of the log likelihood in whitened weights, or its diagonal; ``pull`` the gradient of
    the log likelihood at the prior mean.
    """
    precision = scale**-2.0
    if curvature.ndim == 1:
        total = precision + curvature
        solved, variance, log_det = pull / total, 1.0 / total, np.sum(np.log(total))
    else:
        factor = scipy.linalg.cho_factor(curvature + np.diag(precision), lower=True)
        solved = scipy.linalg.cho_solve(factor, pull)
        variance = np.diag(scipy.linalg.cho_solve(factor, np.eye(len(pull))))
        log_det = 2.0 * np.sum(np.log(np.diag(factor[0])))
    value = 0.5 * pull @ solved - 0.5 * log_det - np.sum(np.log(scale))
    return float(value), precision * (solved**2 + variance) - 1.0
