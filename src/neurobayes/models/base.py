"""What the models share: prepared data, a network with its layers, trained weights that know their units."""

import dataclasses
import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _checks, data, trees
from .._typing import Params
from ..data import Scaling
from ..errors import DataError, OptionError
from ..network_info import DATA_SCORES, NetworkInfo, check_recorded
from ..networks import as_network
from ..networks.base import Network
from ..training import Rows
from ..weight_statistics import TrainingStatistics


@jax.tree_util.register_pytree_with_keys_class
class TrainedParams(dict):
    """Trained weights, a nested dict of arrays, with the units they were trained in.

    ``scaling`` is how inputs and targets were standardised for them and
    ``statistics`` what training recorded of each weight; a model that is given
    these weights uses both. Maps over the tree keep them.
    """

    scaling: Scaling | None = None
    statistics: TrainingStatistics | None = None

    @classmethod
    def of(cls, params: Any, scaling: Scaling, statistics: TrainingStatistics | None) -> Any:
        """``params`` with their scaling; trees that are no dicts are returned as they are."""
        if not isinstance(params, dict):
            return params
        kept = cls(jax.tree.map(np.asarray, dict(params)))
        kept.scaling, kept.statistics = scaling, statistics
        return kept

    def tree_flatten_with_keys(self):
        """Children in key order, as for a plain dict."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], (names, _Opaque(self))

    @classmethod
    def tree_unflatten(cls, aux, children):
        """The same weights container around other leaves."""
        names, source = aux
        made = cls(zip(names, children, strict=True))
        made.scaling, made.statistics = source.scaling, source.statistics
        return made


class _Opaque:
    """Carries scaling and statistics through tree maps without taking part in comparisons of tree structure."""

    def __init__(self, source: TrainedParams):
        self.scaling, self.statistics = source.scaling, source.statistics

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opaque)

    def __hash__(self) -> int:
        return 0


ROOM_FOR_MORE = 20
"""A fit leaves room for one row in this many more, so that a second one with new rows compiles nothing."""

GROWTH = 1.5
"""How much a padded size grows that added rows have filled."""


MOST_TEXT = 80
"""Characters of one argument that the text form of a model shows."""


class Prepared(NamedTuple):
    """Checked and scaled training data, padded to a bucket of rows; ``groups`` has none for padding."""

    rows: Rows
    scaling: Scaling
    row_shape: tuple[int, ...]
    num_rows: int
    num_outputs: int
    target_ndim: int
    columns: tuple[str, ...] | None = None
    groups: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class InputTemplate:
    """The shape of one batch of inputs, known before any data."""

    row_shape: tuple[int, ...]
    tokens: bool

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """A batch of one row."""
        return jax.ShapeDtypeStruct((1, *self.row_shape), np.int32 if self.tokens else np.float32)


def network_info(
    network: Network,
    example: Any,
    params: Params | None = None,
    statistics: Any = None,
    from_data: Callable[[str], Params] | None = None,
) -> NetworkInfo:
    """Layers and shapes of a network for inputs like ``example`` (one row), and its scores.

    ``statistics`` are those of its training; ``from_data`` computes one of ``DATA_SCORES``, and is
    called for a score when that is first asked for.
    """
    if params is None:
        params_or_shapes, _ = jax.eval_shape(network.init, abstract_key(), example)
    else:
        params_or_shapes = params

    @functools.cache
    def scores(name: str):
        if name in DATA_SCORES:
            return None if from_data is None else trees.flatten(from_data(name))
        return None if statistics is None else trees.flatten(_training_score(statistics, name))

    layers = _layers(network, tuple(example.shape), np.dtype(example.dtype))
    return NetworkInfo(layers, trees.shapes(params_or_shapes), params, scores)


@functools.lru_cache(maxsize=64)
def _layers(network: Network, shape: tuple[int, ...], dtype: np.dtype):
    example: Any = jax.ShapeDtypeStruct(shape, dtype)
    return network.layers(example)


def _training_score(statistics: Any, name: str) -> Params:
    if name == "gradient":
        check_recorded(name, statistics)
        return statistics.mean_abs_gradient
    averaged = getattr(statistics, "averaged_variance", None)
    if name == "swag_variance" and averaged is not None:
        return averaged
    check_recorded(name, statistics)
    return statistics.weight_variance


def output_width(network: Network, example: Any) -> int:
    """Number of outputs for inputs like ``example``; networks with another form of output raise."""
    params, state = jax.eval_shape(network.init, abstract_key(), example)
    outputs = jax.eval_shape(network.apply, params, state, example)
    if not hasattr(outputs, "shape") or len(outputs.shape) != 2:
        found = getattr(outputs, "shape", type(outputs).__name__)
        raise OptionError(f"the network must return an array of shape (n, outputs); for one row it returns {found}.")
    return int(outputs.shape[1])


def abstract_key():
    """The shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def prepare(
    network: Network,
    X: Any,
    y: Any,
    *,
    num_classes: int | None,
    standardize: bool | str,
    outputs_per_target: int = 1,
    scaling: Scaling | None = None,
    earlier: tuple[int, int] | None = None,
    room_for: int | None = None,
) -> Prepared:
    """Check training data, scale it, and pad its rows.

    ``scaling`` is that of given weights; None fits one as ``standardize`` says (True, False or "compressed").
    ``earlier`` has the rows of an earlier fit and its padded size, ``room_for`` the most that later ones will have.
    ``outputs_per_target`` is that of the likelihood.
    """
    spec = network.input_spec
    inputs = _checks.as_inputs(X, spec)
    classify = num_classes is not None
    targets = (
        _checks.as_targets(y, len(inputs))
        if num_classes is None
        else _checks.as_class_labels(y, len(inputs), num_classes)
    )
    if scaling is None:
        scaling = Scaling.fit(inputs, None if classify else targets, tokens=spec.tokens, standardize=standardize)
    scaled_x = scaling.inputs(inputs)
    scaled_y = targets if classify else scaling.targets(targets)
    width = output_width(network, jax.ShapeDtypeStruct((1, *inputs.shape[1:]), scaled_x.dtype))
    num_targets = num_classes if classify else scaled_y.shape[1]
    wanted = num_targets * outputs_per_target
    if width != wanted:
        raise _wrong_width(width, num_targets, outputs_per_target, classify)
    size = _padded_size(len(inputs), earlier, room_for)
    rows = Rows(data.pad_rows(scaled_x, size), data.pad_rows(scaled_y, size), data.row_weights(len(inputs), size))
    return Prepared(jax.device_put(rows), scaling, inputs.shape[1:], len(inputs), num_targets, targets.ndim,
                    _checks.column_names(X))  # fmt: skip


def check_standardize(value: Any, allowed: tuple[bool | str, ...]) -> Any:
    """``value``, if it is one of the ``allowed``."""
    if value not in allowed:
        raise OptionError(f"standardize must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value


def compressed(prepared: Prepared) -> Prepared | None:
    """The same data with long tails of standardised columns compressed; None where there are none, or no columns."""
    x = np.asarray(prepared.rows.x)
    scaling = prepared.scaling.compressed(x[: prepared.num_rows])
    if scaling.compression is None:
        return None
    rows = prepared.rows._replace(x=jax.device_put(scaling.compression.apply(x)))
    return prepared._replace(rows=rows, scaling=scaling)


def check_rows(X: Any, network: Network, columns: tuple[str, ...] | None, row_shape: tuple[int, ...]) -> None:
    """Raise where an earlier fit is to be continued with other columns, or rows of another shape, than it had."""
    _checks.check_columns(X, columns)
    _checks.as_inputs(X, network.input_spec, expected_shape=row_shape)


def _padded_size(num_rows: int, earlier: tuple[int, int] | None, room_for: int | None) -> int:
    """How many rows compiled programs are made for: what is asked for, else 5 % more than there are.

    Where a fit adds rows to an earlier one and they fit into that size, it is kept; where they just do not, it grows
    by half, so that adding rows one by one compiles seldom. Any other fit is padded as if it were the first.
    """
    if room_for is not None:
        if _checks.check_positive_int("room_for", room_for) < num_rows:
            raise OptionError(
                f"room_for={room_for} is less than the {num_rows} rows of X. Give the most rows that any of the fits "
                "to come will have, or leave it out."
            )
        return data.bucket_size(room_for, 32)  # that of all fits, so it may well be a size of its own
    if earlier is not None and earlier[0] < num_rows <= earlier[1]:
        return earlier[1]
    if earlier is not None and earlier[0] < num_rows < GROWTH * earlier[0]:
        return data.bucket_size(math.ceil(GROWTH * num_rows))  # many more are likely to follow
    return data.bucket_size(num_rows + num_rows // ROOM_FOR_MORE)


def _wrong_width(width: int, num_targets: int, outputs_per_target: int, classify: bool) -> DataError:
    found = f"num_classes={num_targets}" if classify else f"y has {num_targets} columns"
    remedy = f". Build the network with target_dim={num_targets * outputs_per_target}."
    if outputs_per_target > 1:
        found += ", and noise='network' takes a mean and a log noise std for each"
    elif not classify and width == 2 * num_targets:
        remedy = f"{remedy[:-1]}, or pass noise='network' if its second half is the logarithm of the noise std."
    return DataError(f"the network has {width} outputs but {found}{remedy}")


def as_user_network(architecture: Any) -> Network:
    """The network behind whatever the user passed as one."""
    return as_network(architecture)


def to_target_shape(values: np.ndarray, target_ndim: int) -> np.ndarray:
    """``(..., n, d)`` as the training target was: the last axis dropped for a 1-D target."""
    return values[..., 0] if target_ndim == 1 else values


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities in float64, rows summing to one."""
    shifted = np.asarray(logits, float) - np.max(logits, axis=-1, keepdims=True)
    exponential = np.exp(shifted)
    return exponential / exponential.sum(axis=-1, keepdims=True)


def constructor_text(model: Any) -> str:
    """How a model was constructed, in one line: its required arguments, and the others that differ from the default."""
    parameters = list(inspect.signature(type(model)).parameters.values())
    shown = [_network_text(getattr(model, parameters[0].name))]
    for parameter in parameters[1:]:
        value = getattr(model, parameter.name, parameter.default)
        if parameter.default is inspect.Parameter.empty:
            shown.append(_text(value))
        elif not _is_default(value, parameter.default):
            shown.append(f"{parameter.name}={_text(value)}")
    return f"{type(model).__name__}({', '.join(shown)})"


def _network_text(network: Any) -> str:
    """A network by its class, and by its arguments where these are plain values; its weights are left out."""
    if not dataclasses.is_dataclass(network) or isinstance(network, type):
        return f"({_text(network[0])}, …)" if isinstance(network, tuple) else f"{type(network).__name__}(…)"
    shown = []
    for field in dataclasses.fields(network):
        value = getattr(network, field.name, None)
        if not field.init or field.name in ("parent", "name") or _is_default(value, field.default):
            continue
        if not (
            callable(value) or all(isinstance(v, _PLAIN) for v in (value if isinstance(value, tuple) else [value]))
        ):
            return f"{type(network).__name__}(…)"
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        shown.append(_text(value) if required else f"{field.name}={_text(value)}")
    return f"{type(network).__name__}({', '.join(shown)})"


_PLAIN = (str, int, float, type(None))


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (*_PLAIN, tuple)) and value == default)


def _text(value: Any) -> str:
    """A short text in one line, whatever the value holds."""
    if inspect.isroutine(value):
        return value.__name__
    short = reprlib.Repr()
    short.maxother = short.maxstring = MOST_TEXT
    text = " ".join(short.repr(value).split())
    if text.startswith("<") or hasattr(value, "dtype"):
        return f"{type(value).__name__}(…)"
    if isinstance(value, Mapping) and any(isinstance(entry, Mapping) for entry in value.values()):
        return "{…}"  # weights
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
