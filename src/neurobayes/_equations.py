"""Equations of a traced function, applied one by one."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex


def apply_equation(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation as it is, one for each of its ``outvars``; None where nothing uses it."""
    wanted = [v for v in eqn.outvars if not is_drop(v)]
    names = jex.DebugInfo("equation", "neurobayes.equation", None, None)
    arguments = [jex.Var(v.aval) for v in eqn.invars]
    single = jex.Jaxpr([], arguments, wanted, [eqn.replace(invars=arguments)], debug_info=names)
    results = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(single, []))(*operands))
    return [None if is_drop(v) else next(results) for v in eqn.outvars]


def is_drop(v: Any) -> bool:
    """Whether a variable stands for a result that nothing uses."""
    return type(v).__name__ == "DropVar"
