"""Small data sets for demos, examples and tests: scikit-learn's bundled ones and a generated one."""

import dataclasses
from typing import Literal

import numpy as np

from . import errors, left_out

Task = Literal["regression", "classification"]

_TASKS: dict[str, Task] = {
    "diabetes": "regression",
    "breast_cancer": "classification",
    "digits": "classification",
    "iris": "classification",
    "wine": "classification",
}
_TARGETS = {
    "diabetes": "disease progression",
    "breast_cancer": "diagnosis",
    "digits": "digit",
    "iris": "species",
    "wine": "cultivar",
}
NAMES = (*_TASKS, "friedman")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Rows, targets and what they are called.

    Attributes
    ----------
    name : the name it was loaded by.
    task : ``"regression"`` or ``"classification"``.
    X : float64, shape (n, num_features).
    y : float64 targets or int32 class labels, shape (n,).
    feature_names : one name per column of ``X``.
    target_name : what ``y`` is.
    class_names : one name per class; empty for regression.
    """

    name: str
    task: Task
    X: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    target_name: str
    class_names: tuple[str, ...] = ()


def load(name: str) -> Dataset:
    """One of the data sets in ``NAMES``, as scikit-learn bundles it (nothing is downloaded).

    ``diabetes`` has its features as scikit-learn gives them by default, centred
    and scaled; all others are in their original units. ``friedman`` is
    ``friedman(500, seed=0)``.

    Raises
    ------
    OptionError
        If there is no such data set; the message names the nearest.
    """
    if name == "friedman":
        return friedman()
    if name not in _TASKS:
        raise errors.unknown_choice("dataset", name, NAMES)
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    task = _TASKS[name]
    return Dataset(
        name=name,
        task=task,
        X=np.asarray(bunch.data, np.float64),
        y=np.asarray(bunch.target, np.float64 if task == "regression" else np.int32),
        feature_names=tuple(str(feature) for feature in bunch.feature_names),
        target_name=_TARGETS[name],
        class_names=() if task == "regression" else tuple(str(label) for label in bunch.target_names),
    )


def friedman(n: int = 500, seed: int = 0, *, num_features: int = 10, noise_std: float = 1.0) -> Dataset:
    """Friedman's first regression problem, generated: five columns matter, the others are noise.

    ``y = 10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4 + noise_std * N(0, 1)``,
    with all columns uniform on [0, 1].

    Parameters
    ----------
    n : number of rows, at least 1.
    seed : the same seed gives the same rows.
    num_features : number of columns, at least 5.
    noise_std : standard deviation of the noise, in the units of ``y``.

    Raises
    ------
    OptionError
        If an option is outside its range.

    References
    ----------
    Friedman (1991), Multivariate adaptive regression splines, doi:10.1214/aos/1176347963.
    """
    if n < 1:
        raise errors.OptionError(f"n={n} must be at least 1.")
    if num_features < 5:
        raise errors.OptionError(f"num_features={num_features} must be at least 5: the function uses five columns.")
    if not (np.isfinite(noise_std) and noise_std >= 0):
        raise errors.OptionError(f"noise_std={noise_std} must be finite and not negative.")
    rng = np.random.default_rng(seed)
    X = rng.uniform(size=(n, num_features))
    signal = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2 + 10 * X[:, 3] + 5 * X[:, 4]
    y = signal + noise_std * rng.standard_normal(n)
    return Dataset("friedman", "regression", X, y, tuple(f"x{i}" for i in range(num_features)), "y")


def split_rows(
    n: int,
    test_fraction: float = 0.2,
    seed: int = 0,
    *,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training rows and of the test rows, in random order.

    The rows are permuted by ``np.random.default_rng(seed).permutation(n)`` and
    the last ``round(n * test_fraction)`` of them are the test set: at least one
    row, and at least one row is left for training.

    Parameters
    ----------
    n : number of rows, at least 2.
    test_fraction : strictly between 0 and 1.
    seed : the same seed gives the same split.
    labels : shape (n,). If given, that share is taken from the rows of each
        class, and every class keeps at least one training row.
    groups : shape (n,), such as batches. If given, that share of the groups is the test set, with all of their rows: at
        least one group, and at least one is left for training.

    Raises
    ------
    DataError
        If there are too few rows, or groups, to split.
    OptionError
        If ``test_fraction`` is outside its range, or both ``labels`` and ``groups`` are given.
    """
    if not 0 < test_fraction < 1:
        raise errors.OptionError(f"test_fraction={test_fraction} must lie strictly between 0 and 1.")
    if n < 2:
        raise errors.DataError(f"{n} row{'' if n == 1 else 's'} cannot be split into training and test rows; give 2.")
    if groups is not None:
        if labels is not None:
            raise errors.OptionError("labels and groups cannot both be kept together. Give one of them.")
        return _split_groups(left_out.as_groups(groups, n), test_fraction, seed)
    order = np.random.default_rng(seed).permutation(n)
    is_test = np.zeros(n, bool)
    if labels is not None:
        if len(labels) != n:
            raise errors.DataError(f"labels has {len(labels)} entries for {n} rows. Each row needs one.")
        permuted = np.asarray(labels)[order]
        for label in np.unique(permuted):
            rows = np.flatnonzero(permuted == label)
            is_test[rows[len(rows) - min(round(len(rows) * test_fraction), len(rows) - 1) :]] = True
    if not is_test.any():
        is_test[n - min(max(round(n * test_fraction), 1), n - 1) :] = True
    return order[~is_test], order[is_test]


def _split_groups(groups: np.ndarray, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator, count = np.random.default_rng(seed), int(groups.max()) + 1
    order = generator.permutation(len(groups))
    chosen = generator.permutation(count)[: min(max(round(count * test_fraction), 1), count - 1)]
    is_test = np.isin(groups[order], chosen)
    return order[~is_test], order[is_test]


def train_test_split(
    X: np.ndarray,
    y: np.ndarray,
    test_fraction: float = 0.2,
    seed: int = 0,
    *,
    stratify: bool = False,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``X_train, X_test, y_train, y_test``, split as ``split_rows`` says.

    Parameters
    ----------
    X, y : arrays with one entry per row.
    test_fraction, seed : see ``split_rows``.
    stratify : whether ``y`` are class labels whose shares are to be kept.
    groups : see ``split_rows``.

    Raises
    ------
    DataError
        If ``X`` and ``y`` differ in length, or there are too few rows.
    """
    X, y = np.asarray(X), np.asarray(y)
    if len(X) != len(y):
        raise errors.DataError(f"y has {len(y)} rows but X has {len(X)}. Each row of X needs one target.")
    train, test = split_rows(len(X), test_fraction, seed, labels=y if stratify else None, groups=groups)
    return X[train], X[test], y[train], y[test]
