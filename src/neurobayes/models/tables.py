"""The table of a network's layers, as text."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import trees
from ..errors import OptionError
from ..network_info import LayerRow, NetworkInfo, layer_table
from ..networks._module_network import ModuleNetwork
from ..subspaces import RandomPart
from .base import as_user_network, network_info


def print_layer_configs(network: Any, input_shape: Sequence[int] | None = None) -> None:
    """Print the layers of a network or model: names, shapes, number of weights, number of Bayesian weights.

    Parameters
    ----------
    network : a network of any supported framework, or a model (fitted or not).
    input_shape : shape of one row of input. Not needed for a fitted model, a module that has its weights (Flax NNX,
        Equinox, PyTorch, a function with its parameters), whose layers are then in the order of their definition and
        not of their calls, or the library's own networks, where sizes that depend on the input print as ``?``.

    Raises
    ------
    OptionError
        The layers of this network cannot be known without ``input_shape``.

    Examples
    --------
    >>> import neurobayes as nb
    >>> nb.print_layer_configs(nb.FlaxMLP([4], 1), input_shape=(3,))
    layer   kind   shapes                   weights  Bayesian
    Dense0  dense  bias (4), kernel (3, 4)       16         -
    Dense1  dense  bias (1), kernel (4, 1)        5         -
    total                                        21         -
    """
    print(format_layers(layer_rows(network, input_shape)))


def layer_rows(network: Any, input_shape: Sequence[int] | None = None) -> list[LayerRow]:
    """The rows of the table; unknown sizes are ``None`` in shapes."""
    partition: RandomPart | None = None
    if hasattr(network, "layer_context"):
        architecture, known_shape, partition = network.layer_context()
        input_shape = input_shape if known_shape is None else known_shape
    else:
        architecture = network
    wrapped = as_user_network(architecture)
    if input_shape is not None:
        dtype = np.int32 if wrapped.input_spec.tokens else np.float32
        example = jax.ShapeDtypeStruct((1, *input_shape), dtype)
        return list(layer_table(network_info(wrapped, example), partition))
    examples = getattr(architecture, "example_inputs", None)
    if examples is None:
        if not isinstance(wrapped, ModuleNetwork):
            raise OptionError(
                "the shapes of this network depend on its input. Pass the shape of one row, "
                "such as print_layer_configs(network, input_shape=(8,))."
            )
        return list(layer_table(NetworkInfo(wrapped.layers(None), trees.shapes(wrapped.pretrained)), partition))
    first, second = (list(layer_table(network_info(wrapped, example))) for example in examples())
    return [_unknown_where_different(a, b) for a, b in zip(first, second, strict=True)]


def format_layers(rows: Sequence[LayerRow]) -> str:
    """The rows as aligned text with a closing total."""
    cells = [("layer", "kind", "shapes", "weights", "Bayesian")]
    cells += [
        (row.layer, row.kind, _shapes(row), _count(row.num_weights), _count(row.num_bayesian, unknown="-"))
        for row in rows
    ]
    known = [row.num_weights for row in rows]
    bayesian = [row.num_bayesian for row in rows]
    total = "?" if any(n < 0 for n in known) else str(sum(known))
    total_bayesian = "-" if any(n is None for n in bayesian) else str(sum(n or 0 for n in bayesian))
    cells.append(("total", "", "", total, total_bayesian))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = []
    for row in cells:
        text = [row[i].ljust(widths[i]) if i < 3 else row[i].rjust(widths[i]) for i in range(5)]
        lines.append("  ".join(text).rstrip())
    return "\n".join(lines)


def _shapes(row: LayerRow) -> str:
    def one(shape):
        return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"

    return ", ".join(f"{name} {one(shape)}" for name, shape in row.shapes)


def _count(number: int | None, unknown: str = "?") -> str:
    return unknown if number is None or number < 0 else str(number)


def _unknown_where_different(a: LayerRow, b: LayerRow) -> LayerRow:
    """The row with sizes that two inputs disagree on marked unknown."""
    shapes: list[tuple[str, tuple[Any, ...]]] = []
    for (name, left), (_, right) in zip(a.shapes, b.shapes, strict=True):
        shapes.append((name, tuple(x if x == y else None for x, y in zip(left, right, strict=True))))
    known = all(size is not None for _, shape in shapes for size in shape)
    weights = sum(math.prod(shape) for _, shape in shapes) if known else -1
    return LayerRow(a.layer, a.kind, tuple(shapes), weights, a.num_bayesian)
