"""The log joint density estimated from mini-batches of the training rows."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._typing import Array, Key
from ..errors import OptionError
from ..hoisting import Hoisted
from ..log_density import Form, LogDensity, Terms
from ..row_blocks import Recomputed, row_axes


@dataclasses.dataclass(frozen=True)
class Batches:
    """The log joint density estimated from some of the rows.

    ``axes`` says for every array the frozen part leaves behind which of its axes follows the rows, None for none.
    """

    form: Form
    size: int
    num_rows: int
    part: Hoisted | None
    axes: tuple[int | None, ...]

    def log_prob(self, position: Array, key: Key, data: "Data") -> Array:
        """An unbiased estimate from rows drawn with ``key``; the exact value where a batch holds all rows."""
        terms, form = data.terms, self.form
        if self.size == self.num_rows:
            return form(position, terms)
        # Padded rows are last in ``order`` and are never drawn.
        drawn = jnp.floor(jax.random.uniform(key, (self.size,)) * data.num_real).astype(jnp.int32)
        rows = jnp.asarray(data.order)[jnp.minimum(drawn, jnp.int32(data.num_real) - 1)]
        outputs = self.outputs(position[: form.num_theta], terms.carry, rows)
        noise_std = form.noise_std(position, terms.noise_prior)
        each = form.likelihood.log_prob(outputs, jnp.asarray(terms.y)[rows], noise_std)
        weighted = jnp.sum(jnp.asarray(terms.row_weights)[rows] * each)
        return form.log_prior(position, terms) + data.num_real / self.size * weighted

    def outputs(self, theta: Array, carry: Any, rows: Array) -> Array:
        """The network's outputs for the chosen training rows."""
        hoisted = self.form.hoisted
        if isinstance(hoisted, Recomputed):
            partition, params, state = jax.tree.unflatten(hoisted.tree, carry[:-1])
            x = carry[-1].reshape(-1, *carry[-1].shape[2:])[rows]
            return hoisted.network.apply(partition.merge(theta, params), state, x)
        assert self.part is not None
        pairs = zip(carry, self.axes, strict=True)
        return self.part.late(theta, [a if axis is None else jnp.take(a, rows, axis=axis) for a, axis in pairs])


def make_batches(log_density: LogDensity, batch_size: int) -> Batches:
    """Batches of ``batch_size`` rows of the density's data.

    Raises
    ------
    OptionError
        Where what the frozen part leaves behind cannot be cut into rows.
    """
    form, hoisted = log_density.form, log_density.form.hoisted
    num_rows = len(log_density.terms.row_weights)
    size = min(batch_size, num_rows)
    if size == num_rows or isinstance(hoisted, Recomputed):
        return Batches(form, size, num_rows, None, ())
    part = hoisted.resized(size)
    axes = row_axes(part, hoisted, size, num_rows)
    if axes is None:
        raise _cannot_split(batch_size)
    return Batches(form, size, num_rows, part, tuple(axes))


def _cannot_split(batch_size: int) -> OptionError:
    return OptionError(
        f"batch_size={batch_size} cannot be used: the network mixes its rows before the Bayesian weights enter, so "
        "its intermediate results cannot be cut into rows. Use engine='nuts', or a batch_size of all rows."
    )


class Data(NamedTuple):
    """What a compiled step reads: the density's terms, the real rows before the padded ones, and their number."""

    terms: Terms
    order: Any
    num_real: Any
