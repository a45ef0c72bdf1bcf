"""The order in which a network uses its parameters, read off its trace."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from .. import trees
from .._typing import Array, Params


def order_of_use(apply: Callable[[Params, Array], Any], params: Params, x: Array) -> dict[str, int]:
    """The rank of each parameter leaf by where it, or anything made of it alone, first meets the data.

    Computing with parameters alone (casting them all first, transposing) is
    no use yet, so the order is that in which the layers act on ``x``. Leaves
    that never meet the data come last, in the pytree's order.

    Parameters
    ----------
    apply : the network, ``apply(params, x)``.
    params : pytree of arrays.
    x : inputs, arrays or ``ShapeDtypeStruct``; nothing is computed.
    """
    paths = list(trees.flatten(params))
    jaxpr = jax.make_jaxpr(apply)(params, x).jaxpr
    num_inputs = len(jaxpr.invars) - len(paths)
    origins: list[frozenset[int] | None] = [frozenset([i]) for i in range(len(paths))] + [None] * num_inputs
    used = dict.fromkeys(itertools.chain(_uses(jaxpr, origins), range(len(paths))))
    return {paths[leaf]: rank for rank, leaf in enumerate(used)}


def _uses(jaxpr: Any, origins: Sequence[frozenset[int] | None]) -> Iterator[int]:
    """Leaves in the order in which they meet data.

    ``origins`` says of each input which leaves it is made of; None stands for data.
    """
    known = dict(zip(jaxpr.invars, origins, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [frozenset() if hasattr(v, "val") else known.get(v, frozenset()) for v in eqn.invars]
        meets_data = any(origin is None for origin in inputs)
        if meets_data:
            inner = _inner_jaxpr(eqn)
            if inner is None:
                yield from itertools.chain.from_iterable(sorted(origin) for origin in inputs if origin)
            else:
                # Leading operands that the inner program does not take choose a branch or end a loop.
                yield from _uses(inner, inputs[len(inputs) - len(inner.invars) :])
        made_of = None if meets_data else frozenset().union(*(origin for origin in inputs if origin))
        known.update(dict.fromkeys(eqn.outvars, made_of))


def _inner_jaxpr(eqn: Any) -> Any | None:
    """The program that an equation such as ``jit``, ``scan`` or ``custom_vjp_call`` runs, if it runs one."""
    for name, value in eqn.params.items():
        for candidate in value if isinstance(value, (tuple, list)) else (value,):
            program = getattr(candidate, "jaxpr", candidate)
            is_program = hasattr(program, "eqns") and hasattr(program, "invars")
            if is_program and name != "cond_jaxpr" and len(program.invars) <= len(eqn.invars):
                return program
    return None
