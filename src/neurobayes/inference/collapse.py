"""Integrates the output layer out of a log density, and draws it back exactly.

Given all other random weights ``h`` and the noise, a Gaussian likelihood with
weights ``w`` that enter the output linearly makes ``w`` Gaussian:

    p(y, h, noise) = p(h) p(noise) integral p(y | w, h, noise) p(w) dw    (``_marginal``)

A sampler then moves in ``(h, noise)`` alone, where the posterior is better
conditioned: output weights and features no longer trade scales against each
other. Each draw of ``(h, noise)`` is completed by one exact draw of ``w``.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from .. import linearity
from .._threads import side_by_side
from .._typing import Array, Key
from ..errors import OptionError
from ..likelihoods import Gaussian
from ..log_density import Form, LogDensity, Terms
from ..priors import gaussian_log_prob
from . import _marginal as marginal
from ._dense_head import DenseHead, dense_head
from .base import RunControl

MAX_COLLAPSED = 512
"""Largest number of weights integrated out: each gradient factorises a matrix of this size."""

DRAWS_PER_CALL = 128


@dataclasses.dataclass(frozen=True)
class CollapsedForm:
    """The log density with the linear pieces of ``theta`` integrated out.

    A position is the remaining pieces in order, then the unconstrained noise.
    """

    form: Form
    linear: tuple[int, ...]
    pieces: linearity.Pieces
    head: DenseHead | None

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
        return np.flatnonzero(self._is_linear())

    @property
    def kept_indices(self) -> np.ndarray:
        """Where the entries of a position are in the full position."""
        kept = np.flatnonzero(~self._is_linear())
        return np.concatenate([kept, np.arange(self.form.num_noise) + self.form.num_theta])

    def _is_linear(self) -> np.ndarray:
        return np.repeat(np.isin(np.arange(len(self.form.blocks)), self.linear), self.form.blocks)

    def position_scale(self, terms: Terms) -> Array:
        """As for the full form, for the entries that stay."""
        return self.form.position_scale(terms)[self.kept_indices]

    def complete(self, position: Array, weights: Array) -> Array:
        """The full position out of a collapsed one and the integrated weights."""
        # Slices instead of scattered indices, which XLA would copy entry by entry.
        parts, linear_at, kept_at = [], 0, 0
        for block, size in enumerate(self.form.blocks):
            if block in self.linear:
                parts.append(weights[linear_at : linear_at + size])
                linear_at += size
            else:
                parts.append(position[kept_at : kept_at + size])
                kept_at += size
        return jnp.concatenate([*parts, position[kept_at:]])

    def __call__(self, position: Array, terms: Terms) -> Array:
        """The log joint density of the position and the data."""
        design, log_volume = self._design(position, terms)
        at = self.linear_indices
        prior_mean, prior_std = jnp.asarray(terms.prior.mean), jnp.asarray(terms.prior.std)
        full = self.complete(position, prior_mean[at])
        # At its centre the integrated weights' prior is a constant.
        log_prior = self.form.log_prior(full, terms) - gaussian_log_prob(prior_mean[at], prior_mean[at], prior_std[at])
        return log_prior + marginal.log_marginal(design) + log_volume

    def draw(self, key: Key, position: Array, terms: Terms) -> Array:
        """The full position with an exact draw of the integrated weights."""
        design, _ = self._design(position, terms)
        drawn = marginal.draw(design, key)
        weights = jnp.zeros(len(self.linear_indices), drawn.dtype).at[self._slots()].set(drawn)
        return self.complete(position, weights)

    def _slots(self) -> np.ndarray:
        """Where the weights ``(features, outputs)`` of the design are among those integrated."""
        if self.head is None:
            return np.arange(len(self.linear_indices))[:, None]
        return np.searchsorted(self.linear_indices, self.head.slots)

    def _design(self, position: Array, terms: Terms) -> tuple[marginal.Design, Array]:
        """The regression on the features at ``position``, and what its log density lacks."""
        at = self.linear_indices
        prior_mean, prior_std = (jnp.asarray(part)[at][self._slots()] for part in terms.prior)
        full = self.complete(position, jnp.zeros(len(at), position.dtype))
        slices = [full[start:stop] for start, stop in self.pieces.bounds]
        noise_std, row_weights = self.form.noise_std(full, terms.noise_prior), jnp.asarray(terms.row_weights)
        if self.head is not None:
            features, constant = self.head([slices[i] for i in self.head.kept], terms.carry, len(terms.y))
            targets = (terms.y - constant).T
            return marginal.Design(features, targets, noise_std, row_weights, prior_mean, prior_std), jnp.zeros(())
        # Every weight may move every output: one regression on all of them, with noise of one.
        outputs, features = self._linearised(slices, terms)
        design = marginal.Design(
            (features / noise_std).reshape(len(at), -1), ((terms.y - outputs) / noise_std).reshape(1, -1),
            jnp.ones(1, outputs.dtype), jnp.repeat(row_weights, outputs.shape[1]), prior_mean, prior_std,
        )  # fmt: skip
        return design, -jnp.sum(row_weights) * jnp.sum(jnp.log(noise_std))

    def _linearised(self, slices: list[Array], terms: Terms) -> tuple[Array, Array]:
        """Outputs with the linear weights at zero, and their derivatives in these, ``(weights, rows, outputs)``."""
        at = self.linear_indices
        local = np.cumsum(self._is_linear()) - 1

        def outputs_at(weights):
            values = [
                weights[local[start] : local[stop - 1] + 1] if owner in self.linear else value
                for (start, stop), owner, value in zip(self.pieces.bounds, self.pieces.owners, slices, strict=True)
            ]
            return self.pieces(values, terms.carry)

        outputs, pushed = jax.linearize(outputs_at, jnp.zeros(len(at), slices[0].dtype))
        return outputs, jax.vmap(pushed)(jnp.eye(len(at), dtype=outputs.dtype))


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
    return CollapsedForm(form, linear, pieces, dense_head(pieces, linear))


def is_cheap_to_collapse(log_density: LogDensity) -> bool:
    """Whether there is a collapsed form whose features need no derivatives."""
    form = collapsed_form(log_density)
    return form is not None and form.head is not None


def require_collapsed(log_density: LogDensity, engine: str) -> CollapsedForm:
    """``collapsed_form``, or an error that says what it takes."""
    form = collapsed_form(log_density)
    if form is None:
        raise OptionError(
            "collapse=True needs Gaussian noise, an output layer among the Bayesian weights, and Bayesian weights "
            f"before it. Use {engine}(collapse=False), or engine='last_layer' where only the output layer is Bayesian."
        )
    return form


@dataclasses.dataclass(frozen=True)
class Completion:
    """Makes full positions of a run's collapsed ones; that of a draw depends on the key, chain and number alone."""

    form: CollapsedForm
    key: Key
    terms: Terms

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Full positions ``(chain, draw, size)`` for collapsed ones."""
        num_chains, num_draws, _ = positions.shape
        missing = -num_draws % DRAWS_PER_CALL  # one compiled program serves every number of draws
        padded = np.pad(positions, ((0, 0), (0, missing), (0, 0)), mode="edge")
        firsts = range(0, num_draws, DRAWS_PER_CALL)

        def complete(chain: int, first: int) -> np.ndarray:
            some = padded[chain, first : first + DRAWS_PER_CALL]
            return np.asarray(_complete_draws(self.form, self.key, (chain, first), some, self.terms))

        parts = side_by_side(complete, itertools.product(range(num_chains), firsts))
        return np.concatenate(parts).reshape(num_chains, num_draws + missing, -1)[:, :num_draws]

    def judging(self, control: RunControl) -> RunControl:
        """``control`` whose stopping rule sees full positions."""
        if control.is_enough is None:
            return control
        is_enough = control.is_enough
        return dataclasses.replace(control, is_enough=lambda positions: is_enough(self(positions)))


@functools.partial(jax.jit, static_argnums=0)
def _complete_draws(form: CollapsedForm, key: Key, first: tuple[int, int], positions: Array, terms: Terms) -> Array:
    chain, draw = first
    key_chain = jax.random.fold_in(key, chain)

    def one(indexed):
        index, position = indexed
        return form.draw(jax.random.fold_in(key_chain, index), position, terms)

    return jax.lax.map(one, (draw + jnp.arange(len(positions)), positions))
