"""Convolutions whose derivatives are fast on a CPU.

XLA has fast convolutions for a CPU, but only for arrays whose axes are in one
order. Elsewhere it brings them into that order; inside a compiled loop, where
all training happens, it does not, and the gradient of a kernel, in which batch
and channels change places, takes sixty times as long. So the axes are moved
here.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ._equations import apply_equation
from ._typing import Array
from .networks.base import Network

_CONVOLUTION = "conv_general_dilated"


def with_ordered_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the axes of every convolution in the order that is fast on a CPU; not to be differentiated.

    Elsewhere, and without a convolution, it is ``function``.
    """

    def ordered(*arguments: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*arguments)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if has_convolution(closed.jaxpr):
            outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        else:
            outputs = jex.jaxpr_as_fun(closed)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return ordered


@functools.lru_cache(maxsize=64)
def convolves(network: Network, row_shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether a network has a convolution, for inputs of this kind."""
    row = jax.ShapeDtypeStruct((1, *row_shape), dtype)
    params, state = jax.eval_shape(network.init, jax.random.key(0), row)
    return has_convolution(jax.make_jaxpr(network.apply)(params, state, row).jaxpr)


def has_convolution(jaxpr: Any) -> bool:
    """Whether a convolution is among the equations, or within one of them."""
    return any(
        eqn.primitive.name == _CONVOLUTION or any(has_convolution(inner) for inner in _inner(eqn)) for eqn in jaxpr.eqns
    )


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, jex.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, jex.Jaxpr):
                yield each


def _evaluate(jaxpr: Any, consts: Any, inputs: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(v: Any) -> Any:
        return values[v] if not isinstance(v, jex.Literal) else v.val

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name == _CONVOLUTION:
            outputs = [_ordered(*operands, **eqn.params)]
        elif any(has_convolution(inner) for inner in _inner(eqn)):
            params = {name: _rewritten(value) for name, value in eqn.params.items()}
            outputs = apply_equation(eqn.replace(params=params), operands)
        else:
            outputs = apply_equation(eqn, operands)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _rewritten(value: Any) -> Any:
    """A parameter of an equation, with the convolutions of traced functions in it ordered."""
    if type(value) in (tuple, list):  # and not a named tuple, which holds no functions
        return type(value)(map(_rewritten, value))
    if isinstance(value, jex.ClosedJaxpr):
        return jax.make_jaxpr(lambda *inputs: _evaluate(value.jaxpr, value.consts, inputs))(*value.in_avals)
    if isinstance(value, jex.Jaxpr):  # has no place for constants
        closed = _rewritten(jex.ClosedJaxpr(value, []))
        return value if closed.consts else closed.jaxpr
    return value


def _ordered(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """A convolution of rows first and channels last, with kernels (space, inputs, outputs)."""
    batch, channel, *space = dimension_numbers.lhs_spec
    outputs, inputs, *kernel_space = dimension_numbers.rhs_spec
    out_batch, out_channel, *out_space = dimension_numbers.out_spec
    last = lhs.ndim - 1
    order, kernel_order = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    found = jax.lax.conv_general_dilated_p.bind(
        jnp.transpose(lhs, (batch, *space, channel)), jnp.transpose(rhs, (*kernel_space, inputs, outputs)),
        dimension_numbers=jax.lax.ConvDimensionNumbers(order, kernel_order, order), **params,
    )  # fmt: skip
    return jnp.transpose(found, np.argsort((out_batch, *out_space, out_channel)).tolist())
