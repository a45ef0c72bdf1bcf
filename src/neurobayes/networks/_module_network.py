"""What the adapters of other frameworks share: weights that come with the network, and layers found by tracing it."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import trees
from .._typing import Array, Key, Params, State
from ._call_order import order_of_use
from .base import InputSpec, Layer, LayerKind, Network


class ModuleNetwork(Network):
    """A network whose weights are made before the library sees it.

    Most frameworks draw the weights when a module is constructed, so ``init``
    returns the weights that the module had when it was wrapped, whatever the
    key. Two wrappers are equal when they wrap the same object with the same
    weights; a module trained further in between makes a different network.

    Parameters
    ----------
    module : the user's object (module or function).
    params : its weights, a pytree of float arrays.
    state : pytree of the arrays that are never random.
    kinds : what each module computes, by path and in order of definition; modules of no known kind may be left out.
    input_spec : what inputs look like, unless the module has an attribute ``input_spec`` that says so.
    has_dropout : whether the outputs are random in training.
    fingerprint : a value that changes with whatever else the outputs depend on.
    """

    def __init__(
        self,
        module: Any,
        params: Params,
        state: State,
        *,
        kinds: Mapping[str, LayerKind],
        input_spec: InputSpec,
        has_dropout: bool,
        fingerprint: Any = None,
    ) -> None:
        declared = getattr(module, "input_spec", None)
        self.module = module
        self._params = params
        self._state = state
        self._kinds = kinds
        self._input_spec = declared if isinstance(declared, InputSpec) else input_spec
        self._has_dropout = has_dropout
        self._fingerprint = fingerprint

    def init(self, key: Key, x: Array) -> tuple[Params, State]:
        """The module's own weights and its frozen state; nothing is drawn."""
        return self._params, self._state

    def layers(self, x: Array | None) -> tuple[Layer, ...]:
        """The layers that own parameters, in the order of their calls; without ``x``, in that of ``kinds``."""
        leaves = list(trees.flatten(self._params))
        if x is None:
            return group_leaves(leaves, _order_of_kinds(leaves, self._kinds), self._kinds)
        order = order_of_use(lambda params, inputs: self.apply(params, self._state, inputs), self._params, x)
        return group_leaves(leaves, order, self._kinds)

    @property
    def pretrained(self) -> Params:
        return self._params

    @property
    def input_spec(self) -> InputSpec:
        return self._input_spec

    @property
    def has_dropout(self) -> bool:
        return self._has_dropout

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, ModuleNetwork)
            and type(self) is type(other)
            and self.module is other.module
            and self._fingerprint == other._fingerprint
            and same_arrays((self._params, self._state), (other._params, other._state))
        )

    def __hash__(self) -> int:
        return hash((type(self), id(self.module)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__})"


def group_leaves(leaves: Sequence[str], order: Mapping[str, int], kinds: Mapping[str, LayerKind]) -> tuple[Layer, ...]:
    """The layers that own ``leaves``, sorted by the first use of any of their leaves.

    A leaf belongs to the module that holds it, or to the attention module
    around that; a leaf at the root is a layer by itself.
    """
    whole = [path for path, kind in kinds.items() if kind == "attention"]

    def owner(leaf: str) -> str:
        return next((path for path in whole if trees.is_under(leaf, path)), trees.parent(leaf)) or leaf

    groups: dict[str, list[str]] = {}
    for leaf in leaves:
        groups.setdefault(owner(leaf), []).append(leaf)
    names = sorted(groups, key=lambda name: min(order[leaf] for leaf in groups[name]))
    return tuple(Layer(name, kinds.get(name, "other"), tuple(groups[name])) for name in names)


def _order_of_kinds(leaves: Sequence[str], kinds: Mapping[str, LayerKind]) -> dict[str, int]:
    """The rank of each leaf by the module of ``kinds`` around it; leaves in none of these come last."""
    places = {
        leaf: next((place for place, path in enumerate(kinds) if trees.is_under(leaf, path)), len(kinds))
        for leaf in leaves
    }
    return {leaf: rank for rank, leaf in enumerate(sorted(leaves, key=places.__getitem__))}


def same_arrays(first: Any, second: Any) -> bool:
    """Whether two pytrees have the same structure and equal arrays (NaN equals NaN)."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(a is b or _equal(a, b) for a, b in pairs)


def _equal(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.array_equal(a, b, equal_nan=bool(jnp.issubdtype(a.dtype, jnp.inexact)))


def as_columns(outputs: Any) -> Any:
    """Outputs of shape ``(n, outputs)``: a vector ``(n,)`` becomes one column; tuples and the rest stay as they are."""
    return outputs[:, None] if getattr(outputs, "ndim", None) == 1 else outputs


def accepted(function: Any, names: Iterable[str]) -> dict[str, Any]:
    """The parameters of ``function`` that are called one of ``names``, each with its default."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable written in C may have no signature
        return {}
    return {name: parameters[name].default for name in names if name in parameters}


def kind_of(module: Any, table: Iterable[tuple[tuple[type, ...], LayerKind]]) -> LayerKind:
    """The kind of the first entry of ``table`` whose types ``module`` is an instance of."""
    for types, kind in table:
        if isinstance(module, types):
            return kind
    return "other"


def token_spec(layers: Iterable[tuple[LayerKind, Any]]) -> InputSpec:
    """Inputs are token ids if the first of ``layers``, (kind, module) in order of definition, is an embedding."""
    kind, module = next(iter(layers), ("other", None))
    if kind == "embedding":
        return InputSpec(tokens=True, vocab_size=getattr(module, "num_embeddings", None))
    return InputSpec()
