"""Paths and sizes of parameter pytrees.

A leaf is addressed by its path, the keys from the root joined by dots:
``Dense0.kernel``, ``Block0_Attention.query.bias``, ``layers.1.weight``.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from ._typing import Array, Params

SEPARATOR = "."


def flatten(params: Params) -> dict[str, Array]:
    """The leaves of ``params`` by path, in the pytree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator=SEPARATOR): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any], like: Params) -> Params:
    """A pytree with the structure of ``like`` and the leaves given by path; inverse of ``flatten``."""
    treedef = jax.tree.structure(like)
    return jax.tree.unflatten(treedef, [leaves[path] for path in flatten(like)])


def shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by path. ``params`` may hold arrays or ``ShapeDtypeStruct``."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}


def num_scalars(params: Params) -> int:
    """How many scalars ``params`` holds in all."""
    return sum(math.prod(shape) for shape in shapes(params).values())


def is_under(path: str, prefix: str) -> bool:
    """Whether ``path`` is ``prefix`` itself or lies below it."""
    return path == prefix or path.startswith(prefix + SEPARATOR)


def parent(path: str) -> str:
    """The path without its last key: ``Dense0.kernel`` -> ``Dense0``; the root is ``""``."""
    return path.rpartition(SEPARATOR)[0]


def as_path(name: str) -> str:
    """A path in the spelling used here: ``blocks[0].query`` is ``blocks.0.query``."""
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", rf"{SEPARATOR}\1", name)
    return path.removeprefix(SEPARATOR) if name.startswith("[") else path
