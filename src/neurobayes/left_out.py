"""Which rows each of several networks leaves out of its training.

Where many rows repeat the inputs of others, those with the same inputs stay
together: a network that was trained on one of two repeated measurements knows
the other, whose prediction then says nothing of new inputs. The user may say
what else belongs together: batches, samples, families.
"""

from typing import Any, NamedTuple

import numpy as np

from .errors import DataError

PARTS = 8
"""A backbone leaves out one row in this many: enough to be judged by, and few enough to learn nearly all there is."""

FEW_PARTS = 4
FEW_ROWS = 600
"""With fewer rows it leaves out more of them, so that each is new to more backbones: judgement is what is scarce."""

LEAST_INPUTS = 16
"""With fewer different inputs, rows are left out one by one: a quarter of so few would take away whole regions."""

MOST_DISTINCT = 0.75
"""With more different inputs than this share of the rows there are no repeated measurements but a few equal rows, as
there will be among new ones: by rows left out one by one these are predicted as new ones will be."""

MAX_FOLDS = 5

HASHED_ROWS = 1024


class Shares(NamedTuple):
    """Who is trained on what.

    ``weights`` (members, rows) are one for the rows a member is trained on, zero for those it leaves out and for
    padding; ``num_parts`` is one row in how many it leaves out; ``whole`` is whether equal inputs stay together.
    """

    weights: np.ndarray
    num_parts: int
    whole: bool


def default_parts(num_rows: int) -> int:
    """One row in how many each backbone leaves out."""
    return FEW_PARTS if num_rows < FEW_ROWS else PARTS


def hashes(*values: np.ndarray) -> np.ndarray:
    """A number for each row of arrays of ``n`` rows, ``(n,)``, which another row will hardly share."""
    flat = [np.asarray(array).reshape(len(array), -1) for array in values]
    width = sum(array.shape[1] for array in flat)
    factors = np.random.default_rng(0).integers(1, 2**63, width, dtype=np.uint64) | np.uint64(1)
    found = np.zeros(len(flat[0]), np.uint64)
    for first in range(0, len(found), HASHED_ROWS):
        rows = slice(first, first + HASHED_ROWS)
        # Zero is added because -0.0 and 0.0 are one number in two forms.
        bits = np.concatenate([array[rows].astype(np.float32) + 0.0 for array in flat], axis=1).view(np.uint32)
        found[rows] = (bits.astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)  # modulo 2**64
    return found


def repeats(x: np.ndarray) -> bool:
    """Whether many of the inputs ``(n, …)`` are repeated, and enough are different to leave them out as wholes."""
    return LEAST_INPUTS <= len(np.unique(hashes(x))) <= MOST_DISTINCT * len(x)


def whole_inputs(x: np.ndarray) -> np.ndarray:
    """The number of each row's input ``(n,)``, the same for equal ones, in the order of their first appearance."""
    return _numbered(hashes(x))


def as_groups(groups: Any, num_rows: int) -> np.ndarray:
    """The number of each row's group ``(n,)``, in the order of their first appearance.

    Raises
    ------
    DataError : ``groups`` are not one label for each row, some is missing, or all are the same.
    """
    labels = np.asarray(groups, dtype=object)  # numpy would make one kind of text and numbers
    fix = "Give the name or number of each row's group, in the order of the rows."
    if labels.shape != (num_rows,):
        raise DataError(f"groups has shape {labels.shape} and X has {num_rows} rows. {fix}")
    missing = [_is_missing(label) for label in labels]
    if any(missing):
        raise DataError(f"groups has no label for row {missing.index(True)}. {fix}")
    try:
        numbers = _numbered(labels)
    except TypeError:
        raise DataError(f"groups mixes labels of several kinds, which cannot be compared. {fix}") from None
    if numbers.max() == 0:
        raise DataError("groups has one group only, and what is left out must be new. Leave groups out, or give more.")
    return numbers


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # the NA of pandas is neither
        return True


def _numbered(values: np.ndarray) -> np.ndarray:
    """The number of each value, in the order of their first appearance."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def num_groups(x: np.ndarray, whole: bool, groups: np.ndarray | None) -> int:
    """How many groups of rows ``x`` (n, …) are left out as wholes: those given, equal inputs, or single rows."""
    return int(_groups(x, whole, groups).max()) + 1


def _groups(x: np.ndarray, whole: bool, given: np.ndarray | None) -> np.ndarray:
    """The numbers ``(n,)`` of what is left out together: as given, else equal inputs if ``whole``, else single rows."""
    if given is not None:
        return given
    return whole_inputs(x) if whole else np.arange(len(x))


def share_out(
    x: np.ndarray,
    real: np.ndarray,
    num_members: int,
    seed: int,
    num_parts: int | None = None,
    whole: bool | None = None,
    groups: np.ndarray | None = None,
) -> Shares:
    """Share padded rows ``x`` (rows, …) out between backbones.

    ``num_parts`` and ``whole`` follow from the rows where they are not given: by an earlier fit that is continued.
    ``groups`` (rows without padding,) are numbers of what the user wants to stay together.
    """
    x = x[real > 0]
    whole = (groups is None and repeats(x)) if whole is None else whole
    groups = _groups(x, whole, groups)
    if num_parts is None:
        num_parts = min(default_parts(len(x)), int(groups.max()) + 1)
    weights = np.zeros((num_members, len(real)), np.float32)
    weights[:, real > 0] = leave_out(groups, num_members, num_parts, seed)
    return Shares(weights, num_parts, whole)


def leave_out(groups: np.ndarray, num_members: int, num_parts: int, seed: int) -> np.ndarray:
    """Which rows each backbone is trained on, ``(members, rows)`` of ones and zeros.

    Members in sets of ``num_parts`` (two at the least) share the rows out between them, each row left out by one of
    a set. ``groups`` (rows,) are the numbers of what stays together, by first appearance. The first rows' shares do
    not depend on how many follow, so that adding rows leaves them as they are.
    """
    count = int(groups.max()) + 1
    weights = np.ones((num_members, count), np.float32)
    first = 0
    while first < num_members:
        parts = min(num_parts, num_members - first)
        if parts == 1:  # a lone last member leaves out what a set's first one would
            parts = min(num_parts, num_members)
        generator = np.random.default_rng([seed, first])
        blocks = -(-count // parts)
        part = np.argsort(generator.random((blocks, parts)), axis=1).ravel()[:count]
        for k in range(min(parts, num_members - first)):
            weights[first + k, part == k] = 0.0
        first += parts
    return weights[:, groups]


def assign_folds(x: np.ndarray, real: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """A fold number for each row of inputs ``x``; padding gets zero and counts in no fold.

    ``groups`` are as for ``share_out``.
    """
    x = x[real > 0]
    groups = _groups(x, groups is None and repeats(x), groups)
    count = int(groups.max()) + 1
    num_folds = max(2, min(MAX_FOLDS, count))
    folds = np.zeros(len(real), np.int32)
    folds[real > 0] = np.random.default_rng(seed).permutation(np.arange(count) % num_folds)[groups]
    return folds
