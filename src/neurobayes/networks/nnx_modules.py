"""Flax NNX modules as networks."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from .. import trees
from .._typing import Array, Key, Params, State
from ._module_network import ModuleNetwork, accepted, as_columns, kind_of, token_spec
from .base import LayerKind

_KINDS: tuple[tuple[tuple[type, ...], LayerKind], ...] = (
    ((nnx.MultiHeadAttention,), "attention"),
    ((nnx.Conv, nnx.ConvTranspose), "conv"),
    ((nnx.Linear, nnx.LinearGeneral, nnx.Einsum), "dense"),
    ((nnx.Embed,), "embedding"),
    ((nnx.LayerNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.RMSNorm, nnx.InstanceNorm), "norm"),
)
_TRAINING_FLAGS = ("train", "training", "is_training")


class NNXNetwork(ModuleNetwork):
    """An NNX module with the weights it has now.

    The module itself is neither changed nor used later: its structure, its
    ``nnx.Param`` variables (the parameters) and its other variables (the
    frozen state, such as batch statistics) are taken when it is wrapped.
    Parameters are a nested dict with attribute names and list positions as
    keys, so that layers are called ``blocks.0.attn``.

    With a key, dropout is active (``deterministic=False``) and everything else
    stays in evaluation mode: batch statistics are used and never updated.

    Parameters
    ----------
    module : any NNX module that maps a batch ``(n, ...)`` to outputs.
    """

    def __init__(self, module: nnx.Module) -> None:
        evaluated = nnx.clone(module)
        evaluated.eval()
        graph, params, rngs, rest = nnx.split(evaluated, nnx.Param, nnx.RngState, ...)
        modules = {trees.SEPARATOR.join(map(str, path)): child for path, child in nnx.iter_modules(evaluated)}
        defined = list(_in_order_of_definition(module))
        # A module met twice has one path, which is not always that of the first place.
        paths = dict.fromkeys([*(path for path, _ in defined if path in modules), *modules])
        super().__init__(
            module,
            nnx.to_pure_dict(params),
            nnx.to_pure_dict(rest),
            kinds={path: kind for path in paths if (kind := _kind(modules[path])) != "other"},
            input_spec=token_spec((_kind(child), child) for _, child in defined),
            has_dropout=any(_dropout_rate(child) > 0 for child in modules.values()),
            fingerprint=graph,
        )
        self._graph = graph
        self._rngs = nnx.to_pure_dict(rngs)
        self._keywords = accepted(type(module).__call__, ("deterministic", "rngs", *_TRAINING_FLAGS))

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Any:
        module = nnx.merge(self._graph, params, self._rngs, state)
        keywords: dict[str, Any] = {name: False for name in _TRAINING_FLAGS if name in self._keywords}
        if "deterministic" in self._keywords:
            keywords["deterministic"] = key is None
        if key is not None:
            module.set_attributes(deterministic=False, raise_if_not_found=False)
            _reseed(module, key)
            if "rngs" in self._keywords:
                keywords["rngs"] = nnx.Rngs(key)
        return as_columns(module(x, **keywords))


def _kind(module: nnx.Module) -> LayerKind:
    return kind_of(module, _KINDS)


def _dropout_rate(module: nnx.Module) -> float:
    rate = getattr(module, "rate" if isinstance(module, nnx.Dropout) else "dropout_rate", 0.0)
    return rate if isinstance(rate, (int, float)) else 0.0


def _reseed(module: nnx.Module, key: Key) -> None:
    """Give every random stream a key of its own; ``nnx.reseed`` would give streams of one name the same masks."""
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    for position, stream in enumerate(streams):
        stream.key[...] = jax.random.fold_in(key, position)


def _in_order_of_definition(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, nnx.Module]]:
    """The modules of a known kind as their author wrote them down; clones have their attributes sorted by name."""
    if isinstance(node, nnx.Module) and _kind(node) != "other":
        yield trees.SEPARATOR.join(path), node
    elif isinstance(node, (list, tuple, nnx.List)):
        for position, child in enumerate(node):
            yield from _in_order_of_definition(child, (*path, str(position)))
    elif isinstance(node, (dict, nnx.Module)):
        for name, child in (node if isinstance(node, dict) else vars(node)).items():
            yield from _in_order_of_definition(child, (*path, str(name)))
