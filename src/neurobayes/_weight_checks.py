"""Checks on weights that users hand in: their structure, their shapes and their values, all faults in one error."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from . import trees
from ._checks import require_numbers
from ._typing import Params
from .errors import ParameterError, nearest

MEMORY_ALIGNMENT = 64
"""Bytes whose multiples XLA wants the memory of an array to start at."""


def check_weights_structure(
    given_params: Any, template_params: Params, *, name: str = "deterministic_weights"
) -> Params:
    """Given weights as a float32 pytree with the structure of the network's own.

    Parameters
    ----------
    given_params : nested mappings or another pytree of arrays, bare or inside ``{'params': ...}``;
        a flat mapping of paths (``Dense0.kernel``) also does.
    template_params : the network's parameters, arrays or ``ShapeDtypeStruct``.
    name : what to call the argument in the error.

    Returns
    -------
    Copies of the given leaves in the template's pytree structure.

    Raises
    ------
    ParameterError : lists every leaf that is missing, unexpected, misshapen or not finite.
    """
    template = trees.shapes(template_params)
    given = _given_leaves(given_params, template, name)
    problems = [f"missing: {path}, shape {shape}" for path, shape in template.items() if path not in given]
    leaves = {}
    for path, leaf in given.items():
        if path not in template:
            problems.append(f"unexpected: {path}, shape {np.shape(leaf)}{nearest(path, template)}")
            continue
        values = _as_leaf(leaf)
        if values is None:
            problems.append(f"not an array of real numbers: {path}, a {type(leaf).__name__}")
        elif values.shape != template[path]:
            problems.append(f"wrong shape: {path} is {values.shape}, the network has {template[path]}")
        elif not np.isfinite([values.min(initial=0.0), values.max(initial=0.0)]).all():  # a mask would be large
            problems.append(f"not finite in single precision: {path}, {int((~np.isfinite(values)).sum())} values")
        else:
            leaves[path] = jax.device_put(values)
    if problems:
        lines = "\n  ".join(problems)
        raise ParameterError(
            f"{name} do not fit the network:\n  {lines}\n"
            "Give finite weights of the same architecture, trained on inputs of the same shape. "
            "`nb.print_layer_configs(network)` lists layers and shapes."
        )
    return trees.unflatten(leaves, template_params)


def _given_leaves(given: Any, template: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The leaves a user gave, by path, without the ``params`` collection around them."""
    wrapped = isinstance(given, Mapping) and "params" in given
    if wrapped and not any(trees.is_under(path, "params") for path in template):
        others = [str(other) for other in given if other != "params" and jax.tree.leaves(given[other])]
        if others:  # dropping running means in silence would change the function
            raise ParameterError(
                f"{name} also holds the collections {', '.join(others)}, but only parameters are taken. "
                f"Pass {name}['params'] if the others may stay as the network initialises them."
            )
        given = given["params"]
    leaves = trees.flatten(_plain(given))
    if "" in leaves and _as_leaf(leaves[""]) is None:
        raise ParameterError(
            f"{name} is a {type(given).__name__}. Give a nested dict of arrays, such as det_model.get_params()."
        )
    return leaves


def _plain(tree: Any) -> Any:
    """``tree`` with every mapping (``FrozenDict``, ``OrderedDict`` ...) as a dict with text keys."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    return type(tree)(_plain(value) for value in tree) if type(tree) in (list, tuple) else tree


def _as_leaf(leaf: Any) -> np.ndarray | None:
    """A float32 copy of ``leaf``, which later changes to the user's array cannot reach; None if not numeric."""
    try:
        values = require_numbers(np.asarray(leaf), "", "")
        copy = _aligned_empty(values.shape)
        with np.errstate(over="ignore"):
            copy[...] = values
        return copy
    except (TypeError, ValueError):
        return None


def _aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that JAX on a CPU uses as it is: any other place in memory costs another copy, for each call."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + MEMORY_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % MEMORY_ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)
