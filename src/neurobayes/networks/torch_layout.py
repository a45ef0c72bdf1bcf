"""How PyTorch stores the tensors of a layer, and how Flax stores the same numbers."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import trees
from ..errors import OptionError
from .base import Layer, LayerKind

_PACKED = ("in_proj_weight", "in_proj_bias")
_PROJECTIONS = {"query": "q_proj_weight", "key": "k_proj_weight", "value": "v_proj_weight"}
_PARTS = ("weight", "bias", *_PACKED, *_PROJECTIONS.values(), "running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True)
class TorchLayer:
    """The tensors of one PyTorch layer.

    Attributes
    ----------
    name : path of the layer, or of the tensor where that is a parameter of no layer.
    kind : what its shapes show it to be.
    names : part ('weight', 'out_proj.bias') -> full name of the tensor.
    """

    name: str
    kind: LayerKind
    names: Mapping[str, str]


def read_tensors(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name -> array in float32 from a state dict or a safetensors file.

    Raises
    ------
    OptionError
        The file is a pickle, of another format or damaged, or ``source`` holds something that is no tensor.
    """
    if isinstance(source, Mapping):
        return {str(name): _as_array(str(name), tensor) for name, tensor in source.items()}
    if not isinstance(source, (str, os.PathLike)):
        raise OptionError(
            f"source is a {type(source).__name__}. Give a state dict (module.state_dict()) or the path of a "
            ".safetensors file; a PyTorch module itself goes to PartialBNN as it is."
        )
    path = Path(source)
    if path.suffix != ".safetensors":
        raise OptionError(
            f"{path.name!r} is not read: a pickle, such as .pt or .pth, can run any code when it is opened. Save the "
            'weights with safetensors.torch.save_file(module.state_dict(), "model.safetensors") and give that path.'
        )
    if not path.is_file():
        raise OptionError(f"source={str(source)!r} does not exist. Give the path of a .safetensors file.")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(
            f"{path.name!r} cannot be read as a safetensors file ({error}). It may have been copied in part: copy it "
            "again, or write it anew with safetensors.torch.save_file(module.state_dict(), path)."
        ) from error
    return {name: _as_array(name, array) for name, array in tensors.items()}


def _as_array(name: str, tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # NumPy has no bfloat16
    array = np.asarray(tensor)
    if array.dtype == object or not jnp.issubdtype(array.dtype, jnp.number):
        raise OptionError(f"source[{name!r}] is a {type(tensor).__name__}, not a tensor or an array of numbers.")
    return array.astype(np.float32)


def torch_layers(tensors: Mapping[str, np.ndarray], *, has_embeddings: bool) -> list[TorchLayer]:
    """The layers of a state dict in its order; a matrix without bias is an embedding where ``has_embeddings``."""
    packed = {trees.parent(name) for name in tensors if _last(name) in (*_PACKED, *_PROJECTIONS.values())}
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        owner = trees.parent(name)
        if _last(owner) == "out_proj" and trees.parent(owner) in packed:
            owner = trees.parent(owner)
        if _last(name) not in _PARTS:
            owner = name
        groups.setdefault(owner, {})[name[len(owner) :].lstrip(trees.SEPARATOR) or "weight"] = name
    return [
        TorchLayer(owner, _kind({part: tensors[name] for part, name in names.items()}, has_embeddings), names)
        for owner, names in groups.items()
    ]


def _last(name: str) -> str:
    return name.rpartition(trees.SEPARATOR)[2]


def _kind(parts: Mapping[str, np.ndarray], has_embeddings: bool) -> LayerKind:
    if any(part in parts for part in (*_PACKED, *_PROJECTIONS.values())):
        return "attention"
    if "weight" not in parts or "running_mean" in parts:
        return "other"
    weight = parts["weight"]
    is_bare = "bias" not in parts and has_embeddings
    if is_bare and (weight.ndim == 2 or (weight.ndim == 3 and weight.shape[0] == 1)):
        return "embedding"  # of shape (1, length, width) where a position embedding is a parameter by itself
    by_rank: dict[int, LayerKind] = {1: "norm", 2: "dense", 3: "conv", 4: "conv", 5: "conv"}
    return by_rank.get(weight.ndim, "other")


def torch_shape(layer: TorchLayer, tensors: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """What tells layers of one kind apart: the shape of the weight, for attention the width alone."""
    if layer.kind == "attention":
        widths = [tensors[name].shape[-1] for part, name in layer.names.items() if part != "out_proj.bias"]
        return (widths[0],)
    return _squeezed(tensors[layer.names["weight"]], layer.kind).shape


def our_shape(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The value of ``torch_shape`` that fits one of our layers."""
    by_part = {leaf.removeprefix(layer.name + trees.SEPARATOR): shapes[leaf] for leaf in layer.leaves}
    if layer.kind == "attention":
        return by_part["query.kernel"][:1] if "query.kernel" in by_part else None
    if layer.kind == "conv" and "kernel" in by_part:
        *window, num_in, num_out = by_part["kernel"]
        return (num_out, num_in, *window)
    shape = by_part.get("kernel") or by_part.get("embedding") or by_part.get("scale")
    return tuple(reversed(shape)) if shape and layer.kind == "dense" else shape


def converted(
    layer: TorchLayer,
    tensors: Mapping[str, np.ndarray],
    ours: Layer,
    shapes: Mapping[str, tuple[int, ...]],
    flattened: tuple[int, ...] | None,
) -> dict[str, tuple[str, np.ndarray]]:
    """Leaf of ours -> (name of the PyTorch tensor, its numbers in Flax's layout).

    Parameters
    ----------
    flattened : shape ``(*spatial, channels)`` of what our network flattens before this layer, if it does.
    """
    found: dict[str, tuple[str, np.ndarray]] = {}
    for part, name in layer.names.items():
        for leaf, value in _leaves_of(part, tensors[name], ours.kind, flattened):
            path = f"{ours.name}{trees.SEPARATOR}{leaf}"
            found[path] = (name, _by_head(value, leaf, ours.kind, shapes.get(path, ())))
    return found


def in_our_layout(array: np.ndarray, leaf: str, kind: LayerKind, flattened: tuple[int, ...] | None) -> np.ndarray:
    """A single tensor for the leaf it was mapped to by hand."""
    part = "bias" if _last(leaf) == "bias" else "weight"
    return _leaves_of(part, array, kind, flattened)[0][1]


def _leaves_of(
    part: str, array: np.ndarray, kind: LayerKind, flattened: tuple[int, ...] | None
) -> list[tuple[str, np.ndarray]]:
    if kind == "attention":
        return _attention_leaves(part, array)
    if part != "weight":
        return [(part, array)]
    array = _squeezed(array, kind)
    if kind == "dense" and array.ndim == 2:
        return [("kernel", _channels_last(array, flattened).T)]
    if kind == "conv" and array.ndim >= 3:
        return [("kernel", np.moveaxis(array, (0, 1), (-1, -2)))]
    return [({"embedding": "embedding", "norm": "scale"}.get(kind, "kernel"), array)]


def _squeezed(array: np.ndarray, kind: LayerKind) -> np.ndarray:
    return array[0] if kind == "embedding" and array.ndim == 3 and array.shape[0] == 1 else array


def _channels_last(weight: np.ndarray, flattened: tuple[int, ...] | None) -> np.ndarray:
    """The columns of ``weight`` (out, in) in our order, where they count a flattened (channels, *spatial)."""
    if flattened is None or weight.shape[1] != math.prod(flattened):
        return weight
    *spatial, channels = flattened
    return np.moveaxis(weight.reshape(len(weight), channels, *spatial), 1, -1).reshape(weight.shape)


def _attention_leaves(part: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if part in _PACKED:
        leaf = "kernel" if part == "in_proj_weight" else "bias"
        blocks = np.array_split(array, 3)
        return [(f"{name}.{leaf}", block.T) for name, block in zip(_PROJECTIONS, blocks, strict=True)]
    for name, separate in _PROJECTIONS.items():
        if part == separate:
            return [(f"{name}.kernel", array.T)]
    return [({"out_proj.weight": "out.kernel", "out_proj.bias": "out.bias"}.get(part, part), array.T)]


def _by_head(value: np.ndarray, leaf: str, kind: LayerKind, shape: tuple[int, ...]) -> np.ndarray:
    """Attention's numbers with heads and head size as two axes, where the sizes allow it."""
    outer_axis = -1 if leaf == "out.kernel" else 0
    outer_fits = leaf.endswith("bias") or (shape and value.ndim == 2 and value.shape[outer_axis] == shape[outer_axis])
    return value.reshape(shape) if kind == "attention" and outer_fits and value.size == math.prod(shape) else value


def described(names: Iterable[str], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Names of tensors with their shapes."""
    return [f"{name} {tensors[name].shape}" for name in names]
