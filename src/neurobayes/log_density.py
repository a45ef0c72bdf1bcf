"""The log joint density over the random scalars: where network, partition, prior, likelihood and data meet.

    log p(theta, noise, y) = log p(theta) + log p(noise) + sum_i w_i log p(y_i | f(x_i; theta), noise)

in nats, over the full data, with every constant. Engines see one flat
``position``: the random weights ``theta`` followed by the unconstrained noise
(its logarithm, for the usual priors), whose change of variables is included.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, Params, State
from .hoisting import Hoisted
from .likelihoods import Likelihood
from .networks.base import Network
from .partition import Partition
from .priors import WeightPrior
from .row_blocks import Recomputed, hoist_rows
from .subspaces import RandomPart


class Terms(NamedTuple):
    """Everything the density depends on besides the position; arguments of compiled programs, never constants."""

    carry: Any
    y: Any
    row_weights: Any
    prior: WeightPrior
    noise_prior: Any


@dataclasses.dataclass(frozen=True)
class Form:
    """The static part of a log density; hashable, so engines compile once per form and shape."""

    hoisted: Hoisted | Recomputed
    likelihood: Likelihood
    num_theta: int
    num_noise: int
    blocks: tuple[int, ...] = ()
    """Lengths of the pieces of ``theta`` that belong to different leaves, in order."""

    def position_scale(self, terms: Terms) -> Array:
        """How far each entry of a position may move a priori: prior standard deviations, one for the noise."""
        return jnp.concatenate([jnp.asarray(terms.prior.std), jnp.ones(self.num_noise)])

    def outputs(self, position: Array, carry: Any) -> Array:
        """The network's outputs for the training rows at ``position``."""
        return self.hoisted.late(position[: self.num_theta], carry)

    def noise_std(self, position: Array, noise_prior: Any) -> Array:
        """The noise standard deviations at ``position``, shape ``(num_noise,)``."""
        return _to_support(noise_prior)(position[self.num_theta :]) if self.num_noise else jnp.ones(1)

    def log_prior(self, position: Array, terms: Terms) -> Array:
        """Log prior of weights and noise in the coordinates of ``position``."""
        total = terms.prior.log_prob(position[: self.num_theta])
        if self.num_noise:
            transform = _to_support(terms.noise_prior)
            unconstrained = position[self.num_theta :]
            noise_std = transform(unconstrained)
            volume = transform.log_abs_det_jacobian(unconstrained, noise_std)
            total = total + jnp.sum(terms.noise_prior.log_prob(noise_std) + volume)
        return total

    def log_likelihood(self, position: Array, terms: Terms) -> Array:
        """Log density of each training row, shape ``(rows,)``; padded rows are not yet masked."""
        outputs = self.outputs(position, terms.carry)
        return self.likelihood.log_prob(outputs, terms.y, self.noise_std(position, terms.noise_prior))

    def __call__(self, position: Array, terms: Terms) -> Array:
        """The log joint density, a scalar."""
        return self.log_prior(position, terms) + jnp.sum(terms.row_weights * self.log_likelihood(position, terms))


@dataclasses.dataclass(frozen=True)
class LogDensity:
    """A form with its terms: the function an engine samples."""

    form: Form
    terms: Terms

    @property
    def size(self) -> int:
        """Length of a position."""
        return self.form.num_theta + self.form.num_noise

    def __call__(self, position: Array) -> Array:
        return evaluate(self.form, position, self.terms)


def _to_support(noise_prior: Any):
    from numpyro.distributions.transforms import biject_to

    return biject_to(noise_prior.support)


def evaluate_fn(form: Form, position: Array, terms: Terms) -> Array:
    """The log joint density at one position."""
    return form(position, terms)


evaluate = jax.jit(evaluate_fn, static_argnums=0)


def build(
    network: Network,
    partition: RandomPart,
    params: Params,
    state: State,
    x: Any,
    y: Any,
    row_weights: Any,
    *,
    likelihood: Likelihood,
    prior: WeightPrior,
    noise_prior: Any,
) -> LogDensity:
    """The log density of the random weights ``partition`` picks out of ``params``.

    The part of the forward pass that the random weights do not enter is
    computed here, once, for all rows of ``x``.
    """
    hoisted, carry = hoist_rows(network, partition, params, state, x)
    num_outputs = 1 if np.ndim(y) == 1 else np.shape(y)[1]
    blocks = tuple(count for count in partition.counts().values() if count) if isinstance(partition, Partition) else ()
    form = Form(hoisted, likelihood, partition.size, likelihood.num_noise(num_outputs), blocks)
    return LogDensity(form, Terms(carry, y, row_weights, prior, noise_prior))


def unconstrain_noise(noise_std: Any, noise_prior: Any) -> np.ndarray:
    """The coordinates of noise standard deviations in a position."""
    return np.asarray(_to_support(noise_prior).inv(np.asarray(noise_std, np.float32)))


def constrain_noise(unconstrained: Any, noise_prior: Any) -> Any:
    """Noise standard deviations for their coordinates in a position."""
    return _to_support(noise_prior)(unconstrained)
