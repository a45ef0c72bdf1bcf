"""Reads the data sets and their splits: one ``Problem`` for each (protocol, data set, split)."""

import csv
import dataclasses
import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common

UCI_TARGETS = {"boston": 13, "concrete": 8, "energy": 8, "naval": 16, "wine_red": 11, "airfoil": 5}
ACTIVE_TARGETS = {
    "esol": "logS_mol_per_L",
    "freesolv": "dG_exp_kcal_mol",
    "htem_conductivity": "fpm_conductivity",
}
SMILES_TARGETS = {"esol": "logS_mol_per_L", "lipophilicity": "logD"}
DESCRIPTORS = ("MolWt", "LogP", "TPSA", "NumRotatableBonds", "NumHDonors", "NumHAcceptors", "NumAromaticRings",
               "FractionCSP3", "HallKierAlpha")  # fmt: skip
STEEL_ELEMENTS = ("c", "mn", "si", "cr", "ni", "mo", "v", "n", "nb", "co", "w", "al", "ti")
DIABETES_TEST_ROWS = 92  # of 442, as in `neurobayes demo`
_TOKEN = re.compile(r"Cl|Br|@@|.")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Training and test rows; ``network`` says which kind of network the rows need.

    Baselines take ``flat_train`` and ``flat_test``: the rows as vectors, unless
    the data set has features of its own for them.
    """

    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    num_classes: int | None = None
    network: str = "mlp"  # of configuration.NETWORKS
    vocabulary: int = 0
    features: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def flat_train(self) -> np.ndarray:
        return self.features[0] if self.features else self.X_train.reshape(len(self.X_train), -1)

    @property
    def flat_test(self) -> np.ndarray:
        return self.features[1] if self.features else self.X_test.reshape(len(self.X_test), -1)

    def standardised(self) -> "Problem":
        """Inputs and targets in standard deviations of the training rows."""
        x_mean, x_std = self.X_train.mean(0), self.X_train.std(0)
        x_std = np.where(x_std > 0, x_std, 1.0)
        y_mean, y_std = self.y_train.mean(), self.y_train.std()
        return dataclasses.replace(
            self,
            X_train=(self.X_train - x_mean) / x_std,
            X_test=(self.X_test - x_mean) / x_std,
            y_train=(self.y_train - y_mean) / y_std,
            y_test=(self.y_test - y_mean) / y_std,
        )


class MissingData(Exception):
    """The data folder, or a file in it, is not there."""


def read_columns(path: Path) -> dict[str, list[str]]:
    """A CSV file as text, by the names in its header."""
    if not path.is_file():
        raise MissingData(f"there is no {path}. Give the folder that holds the data sets: --data DIR.")
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def numbers(columns: dict[str, list[str]], names: Sequence[str] | None = None) -> np.ndarray:
    """The named columns (all by default) as float64, shape ``(n, columns)``."""
    return np.array([columns[name] for name in (names or columns)], np.float64).T


def read_row_lists(path: Path, num_rows: int) -> list[np.ndarray]:
    """One array of row numbers for each line; each line must be distinct rows of the data."""
    if not path.is_file():
        raise MissingData(f"there is no {path}. Give the folder that holds the data sets: --data DIR.")
    lists = [np.array(line.split(), int) for line in path.read_text().splitlines() if line.strip()]
    for i, rows in enumerate(lists):
        if len(np.unique(rows)) != len(rows) or rows.min() < 0 or rows.max() >= num_rows:
            raise ValueError(f"{path}, line {i + 1}: row numbers must be distinct and in 0..{num_rows - 1}.")
    return lists


def others(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """All rows but the given ones, in order."""
    return np.setdiff1d(np.arange(num_rows), rows)


def by_test_rows(X: np.ndarray, y: np.ndarray, test: np.ndarray, **more: Any) -> Problem:
    """The given rows are the test set, all others the training set."""
    train = others(test, len(y))
    return Problem(X[train], y[train], X[test], y[test], **more)


def _uci(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    table = numbers(read_columns(folder / f"uci_{name}" / "data.csv"))
    target = UCI_TARGETS[name]  # columns after the target are other outputs
    return table[:, :target], table[:, target]


def _listed(file: str) -> Callable[[Path, str, int], Problem]:
    def load(folder: Path, name: str, split: int) -> Problem:
        X, y = _uci(folder, name)
        return by_test_rows(X, y, read_row_lists(folder / f"uci_{name}" / file, len(y))[split])

    return load


def _bde(folder: Path, name: str, split: int) -> Problem:
    return _listed("split_bde_test.txt")(folder, name, 0).standardised()


def active_pool(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Inputs standardised on all rows, raw targets (log10 for htem), and the initial rows of each seed."""
    columns = read_columns(folder / name / "data.csv")
    target = ACTIVE_TARGETS[name]
    features = DESCRIPTORS if name in SMILES_TARGETS or name == "freesolv" else [c for c in columns if c != target]
    X, y = numbers(columns, features), numbers(columns, [target])[:, 0]
    std = X.std(0)
    X = (X - X.mean(0)) / np.where(std > 0, std, 1.0)
    if name == "htem_conductivity":
        y = np.log10(y)
    return X, y, read_row_lists(folder / name / "al_initial_seeds1-5.txt", len(y))


def _initial(folder: Path, name: str, split: int) -> Problem:
    X, y, initial = active_pool(folder, name)
    return by_test_rows(X, y, others(initial[split], len(y)))


def _steels(folder: Path, name: str, split: int) -> Problem:
    columns = read_columns(folder / name / "data.csv")
    X, y = numbers(columns, STEEL_ELEMENTS), numbers(columns, ["yield_strength_MPa"])[:, 0]
    return by_test_rows(X, y, read_row_lists(folder / name / "folds_test.txt", len(y))[split])


def _friedman(folder: Path, name: str, split: int) -> Problem:
    X, y = _common.friedman(500, seed=split)
    X_new, y_new = _common.friedman(2000, seed=1000 + split)
    return Problem(X, y, X_new, y_new).standardised()


def _diabetes(folder: Path, name: str, split: int) -> Problem:
    import neurobayes as nb

    data = nb.datasets.load("diabetes")
    _, test = nb.datasets.split_rows(len(data.y), DIABETES_TEST_ROWS / len(data.y), seed=0)
    return by_test_rows(data.X, data.y, test).standardised()


def random_test_rows(num_rows: int, share: float, seed: int) -> np.ndarray:
    """The last ``round(share * n)`` rows of ``numpy.random.default_rng(seed).permutation(n)``."""
    return np.random.default_rng(seed).permutation(num_rows)[num_rows - round(share * num_rows) :]


def _classes(share: float, network: str, prefix: str = "") -> Callable[[Path, str, int], Problem]:
    def load(folder: Path, name: str, split: int) -> Problem:
        columns = read_columns(folder / f"{prefix}{name}" / "data.csv")
        label = "label" if "label" in columns else list(columns)[-1]
        X = numbers(columns, [column for column in columns if column != label])
        y = np.unique(numbers(columns, [label])[:, 0], return_inverse=True)[1]
        test = random_test_rows(len(y), share, seed=split + 1)
        return by_test_rows(X, y, test, num_classes=int(y.max()) + 1, network=network)

    return load


def _digits(num_train: int, num_test: int) -> Callable[[Path, str, int], Problem]:
    def load(folder: Path, name: str, split: int) -> Problem:
        path = folder / "mnist_t10k"
        if not path.is_dir():
            raise MissingData(f"there is no {path}. Give the folder that holds the data sets: --data DIR.")
        images = np.frombuffer(gzip.decompress((path / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        labels = np.frombuffer(gzip.decompress((path / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        X, y = images.reshape(-1, 28, 28, 1) / 255.0, labels.astype(int)
        train, test = slice(0, num_train), slice(8000, 8000 + num_test)
        return Problem(X[train], y[train], X[test], y[test], num_classes=10, network="convnet")

    return load


def tokenise(smiles: Sequence[str], train: np.ndarray) -> tuple[np.ndarray, int]:
    """Token ids ``(n, longest)``, 0 for padding and 1 for tokens that no training row has; and their number."""
    split = [_TOKEN.findall(text.strip()) for text in smiles]
    known = {token: i + 2 for i, token in enumerate(sorted({token for row in train for token in split[row]}))}
    tokens = np.zeros((len(split), max(map(len, split))), np.int32)
    for row, found in enumerate(split):
        tokens[row, : len(found)] = [known.get(token, 1) for token in found]
    return tokens, len(known) + 2


def _smiles(folder: Path, name: str, split: int) -> Problem:
    columns = read_columns(folder / name / "data.csv")
    y, features = numbers(columns, [SMILES_TARGETS[name]])[:, 0], numbers(columns, DESCRIPTORS)
    test = random_test_rows(len(y), 0.2, seed=split + 1)
    train = others(test, len(y))
    tokens, vocabulary = tokenise(columns["smiles"], train)
    return by_test_rows(
        tokens, y, test, network="transformer", vocabulary=vocabulary, features=(features[train], features[test])
    )


PROTOCOLS: dict[str, Callable[[Path, str, int], Problem]] = {
    "standard": _listed("splits_standard_test.txt"),
    "gap": _listed("splits_gap_test.txt"),
    "bde": _bde,
    "initial": _initial,
    "steels": _steels,
    "friedman": _friedman,
    "diabetes": _diabetes,
    "half": _classes(0.5, "mlp", prefix="uciclass_"),
    "spectra": _classes(0.2, "convnet"),
    "digits": _digits(8000, 2000),
    "few_digits": _digits(1000, 1000),
    "smiles": _smiles,
}
