"""A function of many rows, computed with the rows as the last axis of every array.

A layer of 16 units makes arrays ``(rows, 16)``, whose last axis is too short
for a processor's vector units; the same equations on ``(16, rows)`` take half
the time. Only functions all of whose equations are known here are rewritten.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ._equations import apply_equation
from ._typing import Array
from .hoisting import CALL_PRIMITIVES, Hoisted

_ELEMENTWISE = frozenset(
    ("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
     "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc",
     "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p",
     "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "select_n",
     "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor")
)  # fmt: skip
_REDUCTIONS = frozenset(("reduce_max", "reduce_min", "reduce_prod", "reduce_sum"))
# Only values are computed here, so that derivative rules of their own do not matter.
_CALLS = (*CALL_PRIMITIVES, "custom_jvp_call", "custom_vjp_call")


class RowsLast(NamedTuple):
    """``function(theta, arrange(carry))`` is the wanted array with its first axis, the rows, as the last.

    Attributes
    ----------
    arrange : brings the carry of a hoisted function into the form that ``function`` takes.
    function : to be traced inside a larger program, not to be differentiated.
    shape : of the value.
    rewritten : whether the rows are last all the way, and not only at the end.
    """

    arrange: Callable[[Sequence[Any]], list[Array]]
    function: Callable[[Array, Sequence[Any]], Array]
    shape: tuple[int, ...]
    rewritten: bool


class _Value(NamedTuple):
    """An array whose rows, once on ``axis``, are on its last axis; ``axis`` is None for an array without rows."""

    array: Any
    axis: int | None

    def place(self, axis: int) -> int:
        """Where an axis of the original array is now."""
        if self.axis is None or axis < self.axis:
            return axis
        return self.array.ndim - 1 if axis == self.axis else axis - 1


class _Unknown(Exception):
    """An equation that is not known with the rows last."""


@functools.lru_cache(maxsize=64)
def with_rows_last(hoisted: Hoisted, twin: Hoisted, quantity: Callable[[Array], Array], num_theta: int) -> RowsLast:
    """``quantity(hoisted.late(theta, carry))``, rows first, rewritten so that its rows come last.

    Remembered for equal arguments.

    Parameters
    ----------
    twin : the same function for another number of rows: what differs in its trace is the rows.
    quantity : acts on the outputs of each row alone.
    num_theta : length of ``theta``.
    """
    theta = jax.ShapeDtypeStruct((num_theta,), np.float32)

    def traced(split: Hoisted) -> jex.ClosedJaxpr:
        return jax.make_jaxpr(lambda theta, carry: quantity(split.late(theta, carry)))(theta, list(split.carry_avals))

    closed = traced(hoisted)
    shape = closed.out_avals[0].shape
    shape = (*shape[1:], shape[0])
    try:
        other = traced(twin).jaxpr
        rewriting = _Rewriting(hoisted.num_rows, twin.num_rows)
        axes = [rewriting.row_axis(a, b) for a, b in zip(closed.jaxpr.invars, other.invars, strict=True)]

        def arrange(carry: Sequence[Any]) -> list[Array]:
            pairs = zip(carry, axes[1:], strict=True)
            return [leaf if axis is None else jnp.moveaxis(leaf, axis, -1) for leaf, axis in pairs]

        def function(theta: Array, carry: Sequence[Any]) -> Array:
            theta = jnp.asarray(theta, jnp.float32)  # as traced; draws made in double precision are not
            inputs = [_Value(array, axis) for array, axis in zip([theta, *carry], axes, strict=True)]
            (value,) = rewriting.evaluate(closed.jaxpr, other, closed.consts, inputs)
            if value.axis != 0:
                raise _Unknown
            return value.array

        def whole(theta: Array, carry: Sequence[Any]) -> Array:
            return function(theta, arrange(carry))

        if jax.eval_shape(whole, theta, list(hoisted.carry_avals)).shape == shape:
            return RowsLast(arrange, function, shape, True)
    except (_Unknown, ValueError):  # strict zips end in the latter where the traces differ in more than the rows
        pass
    return RowsLast(list, lambda theta, carry: jnp.moveaxis(quantity(hoisted.late(theta, carry)), 0, -1), shape, False)


class _Rewriting:
    """Evaluates equations with the rows last; each is compared with its twin, which has another number of rows."""

    def __init__(self, num_rows: int, twin_rows: int):
        if num_rows == twin_rows:
            raise _Unknown
        self.sizes = num_rows, twin_rows

    def row_axis(self, v: Any, twin: Any) -> int | None:
        """The axis of the rows; None if the array has none."""
        shape, other = v.aval.shape, twin.aval.shape
        if shape == other:
            return None
        differ = [axis for axis, sizes in enumerate(zip(shape, other, strict=True)) if sizes[0] != sizes[1]]
        if len(differ) != 1 or (shape[differ[0]], other[differ[0]]) != self.sizes:
            raise _Unknown
        return differ[0]

    def evaluate(self, jaxpr: Any, twin: Any, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
        """The outputs of ``jaxpr``, each with the original axis of its rows."""
        values: dict[Any, _Value] = {v: _Value(array, None) for v, array in zip(jaxpr.constvars, consts, strict=True)}
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(v: Any) -> _Value:
            if not isinstance(v, jex.Literal):
                return values[v]
            aval: Any = v.aval
            return _Value(jnp.asarray(v.val, aval.dtype), None)

        for eqn, other in zip(jaxpr.eqns, twin.eqns, strict=True):
            if eqn.primitive is not other.primitive:
                raise _Unknown
            operands = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _CALLS:
                outputs = self._call(eqn, other, operands)
            elif all(operand.axis is None for operand in operands):
                outputs = self._without_rows(eqn, other, operands)
            else:
                axis = self.row_axis(eqn.outvars[0], other.outvars[0])
                if axis is None or len(eqn.outvars) != 1:  # a sum over rows, for instance
                    raise _Unknown
                outputs = [_Value(_apply(eqn, operands, axis), axis)]
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _call(self, eqn: Any, other: Any, operands: list[_Value]) -> list[_Value]:
        bodies = [e.params.get("jaxpr", e.params.get("call_jaxpr")) for e in (eqn, other)]
        jaxprs = [body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body for body in bodies]
        consts = bodies[0].consts if isinstance(bodies[0], jex.ClosedJaxpr) else ()
        return self.evaluate(jaxprs[0], jaxprs[1], consts, operands)

    def _without_rows(self, eqn: Any, other: Any, operands: list[_Value]) -> list[_Value]:
        """The equation as it is; what it makes for each row out of nothing is only known to be a broadcast."""
        axes = [self.row_axis(v, twin) for v, twin in zip(eqn.outvars, other.outvars, strict=True)]
        if any(axis is not None for axis in axes):
            if eqn.primitive.name != "broadcast_in_dim":
                raise _Unknown
            return [_Value(_broadcast(eqn, operands[0], axes[0]), axes[0])]
        results = apply_equation(eqn, [operand.array for operand in operands])
        return [_Value(result, None) for result in results]


def _apply(eqn: Any, operands: list[_Value], axis: int) -> Any:
    """The result of one equation with its rows, originally on ``axis``, as its last axis."""
    name, first = eqn.primitive.name, operands[0]
    if name in _ELEMENTWISE:
        return eqn.primitive.bind(*(_aligned(operand, axis) for operand in operands), **eqn.params)
    if name == "dot_general":
        return _dot(eqn, operands)
    if name == "broadcast_in_dim":
        return _broadcast(eqn, first, axis)
    if name in _REDUCTIONS:
        axes = tuple(sorted(first.place(a) for a in eqn.params["axes"]))
        return eqn.primitive.bind(first.array, **{**eqn.params, "axes": axes})
    if name == "squeeze":
        return jax.lax.squeeze(first.array, [first.place(a) for a in eqn.params["dimensions"]])
    if name == "reshape" and first.axis == axis == 0 and eqn.params["dimensions"] is None:
        return first.array.reshape(*eqn.params["new_sizes"][1:], first.array.shape[-1])
    if name == "slice" and first.axis == axis:
        fields = ("start_indices", "limit_indices", "strides")
        bounds = [eqn.params[field] or (1,) * first.array.ndim for field in fields]
        places = sorted(range(first.array.ndim), key=first.place)
        return jax.lax.slice(first.array, *([bound[a] for a in places] for bound in bounds))
    if name == "concatenate" and all(operand.axis == axis != eqn.params["dimension"] for operand in operands):
        return jax.lax.concatenate([operand.array for operand in operands], first.place(eqn.params["dimension"]))
    raise _Unknown


def _aligned(operand: _Value, axis: int) -> Any:
    """An operand of an elementwise equation: scalars as they are, one row for all with that row last."""
    if operand.axis is None:
        return operand.array if operand.array.ndim == 0 else jnp.moveaxis(operand.array, axis, -1)
    if operand.axis != axis:
        raise _Unknown
    return operand.array


def _dot(eqn: Any, operands: list[_Value]) -> Any:
    """Weights times features: the rows stay last where the weights come first."""
    (left, right), (left_batch, _) = eqn.params["dimension_numbers"]
    pairs = list(zip(operands, (left, right), strict=True))
    if operands[1].axis is None:
        pairs.reverse()
    (weights, over), (features, contracted) = pairs
    # One axis of features at most besides the rows, else the new axes would come in another order.
    if left_batch or weights.axis is not None or features.axis in contracted:
        raise _Unknown
    if features.array.ndim != len(contracted) + 1:
        raise _Unknown
    # The weights' summed axes last, and really so: XLA's product for a CPU is slower where they only count as last.
    ready = jax.lax.optimization_barrier(jnp.moveaxis(weights.array, over, range(-len(over), 0)))
    summed = tuple(range(ready.ndim - len(over), ready.ndim))
    numbers = ((summed, tuple(features.place(a) for a in contracted)), ((), ()))
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    return jax.lax.dot_general(ready, features.array, numbers, **options)


def _broadcast(eqn: Any, operand: _Value, axis: int | None) -> Any:
    """A broadcast whose rows, new or old, are last."""
    shape, target = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if axis is None or (operand.axis is not None and target[operand.axis] != axis):
        raise _Unknown
    moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    made = _Value(jax.ShapeDtypeStruct(moved, np.float32), axis)
    places = [0] * operand.array.ndim
    for original, wanted in enumerate(target):
        places[operand.place(original)] = made.place(wanted)
    if places != sorted(places):  # one row that is the first axis, for instance
        order = sorted(range(len(places)), key=places.__getitem__)
        return jax.lax.broadcast_in_dim(jnp.transpose(operand.array, order), moved, sorted(places))
    return jax.lax.broadcast_in_dim(operand.array, moved, places)
