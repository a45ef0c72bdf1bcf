"""Equinox modules as networks."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .. import trees
from .._typing import Array, Key, Params, State
from ..errors import OptionError
from ._module_network import ModuleNetwork, accepted, as_columns, kind_of, token_spec
from .base import LayerKind

_KINDS: tuple[tuple[tuple[type, ...], LayerKind], ...] = (
    ((eqx.nn.MultiheadAttention,), "attention"),
    ((eqx.nn.Conv, eqx.nn.ConvTranspose), "conv"),
    ((eqx.nn.Linear,), "dense"),
    ((eqx.nn.Embedding,), "embedding"),
    ((eqx.nn.LayerNorm, eqx.nn.BatchNorm, eqx.nn.GroupNorm, eqx.nn.RMSNorm), "norm"),
)


class EquinoxNetwork(ModuleNetwork):
    """An Equinox module with the weights it has; called per example and vmapped over the batch.

    The parameters are the module's inexact arrays, as a nested dict with
    attribute names and positions as keys: what Equinox prints as
    ``layers[0].weight`` is the leaf ``layers.0.weight``. All other arrays are
    the frozen state. The module runs under ``eqx.nn.inference_mode``; with a
    key, its dropout layers alone are switched back on, and a ``key`` is passed
    to each example. A module that takes no ``key`` has no dropout.

    Parameters
    ----------
    module : maps one example to its outputs: a scalar or a vector.
    layer_state : the ``eqx.nn.State`` that ``eqx.nn.make_with_state`` gave with
        the module, for modules with running statistics. It is never updated.

    Raises
    ------
    OptionError
        The module keeps running statistics and no ``layer_state`` was given.
    """

    def __init__(self, module: eqx.Module, layer_state: Any | None = None) -> None:
        if layer_state is None and _has_layer_state(module):
            raise OptionError(
                f"the Equinox module {type(module).__name__} keeps running statistics (eqx.nn.StateIndex), which are "
                "stored outside it. Give both: (module, state) as returned by eqx.nn.make_with_state."
            )
        evaluated = eqx.nn.inference_mode(module)
        leaves, self._treedef = _flatten(evaluated)
        params = {path: jnp.array(leaf) for path, leaf in leaves.items() if eqx.is_inexact_array(leaf)}
        arrays = {
            trees.SEPARATOR.join(map(str, path)): jnp.array(leaf)
            for path, leaf in leaves.items()
            if isinstance(leaf, (jax.Array, np.ndarray)) and path not in params
        }
        layers = _known_layers(evaluated)
        keywords = accepted(type(module).__call__, ("key",))
        super().__init__(
            module,
            _nested(params),
            {"buffers": arrays, "layers": layer_state},
            kinds={path: _kind(layer) for path, layer in layers.items()},
            input_spec=token_spec((_kind(layer), layer) for layer in layers.values()),
            has_dropout="key" in keywords and any(dropout.p > 0 for dropout in _dropouts(evaluated)),
        )
        self._leaves = list(leaves.items())
        self._keywords = keywords

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Any:
        module = self._assemble(params, state)
        if key is not None and self.has_dropout:
            module = _with_active_dropout(module)

        def one(example: Array, example_key: Key | None) -> Any:
            keywords = {} if example_key is None else {"key": example_key}
            if state["layers"] is None:
                return module(example, **keywords)
            return module(example, state["layers"], **keywords)[0]

        return as_columns(jax.vmap(one)(x, self._example_keys(key, len(x))))

    def _assemble(self, params: Params, state: State) -> Any:
        random, buffers = trees.flatten(params), state["buffers"]
        leaves = []
        for path, leaf in self._leaves:
            name = trees.SEPARATOR.join(map(str, path))
            leaves.append(random.get(name, buffers.get(name, leaf)))
        return jax.tree.unflatten(self._treedef, leaves)

    def _example_keys(self, key: Key | None, num_examples: int) -> Key | None:
        if "key" not in self._keywords:
            return None
        if key is None:
            if self._keywords["key"] is not inspect.Parameter.empty:
                return None
            key = jax.random.key(0)  # the module insists on a key, and in inference mode has no use for it
        return jax.random.split(key, num_examples)


def _kind(module: Any) -> LayerKind:
    return kind_of(module, _KINDS)


def _key_of(entry: Any) -> str | int:
    """The attribute name, position or key that one step of a JAX path stands for."""
    for attribute in ("name", "idx", "key"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _flatten(module: Any) -> tuple[dict[tuple[str | int, ...], Any], Any]:
    entries, treedef = jax.tree_util.tree_flatten_with_path(module)
    return {tuple(map(_key_of, path)): leaf for path, leaf in entries}, treedef


def _nested(leaves: dict[tuple[str | int, ...], Array]) -> dict[str | int, Any]:
    tree: dict[str | int, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _known_layers(module: eqx.Module) -> dict[str, Any]:
    """The layers of a known kind by path, in order of definition."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda node: _kind(node) != "other")
    return {
        jax.tree_util.keystr(path, simple=True, separator=trees.SEPARATOR): node
        for path, node in nodes
        if _kind(node) != "other"
    }


def _is_dropout(node: Any) -> bool:
    return isinstance(node, eqx.nn.Dropout)


def _dropouts(module: Any) -> list[eqx.nn.Dropout]:
    return [node for node in jax.tree.leaves(module, is_leaf=_is_dropout) if _is_dropout(node)]


def _with_active_dropout(module: Any) -> Any:
    def switch_on(node: Any) -> Any:
        return eqx.tree_at(lambda dropout: dropout.inference, node, False) if _is_dropout(node) else node

    return jax.tree.map(switch_on, module, is_leaf=_is_dropout)


def _has_layer_state(module: Any) -> bool:
    def is_index(node: Any) -> bool:
        return isinstance(node, eqx.nn.StateIndex)

    return any(is_index(node) for node in jax.tree.leaves(module, is_leaf=is_index))
