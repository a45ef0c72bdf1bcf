"""What each selector stands for: functions of a network that give masks.

The public selectors in ``selectors`` check their arguments and then keep one
of these functions with its arguments.
"""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import trees
from .errors import SelectionError, nearest
from .network_info import NetworkInfo, as_arrays, check_finite, listed
from .weight_indices import layer_masks, leaf_mask

if TYPE_CHECKING:
    from .selectors import Selector

LeafMasks = dict[str, np.ndarray]
"""Leaf path -> boolean array, True where chosen; a leaf that is absent is not chosen at all."""


def whole(info: NetworkInfo) -> LeafMasks:
    """All leaves."""
    return _all_of(info, info.shapes)


def none(info: NetworkInfo) -> LeafMasks:
    """No leaf."""
    return {}


def last(info: NetworkInfo, k: int) -> LeafMasks:
    """The last ``k`` layers that are not of kind 'norm'."""
    counted = [layer for layer in info.layers if layer.kind != "norm"]
    if k > len(counted):
        raise SelectionError(
            f"last({k}) asks for more layers than the network has: {len(counted)}, normalisation not counted "
            f"({listed(layer.name for layer in counted)}). Use everything() for all weights."
        )
    return _all_of(info, [leaf for layer in counted[-k:] for leaf in layer.leaves])


def layers(info: NetworkInfo, *names: str) -> LeafMasks:
    """The leaves at or below each name."""
    return _all_of(info, [leaf for name in names for leaf in info.leaves_of(name)])


def weights(info: NetworkInfo, *items: tuple[str, tuple[tuple, ...]]) -> LeafMasks:
    """Single weights, from (name, index tuples) items."""
    chosen: LeafMasks = {}
    for name, indices in items:
        layer, leaf = info.find_layer(name), info.find_leaf(name)
        if layer is not None:
            new = layer_masks(layer, info.shapes, indices)
        elif leaf is not None:
            new = {leaf: leaf_mask(leaf, tuple(info.shapes[leaf]), indices)}
        else:
            below = info.leaves_of(name)
            raise SelectionError(f"weights(...) takes a layer or a leaf; {name!r} is neither, but has {listed(below)}.")
        for path_, leaf_chosen in new.items():
            chosen[path_] = chosen[path_] | leaf_chosen if path_ in chosen else leaf_chosen
    return chosen


def path(info: NetworkInfo, pattern: str | re.Pattern[str]) -> LeafMasks:
    """The leaves whose path matches."""
    if isinstance(pattern, re.Pattern) or pattern.startswith("re:"):
        regex = re.compile(pattern[3:] if isinstance(pattern, str) else pattern)
        found = [path_ for path_ in info.shapes if regex.search(path_)]
    else:
        globs = list(_readings(pattern))
        found = [path_ for path_ in info.shapes if any(fnmatch.fnmatchcase(path_, glob) for glob in globs)]
    if not found:
        text = pattern if isinstance(pattern, str) else pattern.pattern
        raise SelectionError(
            f"path({pattern!r}) matches none of the leaves: {listed(info.shapes)}{nearest(text, info.shapes)}. "
            "A glob must match the whole path, for example '*.kernel'."
        )
    return _all_of(info, found)


def _readings(glob: str) -> Iterator[str]:
    """A glob in every sense: each ``[12]`` is the index 12, in either spelling, or one of the digits 1 and 2."""
    pieces = re.split(r"\[(\d+)\]", glob)
    senses = [
        (f".{piece}" if position > 1 or pieces[0] else piece, f"[[]{piece}]", f"[{piece}]")
        if position % 2
        else (piece,)
        for position, piece in enumerate(pieces)
    ]
    return map("".join, itertools.product(*senses))


def mask(info: NetworkInfo, held: "Held") -> LeafMasks:
    """Masks as given, checked against the network's leaves."""
    _check_leaves("mask(tree)", held.value, info, info.shapes)
    for path_, leaf in held.value.items():
        if leaf.shape not in ((), tuple(info.shapes[path_])):
            raise SelectionError(
                f"mask(tree): leaf {path_!r} has shape {leaf.shape}; the weights have {tuple(info.shapes[path_])}."
            )
    chosen = {path_: np.broadcast_to(leaf, info.shapes[path_]) for path_, leaf in held.value.items()}
    if not any(leaf.any() for leaf in chosen.values()):
        raise SelectionError("mask(tree) is False everywhere. For a deterministic network use nothing().")
    return chosen


def module_type(info: NetworkInfo, *kinds: str) -> LeafMasks:
    """The layers of some kinds."""
    found = [leaf for layer in info.layers if layer.kind in kinds for leaf in layer.leaves]
    if not found:
        have = listed(dict.fromkeys(layer.kind for layer in info.layers))
        raise SelectionError(f"the network has no layer of kind {' or '.join(kinds)}; its kinds are: {have}.")
    return _all_of(info, found)


def biases(info: NetworkInfo) -> LeafMasks:
    """The leaves whose name says bias."""
    names = {path_: path_.rpartition(trees.SEPARATOR)[2] for path_ in info.shapes}
    found = [path_ for path_, name in names.items() if name == "b" or "bias" in name.split("_")]
    if not found:
        raise SelectionError(f"biases() matches none of the leaves: {listed(info.shapes)}.")
    return _all_of(info, found)


def random_subset(info: NetworkInfo, k: int, seed: int, within: "Selector | None") -> LeafMasks:
    """``k`` scalars at random."""

    def draw(candidates: np.ndarray, _: LeafMasks) -> np.ndarray:
        return np.random.default_rng(seed).choice(candidates, size=min(k, len(candidates)), replace=False)

    return _subset(info, within, draw)


def top(info: NetworkInfo, k: int, by: Any, within: "Selector | None") -> LeafMasks:
    """The ``k`` scalars with the highest score."""
    scores = by.value if isinstance(by, Held) else info.score(by) if isinstance(by, str) else as_arrays(by(info))

    def best(candidates: np.ndarray, pool: LeafMasks) -> np.ndarray:
        _check_leaves("top: the scores", scores, info, pool)
        for path_, chosen in pool.items():
            if scores[path_].shape != chosen.shape:
                raise SelectionError(
                    f"top: the scores of {path_!r} have shape {scores[path_].shape}; the weights have {chosen.shape}."
                )
            check_finite(np.where(chosen, scores[path_], 0.0), path_, "score")
        flat = np.concatenate([scores[path_].ravel() for path_ in pool])
        return candidates[np.argsort(-flat[candidates], kind="stable")[:k]]

    return _subset(info, within, best)


def _subset(
    info: NetworkInfo, within: "Selector | None", pick: Callable[[np.ndarray, LeafMasks], np.ndarray]
) -> LeafMasks:
    """The weights that ``pick`` takes of the candidates: flat positions over the leaves that ``within`` touches."""
    masks = whole(info) if within is None else within.masks(info)
    pool = {path_: np.asarray(masks[path_]) for path_ in info.shapes if path_ in masks and np.any(masks[path_])}
    if not pool:
        raise SelectionError(f"there are no weights to choose from{'' if within is None else f' in {within!r}'}.")
    flat = np.concatenate([leaf.ravel() for leaf in pool.values()])
    chosen = np.zeros_like(flat)
    chosen[pick(np.flatnonzero(flat), pool)] = True
    ends = np.cumsum([leaf.size for leaf in pool.values()])[:-1]
    parts = np.split(chosen, ends)
    return {path_: part.reshape(leaf.shape) for (path_, leaf), part in zip(pool.items(), parts, strict=True)}


def _all_of(info: NetworkInfo, leaves: Iterable[str]) -> LeafMasks:
    return {leaf: np.ones(info.shapes[leaf], bool) for leaf in leaves}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Held:
    """Arrays by leaf path as an argument of a rule, compared by identity."""

    value: LeafMasks


def _check_leaves(owner: str, given: Mapping[str, Any], info: NetworkInfo, needed: Iterable[str]) -> None:
    for path_ in given:
        if path_ not in info.shapes:
            raise SelectionError(f"{owner}: the network has no leaf {path_!r}{nearest(path_, info.shapes)}.")
    missing = [path_ for path_ in needed if path_ not in given]
    if missing:
        raise SelectionError(f"{owner}: nothing is given for the leaves {listed(missing)}.")
