"""Runs once what does not depend on the random weights.

A traced function ``fn(theta, *frozen)`` is a list of primitive equations.
Those that cannot be reached from ``theta`` are evaluated once and their
results carried; only the rest runs for every draw or gradient. With a Bayesian
last layer this turns a transformer into a matrix product.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from ._compiling import compiler_options
from ._equations import is_drop
from ._typing import Array, Params, State
from .networks.base import Network
from .subspaces import RandomPart

CALL_PRIMITIVES = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
"""Equations that only run a jaxpr of their own, with the derivatives of its equations."""


class Hoisted:
    """A function split at ``theta``: ``late(theta, early(*frozen)) == fn(theta, *frozen)``.

    ``early`` is compiled; ``late`` is to be traced inside a larger program. The
    object is hashable by identity, so it can key compiled programs.
    """

    recomputes = False

    def __init__(self, fn: Callable[..., Any], theta: Any, frozen: Sequence[Any]):
        self._origin = (fn, *jax.eval_shape(lambda *args: args, theta, tuple(frozen)))
        last = jax.tree.leaves(frozen[-1]) if frozen else []
        self.num_rows = last[0].shape[0] if last and last[0].ndim else 0
        self._resized: dict[int, Hoisted] = {}
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(theta, *frozen)
        num_theta = len(jax.tree.leaves(theta))
        jaxpr, consts = closed.jaxpr, closed.consts
        equations, outvars, inner_consts = _inline(jaxpr)
        constvars = [*jaxpr.constvars, *inner_consts]
        theta_vars, frozen_vars = jaxpr.invars[:num_theta], jaxpr.invars[num_theta:]
        before, after, carried = _split(equations, outvars, theta_vars, [*frozen_vars, *constvars])
        # ``replace`` keeps the debug information, without which JAX warns.
        early = jaxpr.replace(constvars=constvars, invars=frozen_vars, outvars=carried, eqns=before)
        late = jaxpr.replace(constvars=[], invars=[*theta_vars, *carried], outvars=outvars, eqns=after)
        self._out_tree = jax.tree.structure(out_shape)
        before_theta = jex.jaxpr_as_fun(jex.ClosedJaxpr(early, [*consts, *inner_consts.values()]))
        self._early = jax.jit(before_theta, compiler_options=compiler_options())
        self._late = jex.jaxpr_as_fun(jex.ClosedJaxpr(late, []))
        self.num_late_equations = len(after)
        self.carry_avals = tuple(v.aval for v in carried)
        # Parameters and inputs are carried as they are and cost nothing.
        self.carry_bytes = sum(_num_bytes(v.aval) for v in carried if v not in frozen_vars)
        self.late_bytes = max((_num_bytes(v.aval) for eqn in after for v in eqn.outvars), default=0)
        self.largest_bytes = max([self.late_bytes, *(_num_bytes(v.aval) for eqn in before for v in eqn.outvars)])

    def early(self, *frozen: Any) -> list[Array]:
        """Everything ``late`` needs that does not depend on ``theta``; one compiled call."""
        return self._early(*jax.tree.leaves(frozen))

    def compile(self) -> None:
        """Compile ``early`` before there is anything to call it with."""
        self._early.lower(*jax.tree.leaves(self._origin[2])).compile()

    def late(self, theta: Any, carry: list[Array]) -> Any:
        """The function's value; differentiable in ``theta``."""
        return jax.tree.unflatten(self._out_tree, self._late(*jax.tree.leaves(theta), *carry))

    def resized(self, num_rows: int) -> "Hoisted":
        """The same split for ``num_rows`` rows of the last frozen argument; the same object each time."""
        if num_rows not in self._resized:
            fn, theta, (*frozen, x) = self._origin
            x = jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype)
            self._resized[num_rows] = Hoisted(fn, theta, (*frozen, x))
        return self._resized[num_rows]


def _split(equations: Sequence[Any], outvars: Sequence[Any], theta_vars: Sequence[Any], known_vars: Sequence[Any]):
    """The equations before and after ``theta`` enters, and the variables carried between."""
    depends, known = set(theta_vars), set(known_vars)
    before, after = [], []
    for eqn in equations:
        if any(_is_var(v) and v in depends for v in eqn.invars) or eqn.effects:
            after.append(eqn)
            depends.update(eqn.outvars)
        else:
            before.append(eqn)
            known.update(eqn.outvars)
    used = [v for eqn in after for v in eqn.invars] + list(outvars)
    carried = list(dict.fromkeys(v for v in used if _is_var(v) and v in known))
    return before, after, carried


def _inline(jaxpr: jex.Jaxpr) -> tuple[list[Any], list[Any], dict[Any, Any]]:
    """The equations of ``jaxpr`` with nested calls replaced by their bodies, its outputs, and the calls' constants.

    A network jitted by its author is one equation, which could not be split.
    Calls with their own derivative rules (``custom_jvp_call``, ``custom_vjp_call``)
    and loops stay whole: they run late as soon as one input depends on theta.
    """
    equations: list[Any] = []
    renamed: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}

    def current(v):
        return renamed.get(v, v) if _is_var(v) else v

    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=[current(v) for v in eqn.invars])
        inner = _body(eqn)
        if inner is None:
            equations.append(eqn)
            continue
        body, values = inner
        inner_eqns, inner_out, inner_constants = _inline(body)
        constants.update(inner_constants)
        # The same inner function may be called twice: each copy needs its own variables.
        fresh: dict[Any, Any] = dict(zip(body.invars, eqn.invars, strict=True))
        fresh.update((v, jex.Var(v.aval)) for v in body.constvars)
        constants.update((fresh[v], value) for v, value in zip(body.constvars, values, strict=True))
        for sub in inner_eqns:
            outs = [jex.Var(v.aval) if not is_drop(v) else v for v in sub.outvars]
            invars = [fresh.get(v, v) if _is_var(v) else v for v in sub.invars]
            fresh.update(zip(sub.outvars, outs, strict=True))
            equations.append(sub.replace(invars=invars, outvars=outs))
        for outer, v in zip(eqn.outvars, inner_out, strict=True):
            renamed[outer] = fresh.get(v, v) if _is_var(v) else v
    return equations, [current(v) for v in jaxpr.outvars], constants


def _body(eqn) -> tuple[jex.Jaxpr, Sequence[Any]] | None:
    """The jaxpr a call equation runs, with its constants; None if it is not a plain call."""
    if eqn.primitive.name not in CALL_PRIMITIVES:
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if isinstance(inner, jex.ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return (inner, ()) if inner is not None else None


def _num_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _is_var(v: Any) -> bool:
    return not isinstance(v, jex.Literal)


@functools.lru_cache(maxsize=64)
def _hoisted_network(network: Network, partition_tree, leaf_tree, leaf_shapes) -> Hoisted:
    partition, params, state, x = jax.tree.unflatten(
        leaf_tree, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaf_shapes]
    )

    def outputs(theta, partition, params, state, x):
        return network.apply(partition.merge(theta, params), state, x)

    theta = jax.eval_shape(lambda partition, params: partition.split(params), partition, params)
    return Hoisted(outputs, theta, (partition, params, state, x))


def hoist_network(network: Network, partition: RandomPart, params: Params, state: State, x: Any) -> Hoisted:
    """The forward pass of ``network`` split at the random weights, for inputs shaped like ``x``.

    Cached by network, partition structure and shapes, so that repeated calls
    return the same object and nothing is traced or compiled twice.
    """
    leaves, tree = jax.tree.flatten((partition, params, state, x))
    leaf_shapes = tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)
    return _hoisted_network(network, jax.tree.structure(partition), tree, leaf_shapes)
