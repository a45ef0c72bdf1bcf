"""Plain functions ``apply_fn(params, x)`` as networks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import trees
from .._typing import Array, Key, Params, State
from ..errors import OptionError, ParameterError
from ._module_network import ModuleNetwork, accepted, as_columns
from .base import InputSpec, Layer, LayerKind


class FunctionNetwork(ModuleNetwork):
    """A function of parameters and inputs, with the parameters to start from.

    The function says nothing of how parameters are drawn: ``init`` returns the
    given ones, whatever the key. Float arrays are the parameters; integer and
    boolean arrays are the frozen state; anything else among the leaves of
    ``params`` is handed to the function as it is.

    Layers are told by the tree: leaves in one container are one layer. Of
    leaves at the root, each matrix (two axes or more) makes a layer together
    with the vectors that are used after it: ``{"w1": …, "b1": …, "w2": …}``
    has the layers ``w1`` (``w1``, ``b1``) and ``w2``. A layer with one matrix,
    which fits its vector as ``x @ matrix + vector``, is of kind ``dense``;
    vectors of one size alone are a ``norm``; what cannot be told is ``other``.

    Parameters
    ----------
    apply_fn : ``apply_fn(params, x)`` -> outputs ``(n,)`` or ``(n, outputs)`` for a batch
        ``x``. If it takes a keyword ``key`` or ``rng``, that is a random key in
        training and None otherwise. Its attribute ``input_spec``, an
        ``InputSpec``, declares token inputs.
    params : pytree with at least one float array.

    Raises
    ------
    ParameterError
        ``params`` holds no float array.
    """

    def __init__(self, apply_fn: Callable[..., Any], params: Params) -> None:
        if callable(params):
            raise OptionError(
                "the second of the pair is a function, so this looks like (init_fn, apply_fn). "
                "Draw the parameters first and give (apply_fn, params)."
            )
        entries, self._treedef = jax.tree.flatten(params)
        self._leaves = dict(zip(trees.flatten(params), entries, strict=True))
        arrays = {path: array for path, leaf in self._leaves.items() if (array := _as_array(leaf)) is not None}
        floats = {path for path, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
        if not floats:
            raise ParameterError(
                f"the params of {getattr(apply_fn, '__name__', apply_fn)!r} hold no float array. "
                "Give a pytree (dict, list, tuple, …) of float arrays: (apply_fn, params)."
            )
        self._keyword = next(iter(accepted(apply_fn, ("key", "rng"))), None)
        super().__init__(
            apply_fn,
            jax.tree.unflatten(self._treedef, [arrays[path] if path in floats else None for path in self._leaves]),
            {path: array for path, array in arrays.items() if path not in floats},
            kinds={},
            input_spec=InputSpec(),
            has_dropout=self._keyword is not None,
            fingerprint=[leaf for path, leaf in self._leaves.items() if path not in arrays],
        )

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Any:
        keywords = {} if self._keyword is None else {self._keyword: key}
        return as_columns(self.module(self._assemble(params, state), x, **keywords))

    def layers(self, x: Array | None) -> tuple[Layer, ...]:
        shapes = trees.shapes(self._params)
        found: list[Layer] = []
        for layer in super().layers(x):
            at_root = layer.name in shapes
            if at_root and found and found[-1].name in shapes and len(shapes[layer.name]) < 2:
                found[-1] = Layer(found[-1].name, "other", found[-1].leaves + layer.leaves)
            else:
                found.append(layer)
        return tuple(Layer(layer.name, _kind(layer, shapes), layer.leaves) for layer in found)

    def _assemble(self, params: Params, state: State) -> Params:
        random = trees.flatten(params)
        leaves = [random.get(path, state.get(path, leaf)) for path, leaf in self._leaves.items()]
        return jax.tree.unflatten(self._treedef, leaves)


def _as_array(leaf: Any) -> Array | None:
    """The leaf as a JAX array of its own; None for what is not an array (an activation's name, a switch)."""
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or type(leaf) is float:
        return jnp.array(leaf)
    return None


def _kind(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> LayerKind:
    matrices = [leaf for leaf in layer.leaves if len(shapes[leaf]) >= 2]
    vectors = [shapes[leaf] for leaf in layer.leaves if len(shapes[leaf]) < 2]
    if not matrices:
        return "norm" if len(vectors) > 1 and len(set(vectors)) == 1 and vectors[0] else "other"
    if len(matrices) > 1 or len(shapes[matrices[0]]) != 2:
        return "other"
    num_in, num_out = shapes[matrices[0]]
    if matrices[0].rpartition(trees.SEPARATOR)[2] == "weight":
        # Leaves of this name are read as (out, in): it must be certain that this one is.
        return "dense" if (num_out,) not in vectors and (num_in,) in vectors else "other"
    return "dense" if not vectors or (num_out,) in vectors else "other"
