"""Whether a traced function is affine in its first argument, and the map if it is.

``f(theta) = f(centre) + J (theta - centre)`` is read off the list of primitive
equations, not guessed from values at some points: a primitive that is not
known to be linear makes the answer "not known". The matrix ``J`` of a network
whose output ``o`` depends on scalars of its own is stored without its zero
blocks.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ._compiling import QuickJit
from ._typing import Array
from .hoisting import CALL_PRIMITIVES, Hoisted
from .row_blocks import Recomputed

# Linear in all float operands together; a float operand without theta is a constant term.
_LINEAR = frozenset(
    ("neg", "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice", "rev", "reduce_sum",
     "cumsum", "copy", "copy_p", "add", "sub", "add_any", "concatenate", "pad", "split", "stack", "unstack", "tile",
     "device_put")
)  # fmt: skip
# Linear in each of the first two operands while the other is constant.
_BILINEAR = frozenset(("mul", "dot_general", "conv_general_dilated"))
# Linear in the operands before this position, the remaining ones (indices) being constant.
_LINEAR_BEFORE = {"div": 1, "gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
# Linear in operands 0 and 2; operand 1 holds the indices.
_SCATTERS = frozenset(("scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter_sub"))

SEEDS_PER_BLOCK = 64
"""Columns of the matrix computed at once; bounds the memory between theta and the outputs."""


def is_affine(jaxpr: jex.Jaxpr, dependent: Sequence[bool]) -> bool:
    """Whether every output is known to be affine in the inputs marked ``dependent`` together.

    False means "not known": derivative rules of the user's own, loops of
    unknown length, and rounding to 16 bits count as not affine.
    """
    return all(kind != _OTHER for kind in _output_kinds(jaxpr, [_AFFINE if d else _CONSTANT for d in dependent]))


_CONSTANT, _AFFINE, _OTHER = range(3)


def _output_kinds(jaxpr: jex.Jaxpr, input_kinds: Sequence[int]) -> list[int]:
    """How each output depends on the affine inputs."""
    kinds: dict[Any, int] = dict(zip(jaxpr.invars, input_kinds, strict=True))

    def kind(v) -> int:
        return _CONSTANT if isinstance(v, jex.Literal) else kinds.get(v, _CONSTANT)

    for eqn in jaxpr.eqns:
        operands = [kind(v) for v in eqn.invars]
        if max(operands, default=_CONSTANT) == _CONSTANT:
            continue
        kinds.update(zip(eqn.outvars, _equation_kinds(eqn, operands), strict=True))
    return [kind(v) for v in jaxpr.outvars]


def _equation_kinds(eqn: Any, operands: list[int]) -> list[int]:
    """How the results of one equation depend on theta, given how its operands do."""
    if (
        eqn.primitive.name in CALL_PRIMITIVES
        and (inner := eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))) is not None
    ):
        return _output_kinds(inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner, operands)
    if eqn.primitive.name == "scan":
        return _scan_kinds(eqn, operands)
    linear = max(operands) == _AFFINE and not eqn.effects and _is_linear(eqn, operands)
    return [_AFFINE if linear and _keeps_precision(v) else _OTHER for v in eqn.outvars]


def _scan_kinds(eqn: Any, operands: list[int]) -> list[int]:
    """A loop is affine if its body is, for what the carried values depend on once they stop changing kind."""
    body, first = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"]
    last = first + eqn.params["num_carry"]
    while True:
        results = _output_kinds(body, operands)
        carried = [max(pair) for pair in zip(operands[first:last], results, strict=False)]
        if carried == operands[first:last]:
            return results
        operands = [*operands[:first], *carried, *operands[last:]]


def _is_linear(eqn: Any, operands: list[int]) -> bool:
    name = eqn.primitive.name
    if name in _LINEAR or name == "convert_element_type":
        return True
    if name in _BILINEAR:
        return operands[:2].count(_AFFINE) == 1 and _AFFINE not in operands[2:]
    if name == "select_n":
        return operands[0] == _CONSTANT
    if name in _SCATTERS:
        return operands[1] == _CONSTANT
    return name in _LINEAR_BEFORE and _AFFINE not in operands[_LINEAR_BEFORE[name] :]


def _keeps_precision(result: Any) -> bool:
    """Rounding to fewer bits than float32, or to integers, is no linear map."""
    dtype = np.dtype(result.aval.dtype)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4


def late_is_affine(hoisted: Hoisted | Recomputed, size: int, carry: Any) -> bool:
    """Whether ``hoisted.late`` is known to be affine in ``theta`` (size,); remembered for each hoisted function."""
    return _late_is_affine(hoisted, size, tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in carry))


@functools.lru_cache(maxsize=64)
def _late_is_affine(hoisted: Hoisted | Recomputed, size: int, carry_shapes: tuple) -> bool:
    theta = jax.ShapeDtypeStruct((size,), np.float32)
    carry = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in carry_shapes]
    jaxpr = jax.make_jaxpr(hoisted.late)(theta, carry).jaxpr
    return is_affine(jaxpr, [True] + [False] * len(carry))


class Pieces:
    """A late function of ``theta`` with the slices it takes of ``theta`` as arguments of their own.

    Differentiating in some slices then costs nothing for the others: a zero
    tangent of a whole vector would be pushed through every layer.

    Attributes
    ----------
    bounds : (start, stop) in ``theta`` of each slice.
    owners : the block of ``theta`` each slice lies in.
    """

    def __init__(self, closed: jex.ClosedJaxpr, bounds: list[tuple[int, int]], owners: list[int]):
        self.closed, self.bounds, self.owners = closed, tuple(bounds), tuple(owners)
        self._function = jex.jaxpr_as_fun(closed)

    def __call__(self, slices: Sequence[Array], carry: Any) -> Array:
        """The outputs for the slices' values."""
        return self._function(*slices, *jax.tree.leaves(carry))[0]

    def affine_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks in which the output is jointly affine, the others fixed; taken from the last to the first."""
        chosen: list[int] = []
        others = [False] * (len(self.closed.jaxpr.invars) - len(self.owners))
        for block in reversed(range(num_blocks)):
            trial = [*chosen, block]
            if is_affine(self.closed.jaxpr, [owner in trial for owner in self.owners] + others):
                chosen = trial
        return tuple(sorted(chosen))


def cut(hoisted: Hoisted | Recomputed, blocks: tuple[int, ...], carry: Any) -> Pieces | None:
    """``hoisted.late`` as a function of its slices of ``theta``; the same object for equal arguments.

    None if ``theta``, made of ``blocks``, is used otherwise than by slices that lie within one block each.
    """
    return _cut(hoisted, blocks, tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in carry))


@functools.lru_cache(maxsize=64)
def _cut(hoisted: Hoisted | Recomputed, blocks: tuple[int, ...], carry_shapes: tuple) -> Pieces | None:
    size = jax.ShapeDtypeStruct((sum(blocks),), np.float32)
    carry = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in carry_shapes]
    closed = jax.make_jaxpr(hoisted.late)(size, carry)
    jaxpr, ends = closed.jaxpr, np.cumsum(blocks)
    theta = jaxpr.invars[0]
    inputs, bounds, owners, rest = [], [], [], []
    for eqn in jaxpr.eqns:
        if not any(v is theta for v in eqn.invars):
            rest.append(eqn)
            continue
        if eqn.primitive.name == "slice":
            found = [(int(eqn.params["start_indices"][0]), int(eqn.params["limit_indices"][0]))]
        elif eqn.primitive.name == "split":
            stops = np.cumsum(eqn.params["sizes"]).tolist()
            found = list(zip([0, *stops[:-1]], stops, strict=True))
        else:
            return None
        for (first, stop), result in zip(found, eqn.outvars, strict=True):
            block = int(np.searchsorted(ends, first, side="right"))
            if stop > ends[block]:
                return None
            inputs.append(result)
            bounds.append((first, stop))
            owners.append(block)
    if any(v is theta for v in jaxpr.outvars):
        return None
    names = jex.DebugInfo("linearity", "neurobayes.linearity", None, None)
    sliced = jex.Jaxpr(jaxpr.constvars, [*inputs, *jaxpr.invars[1:]], jaxpr.outvars, rest, debug_info=names)
    return Pieces(jex.ClosedJaxpr(sliced, closed.consts), bounds, owners)


def entering_scalars(hoisted: Hoisted | Recomputed, centre: np.ndarray, carry: Any, row_weights: Any) -> np.ndarray:
    """Which scalars of ``theta`` move which output on rows of positive weight: bool ``(outputs, size)``.

    Read off the zeros of random combinations of the rows of ``J``; a zero that
    is not a zero of ``J`` has probability below 1e-14.
    """
    return np.asarray(_entering_scalars(hoisted, centre, carry, row_weights))


def compile_entering(hoisted: Hoisted, size: int, num_rows: int) -> None:
    """Compile ``entering_scalars`` for ``theta`` (size,)."""
    centre, weights = (jax.ShapeDtypeStruct((length,), np.float32) for length in (size, num_rows))
    _entering_scalars.lower(hoisted, centre, carry_shapes(hoisted), weights).compile()


@functools.partial(jax.jit, static_argnums=0)
def _entering_scalars(hoisted: Hoisted | Recomputed, centre: Array, carry: Any, row_weights: Array) -> Array:
    outputs, pull = jax.vjp(lambda theta: hoisted.late(theta, carry), centre)
    random = jax.random.normal(jax.random.key(0), (2, outputs.shape[0], 1)) * (row_weights > 0)[:, None]
    cotangents = random[:, None] * jnp.eye(outputs.shape[1])[:, None, :]
    gradients = jax.vmap(jax.vmap(lambda ct: pull(ct.astype(outputs.dtype))[0]))(cotangents)
    return jnp.any(gradients != 0, axis=0)


def separate(entering: np.ndarray) -> np.ndarray | None:
    """The scalars of each output, if no two outputs share one: ``(slots, outputs)`` positions in ``theta``.

    ``size`` marks an unused slot. A scalar that moves no output goes to any
    output, so that the number of slots does not depend on the data.
    None if some scalar moves several outputs.
    """
    num_outputs, size = entering.shape
    if np.any(entering.sum(axis=0) > 1):
        return None
    blocks = [list(np.flatnonzero(row)) for row in entering]
    for idle in np.flatnonzero(~entering.any(axis=0)):
        min(blocks, key=len).append(idle)
    slots = np.full((max(1, *(len(block) for block in blocks)), num_outputs), size, np.int32)
    for output, block in enumerate(blocks):
        slots[: len(block), output] = np.sort(block)
    return slots


def linearise(
    hoisted: Hoisted | Recomputed, centre: np.ndarray, carry: Any, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The affine map around ``centre``: values ``(n, outputs)`` and slopes ``(slots, n, outputs)``.

    ``slopes[k, i, o]`` is the derivative of output ``o`` of row ``i`` in the
    scalar ``slots[k, o]``, zero for an unused slot.
    """
    missing = _num_seeds(len(slots)) - len(slots)
    padded = np.pad(slots, ((0, missing), (0, 0)), constant_values=len(centre))
    values, slopes = _linearise(hoisted, centre, carry, padded)
    return np.asarray(values), np.asarray(slopes)[: len(slots)]


def compile_ahead(hoisted: Hoisted, size: int, num_outputs: int) -> None:
    """Compile ``linearise`` for ``theta`` (size,), of which each output has scalars of its own, as many as others."""
    centre, slots = jax.ShapeDtypeStruct((size,), np.float32), _num_seeds(-(-size // num_outputs))
    _linearise.compile(hoisted, centre, carry_shapes(hoisted), np.zeros((slots, num_outputs), np.int32))


def _num_seeds(num_slots: int) -> int:
    """Columns that are computed for ``num_slots``: all of a block, where one does not do."""
    return num_slots if num_slots <= SEEDS_PER_BLOCK else -(-num_slots // SEEDS_PER_BLOCK) * SEEDS_PER_BLOCK


def carry_shapes(hoisted: Hoisted) -> list[jax.ShapeDtypeStruct]:
    """Shapes of what ``hoisted.early`` returns."""
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in hoisted.carry_avals]


@QuickJit
def _linearise(hoisted: Hoisted | Recomputed, centre: Array, carry: Any, slots: Array) -> tuple[Array, Array]:
    values, push = jax.linearize(lambda theta: hoisted.late(theta, carry), centre)

    def slope(scalars):
        # One direction moves one scalar of each output: their columns do not overlap.
        return push(jnp.zeros_like(centre).at[scalars].set(1, mode="drop"))

    if len(slots) <= SEEDS_PER_BLOCK:
        return values, jax.vmap(slope)(slots)
    return values, jax.lax.map(slope, slots, batch_size=SEEDS_PER_BLOCK)
