"""The one language in which Bayesian weights are chosen.

A selector is a small immutable expression: ``last(1) | layers("Dense0") - biases()``.
It knows nothing of a particular network until ``resolve(selector, info)`` turns it
into a ``Partition``. ``-`` binds tighter than ``&``, and ``&`` tighter than ``|``.

A selector that matches nothing raises; only ``nothing()`` may choose nothing.
"""

import abc
import dataclasses
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import numpy as np

from . import selector_rules as rules
from . import trees
from .errors import SelectionError, unknown_choice
from .network_info import SCORE_NAMES, LayerRow, NetworkInfo, as_arrays, layer_table
from .networks.base import LayerKind
from .partition import Partition
from .selector_rules import LeafMasks

__all__ = [
    "LayerRow", "NetworkInfo", "Selector", "biases", "everything", "from_keywords", "last", "layer_table", "layers",
    "mask", "module_type", "norms", "nothing", "path", "random_subset", "resolve", "top", "weights",
]  # fmt: skip


class Selector(abc.ABC):
    """A choice of weights; combine with ``|`` (either), ``&`` (both) and ``-`` (the first but not the second).

    Examples
    --------
    >>> last(1) | layers("Dense0") - biases()
    last(1) | (layers('Dense0') - biases())
    """

    stands_alone: ClassVar[bool] = False
    """Whether the selector picks no single weights, so that it cannot be combined with others."""

    @abc.abstractmethod
    def masks(self, info: NetworkInfo) -> LeafMasks:
        """The choice in a network, as boolean arrays by leaf path; a leaf that is absent is not chosen at all.

        Raises
        ------
        SelectionError
            Nothing matches, or something named does not exist.
        """

    def __or__(self, other: "Selector") -> "Selector":
        return _combine("|", self, other)

    def __and__(self, other: "Selector") -> "Selector":
        return _combine("&", self, other)

    def __sub__(self, other: "Selector") -> "Selector":
        return _combine("-", self, other)


@dataclasses.dataclass(frozen=True, repr=False)
class _Rule(Selector):
    """A selector of one piece: a module-level function (so that it pickles) and its arguments."""

    text: str
    function: Callable[..., LeafMasks]
    arguments: tuple = ()

    def masks(self, info: NetworkInfo) -> LeafMasks:
        return self.function(info, *self.arguments)

    def __repr__(self) -> str:
        return self.text


_OPERATIONS = {"|": np.logical_or, "&": np.logical_and, "-": np.greater}


@dataclasses.dataclass(frozen=True, repr=False)
class _Combined(Selector):
    operator: str
    left: Selector
    right: Selector

    def masks(self, info: NetworkInfo) -> LeafMasks:
        left, right = self.left.masks(info), self.right.masks(info)
        operation = _OPERATIONS[self.operator]
        leaves = left.keys() | right.keys()
        combined = {leaf: operation(left.get(leaf, False), right.get(leaf, False)) for leaf in leaves}
        if not any(chosen.any() for chosen in combined.values()):
            raise SelectionError(
                f"{self!r} matches no weight of the network: its two sides {_WHY_EMPTY[self.operator]}. "
                "For a network without Bayesian weights use nothing()."
            )
        return combined

    def __repr__(self) -> str:
        left = f"({self.left!r})" if isinstance(self.left, _Combined) and self.left.operator != self.operator else None
        right = f"({self.right!r})" if isinstance(self.right, _Combined) else None
        return f"{left or repr(self.left)} {self.operator} {right or repr(self.right)}"


def _combine(operator: str, left: Selector, right: Any) -> Selector:
    if not isinstance(right, Selector):
        return NotImplemented
    for side in (left, right):
        if side.stands_alone:
            raise SelectionError(
                f"{side!r} chooses directions of weight space and no single weights, so it cannot be combined: "
                f"got {left!r} {operator} {right!r}. Pass it alone, as bayesian={side!r}."
            )
    return _Combined(operator, left, right)


_WHY_EMPTY = {"|": "are both empty", "&": "have no weight in common", "-": "leave nothing of the first"}


def resolve(selector: Selector, info: NetworkInfo) -> Partition:
    """The partition of a network that a selector stands for.

    Raises
    ------
    SelectionError
        The selector matches nothing and is not ``nothing()``, names what does not
        exist, or is no selector.

    Examples
    --------
    >>> from neurobayes.networks.base import Layer
    >>> dense = Layer("Dense0", "dense", ("Dense0.kernel", "Dense0.bias"))
    >>> info = NetworkInfo((dense,), {"Dense0.bias": (3,), "Dense0.kernel": (2, 3)})
    >>> resolve(weights({"Dense0": [(0, 2), (1, 1)]}) | biases(), info)
    <Partition: 5 of 9 scalars random, in 2 of 2 leaves>
    """
    _check_selector("a selector", selector)
    chosen = selector.masks(info)
    if selector != nothing() and not any(leaf.any() for leaf in chosen.values()):
        raise SelectionError(f"{selector!r} matches no weight of the network. `nothing()` alone may do so.")
    return Partition.from_masks(chosen, info.shapes)


def everything() -> Selector:
    """Every weight: the fully Bayesian network."""
    return _Rule("everything()", rules.whole)


def nothing() -> Selector:
    """No weight: the deterministic network."""
    return _Rule("nothing()", rules.none)


def last(k: int) -> Selector:
    """The last ``k`` layers in the order of calls; the output layer counts, normalisation layers do not."""
    k = check_count("last(k)", k)
    return _Rule(f"last({k})", rules.last, (k,))


def layers(*names: str) -> Selector:
    """Whole layers by name, all layers below a name (``encoder``), or single leaves (``Dense0.bias``)."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise SelectionError(f"layers(...) takes one or more names, as in layers('Dense0', 'Dense1'); got {names!r}.")
    return _Rule(f"layers({', '.join(map(repr, names))})", rules.layers, names)


def weights(indices: Mapping[str, Iterable[tuple]]) -> Selector:
    """Single weights by layer.

    Parameters
    ----------
    indices : name of a layer -> index tuples: dense ``(in, out)``; conv
        ``(in_channel, out_channel)``, the whole kernel window; embedding
        ``(token, feature)``; attention ``(projection, in, out)`` with projection
        one of 'query', 'key', 'value', 'out' and heads and head size as one axis.
        The path of a leaf takes one number per axis: ``{"Dense0.bias": [(3,)]}``.

    Raises
    ------
    SelectionError
        When made: wrong types, or nothing listed. When resolved: an unknown name, or an
        index that is out of range, negative, repeated or of the wrong length.
    """
    fix = "Give them as {'Dense0': [(0, 5), (2, 10)]}."
    if not isinstance(indices, Mapping) or not indices:
        raise SelectionError(f"weights(...) takes a non-empty mapping of layers to indices; got {indices!r}. {fix}")
    frozen = []
    for name, given in indices.items():
        if not isinstance(name, str) or isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
            raise SelectionError(f"weights(...): {name!r}: {given!r} is not a layer name and its index tuples. {fix}")
        tuples = tuple(_as_tuple(name, index) for index in given)
        if not tuples:
            raise SelectionError(f"weights(...): no weight is listed for {name!r}. Leave the layer out, or list some.")
        frozen.append((name, tuples))
    return _Rule(f"weights({ {name: list(tuples) for name, tuples in frozen} })", rules.weights, tuple(frozen))


def path(pattern: str | re.Pattern[str]) -> Selector:
    """Leaves whose path matches a pattern.

    Parameters
    ----------
    pattern : a glob for the whole path (``*.kernel``, where ``*`` also matches dots); or a
        regular expression to be found anywhere in it, compiled or as ``"re:Dense[01]"``.
        In a glob ``[0]`` is an index as well (``blocks[0].*`` is ``blocks.0.*``), beside one of the digits in brackets.
    """
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise SelectionError(f"path({pattern!r}) is no valid regular expression: {error}.") from error
    elif not pattern or not isinstance(pattern, (str, re.Pattern)):
        raise SelectionError(f"path(pattern) takes a glob, 're:...' or a compiled pattern; got {pattern!r}.")
    return _Rule(f"path({pattern!r})", rules.path, (pattern,))


def mask(tree: Any) -> Selector:
    """Weights where a pytree of booleans, structured like the parameters or keyed by leaf path, is True.

    A leaf may be one boolean for the whole array. Every leaf must be present.
    """
    leaves = {path_: np.array(leaf) for path_, leaf in trees.flatten(tree).items()}
    for path_, leaf in leaves.items():
        if leaf.dtype != bool:
            raise SelectionError(f"mask(tree): leaf {path_!r} must be boolean; got {leaf.dtype}. Use .astype(bool).")
    shown = f"<{len(leaves)} boolean leaves>"
    return _Rule(f"mask({shown})", rules.mask, (rules.Held(leaves),))


def module_type(*kinds: LayerKind) -> Selector:
    """All layers of some kinds: 'dense', 'conv', 'attention', 'embedding', 'norm' or 'other'."""
    if not kinds:
        raise SelectionError(f"module_type(...) takes one or more of: {', '.join(get_args(LayerKind))}.")
    for kind in kinds:
        if kind not in get_args(LayerKind):
            raise unknown_choice("module_type", kind, get_args(LayerKind))
    return _Rule(f"module_type({', '.join(map(repr, kinds))})", rules.module_type, kinds)


def norms() -> Selector:
    """All weights of normalisation layers."""
    return _Rule("norms()", rules.module_type, ("norm",))


def biases() -> Selector:
    """All leaves called bias (also ``in_proj_bias``, ``bias_hh_l0``, ``b``), those of normalisation layers included."""
    return _Rule("biases()", rules.biases)


def random_subset(k: int, seed: int = 0, within: Selector | None = None) -> Selector:
    """Exactly ``k`` scalars at random (all, where there are fewer), of the whole network or ``within`` a selector."""
    k = check_count("random_subset(k)", k)
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or seed < 0:
        raise SelectionError(f"random_subset: seed must be a whole number, 0 or more; got {seed!r}.")
    inside = _within(within)
    return _Rule(f"random_subset({k}, seed={int(seed)}{inside})", rules.random_subset, (k, int(seed), within))


def top(k: int, by: str | Callable[[NetworkInfo], Any] | Any = "magnitude", within: Selector | None = None) -> Selector:
    """The ``k`` scalars with the highest score, over all layers together (all, where there are fewer).

    Parameters
    ----------
    k : at least 1. Equal scores are ranked by leaf and position, so that the choice is always the same.
    by : 'magnitude' (absolute value); 'variance' or 'gradient' (over the second half of training);
        'swag_variance' (over the weights that were averaged, with ``swa_config``; without it the same as
        'variance'); 'fisher' (mean squared gradient of a row's log likelihood); 'laplace_variance' (posterior
        variance, from the diagonal curvature and the prior); a pytree of scores like the parameters, or keyed
        by leaf path; or a function of ``NetworkInfo`` that gives one. 'fisher' and 'laplace_variance' look at
        the training data, so they are known inside ``PartialBNN.fit`` only.
    within : rank the weights of this selector only.

    Raises
    ------
    SelectionError
        When resolved: a score is missing, has the wrong shape, or is not finite.
    """
    k = check_count("top(k)", k)
    if isinstance(by, str) and by not in SCORE_NAMES:
        raise unknown_choice("by", by, SCORE_NAMES)
    is_tree = not isinstance(by, str) and not callable(by)
    shown = "<scores>" if is_tree else repr(by) if isinstance(by, str) else getattr(by, "__qualname__", repr(by))
    inside = _within(within)
    return _Rule(f"top({k}, by={shown}{inside})", rules.top, (k, rules.Held(as_arrays(by)) if is_tree else by, within))


def from_keywords(
    num_probabilistic_layers: int | None = None,
    probabilistic_layer_names: Sequence[str] | None = None,
    probabilistic_neurons: Mapping[str, Iterable[tuple]] | None = None,
    bayesian: Selector | None = None,
) -> Selector:
    """The union of all that the keyword arguments of a model ask for; the last layer where they ask for nothing.

    Raises
    ------
    SelectionError
        An argument is empty, zero or of the wrong type.
    """
    fix = "Leave it out, or for a deterministic network give bayesian=nothing() alone."
    parts: list[Selector] = []
    if num_probabilistic_layers is not None:
        parts.append(last(check_count("num_probabilistic_layers", num_probabilistic_layers, fix)))
    if probabilistic_layer_names is not None:
        if isinstance(probabilistic_layer_names, (str, Mapping)) or not isinstance(probabilistic_layer_names, Iterable):
            raise SelectionError(
                f"probabilistic_layer_names must be a list of names; got {probabilistic_layer_names!r}. "
                "Write ['Dense1'] for one layer."
            )
        names = tuple(probabilistic_layer_names)
        if not names:
            raise SelectionError(f"probabilistic_layer_names is empty. {fix}")
        parts.append(layers(*names))
    if probabilistic_neurons is not None:
        if isinstance(probabilistic_neurons, Mapping) and not probabilistic_neurons:
            raise SelectionError(f"probabilistic_neurons is empty. {fix}")
        parts.append(weights(probabilistic_neurons))
    if bayesian is not None:
        parts.append(_check_selector("bayesian", bayesian))
    if not parts:
        return last(1)
    union = parts[0]
    for part in parts[1:]:
        union = union | part
    return union


def check_count(name: str, value: object, fix: str = "") -> int:
    """``value`` as an int, or an error where it is no whole number or below 1."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral) or value < 1:
        raise SelectionError(f"{name} must be a whole number, 1 or more; got {value!r}. {fix}".rstrip())
    return int(value)


def _as_tuple(name: str, index: Any) -> tuple:
    """An index as a tuple of plain ints and strings, so that it prints as it was meant."""
    if not isinstance(index, (tuple, list, np.ndarray)):
        raise SelectionError(f"{name!r}: a weight index is a tuple such as (0, 5); got {index!r}.")
    return tuple(n.item() if isinstance(n, np.generic) else n for n in index)


def _check_selector(name: str, value: Any) -> Selector:
    if not isinstance(value, Selector):
        fix = f"layers({value!r})" if isinstance(value, str) else "last(1), layers('Dense0') or weights({...})"
        raise SelectionError(f"{name} must be a selector such as {fix}; got {value!r}.")
    return value


def _within(within: Selector | None) -> str:
    return "" if within is None else f", within={_check_selector('within', within)!r}"
