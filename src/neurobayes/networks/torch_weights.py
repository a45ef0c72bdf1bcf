"""Weights of PyTorch networks for the library's own Flax networks."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import trees
from .._typing import Array, Params, State
from ..errors import OptionError, ParameterError, nearest
from .adapters import as_network
from .base import Layer, Network
from .torch_layout import TorchLayer, converted, described, in_our_layout, our_shape, read_tensors, torch_layers
from .torch_layout import torch_shape as shape_of


def load_torch_weights(
    network: Any,
    source: Mapping[str, Any] | str | os.PathLike[str],
    input_shape: int | tuple[int, ...] | None = None,
    *,
    x_example: Array | np.ndarray | None = None,
    name_map: Mapping[str, str | None] | None = None,
) -> Params:
    """The parameters of ``network`` with the weights of a PyTorch network of the same architecture.

    Layers are matched by kind and order: the first ``Linear`` of the state
    dict goes to the first ``Dense`` that our network calls, the second to the
    second, and likewise for ``Conv1d/2d/3d``, ``LayerNorm`` and
    ``MultiheadAttention``; embeddings by shape. A safetensors file does not keep
    the order, so its layers are matched by shape and, among equal shapes, by the
    numbers in their names. Kernels are transposed, attention's packed projection
    is split into query, key and value by head, and the first dense layer after
    a flattening is reordered from PyTorch's channels-first to our
    channels-last. What the state dict cannot show, such as activations or
    normalisation before or after, is yours to make equal.

    Parameters
    ----------
    network : FlaxMLP, FlaxConvNet, FlaxTransformer, or a linen module of such layers.
    source : a ``state_dict`` (name -> tensor or NumPy array), or the path of a ``.safetensors`` file.
    input_shape : shape of one row, without the batch axis: ``8``, ``(28, 28, 1)``. Token
        networks that state their longest sequence need none.
    x_example : some rows of X, instead of ``input_shape``.
    name_map : what order gets wrong or cannot tell: a PyTorch layer -> ours
        (``{"body.3": "Dense1"}``), a PyTorch tensor -> one of our leaves
        (``{"pos": "PosEmbed.embedding"}``), or either -> None to leave it out.

    Returns
    -------
    Pytree of float32 arrays, for ``deterministic_weights``.

    Raises
    ------
    ParameterError
        Weights are missing, left over, of other shapes, or of unknown order;
        one message lists all of them.
    OptionError
        ``source`` is a pickle (``.pt``, ``.pth``), which could run code when read, or the file is damaged.

    Notes
    -----
    Flax's LayerNorm adds 1e-6 to the variance, PyTorch's 1e-5, so that outputs
    of networks with normalisation agree to about 1e-5 times their size.
    """
    tensors = read_tensors(source)
    adapted = as_network(network)
    x = _example(adapted, input_shape, x_example)
    like, state = jax.eval_shape(adapted.init, jax.random.key(0), x)
    match = _Match(tensors, adapted.layers(x), trees.shapes(like), _flattenings(adapted, like, state, x))
    match.by_name(name_map or {})
    match.by_order(keeps_order=isinstance(source, Mapping))
    leaves = match.finish(type(network).__name__)
    return trees.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, like)


class _Match:
    """Which PyTorch tensor goes to which of our leaves, and a list of all that does not fit."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        layers: tuple[Layer, ...],
        shapes: Mapping[str, tuple[int, ...]],
        flattenings: Mapping[int, tuple[int, ...]],
    ) -> None:
        self._tensors = tensors
        self._shapes = shapes
        self._open = {layer.name: layer for layer in layers}
        self._left = {
            layer.name: layer
            for layer in torch_layers(tensors, has_embeddings=any(layer.kind == "embedding" for layer in layers))
        }
        self._flattened = _first_dense_after(layers, shapes, flattenings)
        self._owner = {leaf: layer for layer in layers for leaf in layer.leaves}
        self._values: dict[str, np.ndarray] = {}
        self._taken: set[str] = set()  # tensors that were used, or are left out on purpose
        self._faulty: set[str] = set()  # leaves that another message names already
        self._problems: list[str] = []

    def by_name(self, name_map: Mapping[str, str | None]) -> None:
        """Match what the user named."""
        for theirs, ours in name_map.items():
            under = [name for name in self._left if trees.is_under(name, theirs)]
            if theirs in self._left and ours in self._open:
                self._match_layers(self._left[theirs], self._open[ours])
            elif theirs in self._tensors:
                self._match_tensor(theirs, ours)
            elif under and ours is None:
                for name in under:
                    self._taken.update(self._left.pop(name).names.values())
            elif under:
                self._problems.append(
                    f"name_map: {ours!r} is no layer of our network, or already matched{nearest(str(ours), self._open)}"
                )
            else:
                known = nearest(theirs, [*self._left, *self._tensors])
                self._problems.append(f"name_map: {theirs!r} is not in the PyTorch weights{known}")

    def by_order(self, *, keeps_order: bool) -> None:
        """Match the rest, kind by kind."""
        for kind in dict.fromkeys(layer.kind for layer in self._open.values()):
            theirs = [layer for layer in self._left.values() if layer.kind == kind]
            ours = [layer for layer in self._open.values() if layer.kind == kind]
            if not keeps_order or kind == "embedding":
                theirs = self._sorted_by_shape(theirs, ours, check_names=not keeps_order)
            for their_layer, our_layer in zip(theirs, ours, strict=False):  # what is over is reported at the end
                if their_layer is not None:
                    self._match_layers(their_layer, our_layer)

    def finish(self, network: str) -> dict[str, np.ndarray]:
        """The leaves of our network, if all is well."""
        missing = [
            f"{path} {shape}"
            for path, shape in self._shapes.items()
            if path not in self._values and path not in self._faulty
        ]
        unused = described((name for name in self._tensors if name not in self._taken), self._tensors)
        if missing:
            self._problems.append(f"missing, no PyTorch tensor for: {', '.join(missing)}")
        if unused:
            self._problems.append(f"unexpected, no place for: {', '.join(unused)}")
        if self._problems:
            lines = "".join(f"\n  - {problem}" for problem in self._problems)
            raise ParameterError(
                f"the PyTorch weights do not fit {network}:{lines}\nMake the architectures equal, or say what belongs "
                'together: name_map={"their.layer": "Dense0", "their.extra": None}.'
            )
        return self._values

    def _match_layers(self, theirs: TorchLayer, ours: Layer) -> None:
        del self._left[theirs.name], self._open[ours.name]
        found = converted(theirs, self._tensors, ours, self._shapes, self._flattened.get(ours.name))
        for path, (name, value) in found.items():
            self._put(path, name, value)

    def _match_tensor(self, name: str, path: str | None) -> None:
        for layer in [layer for layer in self._left.values() if name in layer.names.values()]:
            rest = {part: other for part, other in layer.names.items() if other != name}
            del self._left[layer.name]
            if rest:
                self._left[layer.name] = TorchLayer(layer.name, layer.kind, rest)
        self._taken.add(name)
        if path is None:
            return
        if path not in self._shapes:
            self._problems.append(f"name_map: {path!r} is not a leaf of our network{nearest(path, self._shapes)}")
            return
        owner = self._owner[path]
        value = in_our_layout(self._tensors[name], path, owner.kind, self._flattened.get(owner.name))
        self._put(path, name, value)
        if all(leaf in self._values or leaf in self._faulty for leaf in owner.leaves):
            self._open.pop(owner.name, None)

    def _put(self, path: str, name: str, value: np.ndarray) -> None:
        if path not in self._shapes:
            return  # stays among the unexpected
        self._taken.add(name)
        if value.shape == self._shapes[path]:
            self._values[path] = np.ascontiguousarray(value)
        else:
            self._faulty.add(path)
            self._problems.append(
                f"wrong shape: {name} {self._tensors[name].shape} gives {value.shape} for {path}, "
                f"which needs {self._shapes[path]}"
            )

    def _sorted_by_shape(
        self, theirs: list[TorchLayer], ours: list[Layer], *, check_names: bool
    ) -> list[TorchLayer | None]:
        """``theirs`` in the order of ``ours``: equal shapes together, among those by number."""
        buckets: dict[tuple[int, ...], list[TorchLayer]] = {}
        for layer in theirs:
            buckets.setdefault(shape_of(layer, self._tensors), []).append(layer)
        if check_names:
            for bucket in buckets.values():
                self._check_numbered(bucket)
                bucket.sort(key=lambda layer: _numbers(layer.name))
        fitting = [
            bucket.pop(0) if (bucket := buckets.get(our_shape(layer, self._shapes) or ())) else None for layer in ours
        ]
        rest = iter([layer for bucket in buckets.values() for layer in bucket])
        return [layer if layer is not None else next(rest, None) for layer in fitting]

    def _check_numbered(self, layers: list[TorchLayer]) -> None:
        if len({re.sub(r"\d+", "", layer.name) for layer in layers}) > 1:
            names = ", ".join(layer.name for layer in layers)
            self._problems.append(
                f"unknown order: {names} have equal shapes and a safetensors file keeps no order; name them in name_map"
            )


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _example(network: Network, input_shape: int | tuple[int, ...] | None, x_example: Any) -> Any:
    """Two rows of the input that the network will see, as shape and type."""
    spec = network.input_spec
    is_known = spec.max_length is not None and spec.tokens
    if (input_shape is None) == (x_example is None) and not (x_example is None and is_known):
        raise OptionError(
            "give either input_shape, the shape of one row (8 or (28, 28, 1)), or x_example, some rows of X: "
            "the shapes of the first weights depend on it."
        )
    if x_example is not None:
        row = np.shape(x_example)[1:]
    elif input_shape is not None:
        row = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    else:
        row = (spec.max_length or 1,)
    return jax.ShapeDtypeStruct((2, *row), jnp.int32 if spec.tokens else jnp.float32)


def _flattenings(network: Network, params: Params, state: State, x: Any) -> dict[int, tuple[int, ...]]:
    """Number of features -> the shape ``(*spatial, channels)`` that the network flattens to as many."""
    shapes: dict[int, tuple[int, ...]] = {}
    for eqn in jax.make_jaxpr(network.apply)(params, state, x).eqns:
        if eqn.primitive.name == "reshape":
            before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            if len(before) >= 3 and len(after) == 2 and before[0] == after[0]:
                shapes.setdefault(after[1], before[1:])
    return shapes


def _first_dense_after(
    layers: tuple[Layer, ...], shapes: Mapping[str, tuple[int, ...]], flattenings: Mapping[int, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """For each flattening, the name of the first dense layer with as many inputs."""
    found: dict[int, str] = {}
    for layer in layers:
        num_in = shapes.get(f"{layer.name}{trees.SEPARATOR}kernel", (0,))[0]
        if layer.kind == "dense" and num_in in flattenings:
            found.setdefault(num_in, layer.name)
    return {name: flattenings[num_in] for num_in, name in found.items()}
