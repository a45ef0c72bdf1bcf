"""Rows of tokens without most of their padding.

Sequences of different lengths are filled up to one width, and where a few are
long most of the width is padding. A network on whose output padding has no
influence takes the longest rows of a batch at full width and the others, in a
few blocks, at the width that they need. Attention, whose cost grows as the
square of the width, gains most.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, Key, Params, State
from .networks.base import InputSpec, Layer, Network

MOST_BLOCKS = 4
"""Each block is one more copy of the network to compile."""

WIDTHS = tuple(sorted(factor << power for factor in (2, 3) for power in range(1, 16)))
"""Of blocks: 4, 6, 8, 12, 16, …, so that a few more rows hardly ever ask for another program."""

SHARES = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""To one of these the shares of longer rows are rounded up, for the same reason."""

SLACK = 3.0
"""A block has room for as many standard deviations more rows than belong there in a batch on average."""

WORTHWHILE = 2 / 3
"""Share of the tokens above which what is left out is not worth the longer compilation."""


@dataclasses.dataclass(frozen=True)
class ShortRows(Network):
    """A network that puts the rows of a batch through ``network`` in blocks of falling width.

    Outputs are those of ``network`` but for rounding. Where a batch has more long rows than there is room for, all go
    at full width.

    Attributes
    ----------
    pad_token : the token that fills rows up at their end and has no influence there.
    widths : of the blocks, falling.
    shares : of all rows, those longer than the next block is wide; the last is 1.
    """

    network: Network
    pad_token: int
    widths: tuple[int, ...]
    shares: tuple[float, ...]

    def init(self, key: Key, x: Array) -> tuple[Params, State]:
        return self.network.init(key, x)

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Array:
        def outputs(network):
            return lambda params: network.apply(params, state, x, key=key)

        return for_batch(self, x, outputs)(params)

    def fits(self, x: Array) -> Array:
        """Whether each block is wide enough for its rows of ``x``."""
        lengths = -jnp.sort(-_lengths(x, self.pad_token, jnp))
        return jnp.all(jnp.stack([lengths[begin] <= width for begin, _, width in self.blocks(x.shape[0])]))

    def blocks(self, num_rows: int) -> list[tuple[int, int, int]]:
        """Begin, end and width of each block, for rows that are sorted by falling length."""
        ends = block_ends(num_rows, self.shares)
        places = zip((0, *ends[:-1]), ends, self.widths, strict=True)
        return [(begin, end, width) for begin, end, width in places if end > begin]

    def layers(self, x: Array) -> tuple[Layer, ...]:
        return self.network.layers(x)

    @property
    def input_spec(self) -> InputSpec:
        return self.network.input_spec

    @property
    def has_dropout(self) -> bool:
        return self.network.has_dropout

    @property
    def pretrained(self) -> Params | None:
        return self.network.pretrained


class _InBlocks(ShortRows):
    """The same for batches that are known to fit."""

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Array:
        order = jnp.argsort(-_lengths(x, self.pad_token, jnp))
        x, outputs = jnp.asarray(x)[order], []
        for number, (begin, end, width) in enumerate(self.blocks(x.shape[0])):
            own = None if key is None else jax.random.fold_in(key, number)
            outputs.append(self.network.apply(params, state, x[begin:end, :width], key=own))
        return jnp.concatenate(outputs)[jnp.argsort(order)]


def for_batch(network: Network, x: Array, make: Callable[[Network], Callable[..., Any]]) -> Callable[..., Any]:
    """``make(network)``, of the network as it is best applied to the batch ``x``.

    A derivative is best taken in ``make``: that of a choice keeps what either branch needs, and costs as much as the
    wide one.
    """
    if not isinstance(network, ShortRows):
        return make(network)
    narrow, wide = make(_InBlocks(**vars(network))), make(network.network)
    return lambda *arguments: jax.lax.cond(network.fits(x), narrow, wide, *arguments)


def with_short_rows(network: Network, x: Any, batch: int) -> Network:
    """``network``, or one that leaves out padding where ``batch`` rows like those of ``x`` are mostly that.

    ``x`` are all rows. Off a CPU, where members are trained in one program, it is ``network``.
    """
    pad_token = network.input_spec.pad_token
    if pad_token is None or jax.default_backend() != "cpu":
        return network
    x = np.asarray(x)
    lengths = _lengths(x, pad_token, np)
    longest = min(x.shape[1], next((width for width in WIDTHS if width >= lengths.max()), x.shape[1]))
    shorter = [width for width in reversed(WIDTHS) if lengths.min() <= width < longest]
    longer = {width: next(q for q in SHARES if q >= np.mean(lengths > width)) for width in shorter}

    def plan(chosen: tuple[int, ...]) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
        widths, shares = (longest, *chosen), (*(longer[width] for width in chosen), 1.0)
        sizes = np.diff(block_ends(batch, shares), prepend=0)
        return int(np.dot(sizes, widths)), widths, shares

    choices = itertools.chain.from_iterable(itertools.combinations(shorter, k) for k in range(MOST_BLOCKS))
    tokens, widths, shares = min(map(plan, choices))
    if tokens > WORTHWHILE * batch * x.shape[1]:
        return network
    return ShortRows(network, pad_token, widths, shares)


def without_blocks(network: Network) -> Network:
    """The network behind one that leaves out padding, any other as it is."""
    return network.network if isinstance(network, ShortRows) else network


def block_ends(num_rows: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Where blocks end among ``num_rows`` rows sorted by falling length."""
    ends = (num_rows * q + SLACK * math.sqrt(num_rows * q * (1.0 - q)) for q in shares)
    return tuple(min(num_rows, math.ceil(end)) for end in ends)


def _lengths(x: Any, pad_token: int, xp: Any) -> Any:
    """Places up to the last token of each row."""
    return xp.max(xp.where(x == pad_token, 0, xp.arange(1, x.shape[1] + 1)), axis=1)
