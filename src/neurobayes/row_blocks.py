"""The hoisted forward pass of many rows, in bounded memory.

Rows are put through the frozen part in blocks, so that the activations inside
it never exist for all rows at once. Should even its result be larger than a
budget, nothing is kept: the frozen part is recomputed, block by block, in every
evaluation, which is slower and is reported by ``recomputes``.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, Params, State
from .hoisting import Hoisted, hoist_network
from .networks.base import Network
from .subspaces import RandomPart

CARRY_BUDGET_BYTES = 2**31
"""Largest result of the frozen part that is kept for all training rows."""

BLOCK_BYTES = 2**26
CPU_BLOCK_BYTES = 2**22
"""Size aimed at for the largest single activation of a block of rows; on a CPU that of its cache."""

MAX_BLOCK_ROWS = 1024
"""Rows of a block at most: a layer's activations for more would leave the processor's cache."""

_PROBE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """Has the interface of ``Hoisted`` and keeps nothing: all of the network runs in every evaluation, by blocks."""

    network: Network
    num_rows: int
    block: int
    tree: Any
    recomputes = True

    def early(self, partition: RandomPart, params: Params, state: State, x: Any) -> list[Any]:
        """The arguments themselves, the rows cut into blocks."""
        missing = -len(x) % self.block
        padded = jnp.pad(jnp.asarray(x), [(0, missing)] + [(0, 0)] * (np.ndim(x) - 1), mode="edge")
        blocks = padded.reshape(-1, self.block, *np.shape(x)[1:])
        return [*jax.tree.leaves((partition, params, state)), blocks]

    def late(self, theta: Any, carry: list[Any]) -> Array:
        """Outputs for all rows; the backward pass recomputes each block as well."""
        partition, params, state = jax.tree.unflatten(self.tree, carry[:-1])

        @jax.checkpoint
        def outputs(x):
            return self.network.apply(partition.merge(theta, params), state, x)

        stacked = jax.lax.map(outputs, carry[-1])
        return stacked.reshape(-1, *stacked.shape[2:])[: self.num_rows]


def probe(network: Network, partition: RandomPart, params: Params, state: State, x: Any) -> Hoisted:
    """The split forward pass for a few rows like those of ``x``."""
    return hoist_network(network, partition, params, state, _like(x, _PROBE_ROWS))


def row_bytes(network: Network, partition: RandomPart, params: Params, state: State, x: Any) -> int:
    """Bytes of the largest activation, for a row like those of ``x``."""
    return probe(network, partition, params, state, x).largest_bytes // _PROBE_ROWS


def rows_per_block(network: Network, partition: RandomPart, params: Params, state: State, x: Any) -> int:
    """Rows whose largest activation takes about as many bytes as aimed at, a power of two up to ``MAX_BLOCK_ROWS``."""
    per_row = max(1, row_bytes(network, partition, params, state, x))
    aim = CPU_BLOCK_BYTES if jax.default_backend() == "cpu" else BLOCK_BYTES
    rows = min(MAX_BLOCK_ROWS, max(_PROBE_ROWS, aim // per_row))
    return 1 << (rows.bit_length() - 1)


def hoist_rows(
    network: Network,
    partition: RandomPart,
    params: Params,
    state: State,
    x: Any,
    budget_bytes: int | None = None,
) -> tuple[Hoisted | Recomputed, list[Any]]:
    """The split forward pass for all rows of ``x`` with what its late part needs.

    Equal networks, partitions and shapes give the same object, so that engines
    compile once.
    """
    budget_bytes = CARRY_BUDGET_BYTES if budget_bytes is None else budget_bytes
    num_rows = len(x)
    block = rows_per_block(network, partition, params, state, x)
    whole = hoist_network(network, partition, params, state, x)
    if whole.carry_bytes > budget_bytes:
        tree = jax.tree.structure((partition, params, state))
        again = _recomputed(network, num_rows, min(block, num_rows), tree)
        return again, again.early(partition, params, state, x)
    if num_rows <= block:
        return whole, whole.early(partition, params, state, x)
    part = hoist_network(network, partition, params, state, _like(x, block))
    axes = row_axes(part, whole, block, num_rows)
    if axes is None:
        return whole, whole.early(partition, params, state, x)
    pieces = []
    for first in range(0, num_rows, block):
        rows = np.asarray(x[first : first + block])
        missing = block - len(rows)
        rows = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        pieces.append(part.early(partition, params, state, rows))
    return whole, _join(pieces, axes, num_rows)


def compile_ahead(network: Network, partition: RandomPart, params: Params, state: State, x: Any) -> Hoisted | None:
    """Compile what ``hoist_rows`` runs for rows like those of ``x``, and return what it will, None for ``Recomputed``.

    Shapes will do for all arguments.
    """
    block = rows_per_block(network, partition, params, state, x)
    whole = hoist_network(network, partition, params, state, x)
    if whole.carry_bytes > CARRY_BUDGET_BYTES:
        return None
    hoist_network(network, partition, params, state, _like(x, min(block, len(x)))).compile()
    return whole


def row_axes(part: Hoisted, whole: Hoisted, part_rows: int, whole_rows: int) -> list[int | None] | None:
    """For each leaf of the carry the axis that runs over the rows, or None where it has none.

    None instead of the list if a leaf depends on the rows in another way, such as rows and positions in one axis.
    """
    if len(part.carry_avals) != len(whole.carry_avals):
        return None
    axes: list[int | None] = []
    for a, b in zip(part.carry_avals, whole.carry_avals, strict=True):
        if a.ndim != b.ndim:
            return None
        differ = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
        if len(differ) > 1 or any((a.shape[axis], b.shape[axis]) != (part_rows, whole_rows) for axis in differ):
            return None
        axes.append(differ[0] if differ else None)
    return axes


def _join(pieces: list[list[Any]], axes: list[int | None], num_rows: int) -> list[Any]:
    """The carry for all rows out of those of its blocks: leaves that follow the rows are concatenated."""
    carry = []
    for position, axis in enumerate(axes):
        leaves = [piece[position] for piece in pieces]
        if axis is None:
            carry.append(leaves[0])
        else:
            joined = jnp.concatenate(leaves, axis=axis)
            carry.append(jax.lax.slice_in_dim(joined, 0, num_rows, axis=axis))
    return carry


@functools.lru_cache(maxsize=64)
def _recomputed(network: Network, num_rows: int, block: int, tree: Any) -> Recomputed:
    return Recomputed(network, num_rows, block, tree)


def _like(x: Any, num_rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_rows, *np.shape(x)[1:]), x.dtype)
