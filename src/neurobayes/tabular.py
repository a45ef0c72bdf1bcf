"""Columns of a CSV file as X and y: numbers stay numbers, text becomes one-hot, faults name column and line."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from . import errors
from .csv_files import Table, check_exists, check_missing

MAX_CATEGORIES = 30
"""A text column with more distinct values than this is refused instead of one-hot encoded."""
MAX_CLASSES = 50
"""A target with more distinct classes than this is refused."""

_FEW_VALUES = 10  # a whole-number target with no more distinct values than this may have been meant as classes


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that is used as a feature: numeric if ``levels`` is empty, else one 0/1 column per level."""

    name: str
    levels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How the columns of one table become X and y, and those of another in the same way.

    Attributes
    ----------
    columns : the columns used as features.
    target : name of the target column.
    classes : the class names by label; empty for regression.
    dropped : columns left out because they are constant.
    ignored : columns left out on request.
    notes : what a user should be told, one sentence each.
    """

    columns: tuple[Column, ...]
    target: str
    classes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """``"classification"`` if the target was read as classes, else ``"regression"``."""
        return "classification" if self.classes else "regression"

    @property
    def feature_names(self) -> tuple[str, ...]:
        """One name per column of X; a one-hot column is called ``column=level``."""
        return tuple(name for c in self.columns for name in ([f"{c.name}={level}" for level in c.levels] or [c.name]))

    def transform(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """X, float64 (n, num_features), and y, float64 or int32 class labels (n,).

        Raises
        ------
        DataError
            If the columns differ from those that were encoded, a cell is
            missing or not a number, or a category or class is a new one.
        """
        self._check_columns(table)
        used = [column.name for column in self.columns]
        check_missing(table, [*used, self.target])
        blocks = [_one_hot(table, c) if c.levels else _numbers(table, c.name)[:, None] for c in self.columns]
        X = np.concatenate(blocks, axis=1)
        return X, _labels(table, self.target, self.classes) if self.classes else _numbers(table, self.target)

    def _check_columns(self, table: Table) -> None:
        expected = {column.name for column in self.columns} | {self.target, *self.dropped}
        given = set(table.columns) - set(self.ignored)
        for name in sorted(expected - given):
            raise errors.DataError(f"{table.path} has no column {name!r}{errors.nearest(name, given)}. Add it.")
        for name in sorted(given - expected):
            raise errors.DataError(f"{table.path} has a column {name!r} that the training file lacks. Remove it.")


def encode(table: Table, target: str, *, task: str = "auto", ignore: Iterable[str] = ()) -> Encoding:
    """Decide how each column of ``table`` is used.

    A column of numbers is used as it is; a column of text with up to
    ``MAX_CATEGORIES`` distinct values is one-hot encoded; a column in which at
    least half of the cells, but not all, are numbers is an error; a constant
    column is left out.

    Parameters
    ----------
    table : the training rows (and the test rows, where they come from the same file).
    target : name of the column to predict.
    task : ``"regression"``, ``"classification"``, or ``"auto"``: classification
        if the target is text, else regression, even for a target of few whole numbers.
    ignore : names of columns that are not to be used.

    Raises
    ------
    DataError
        If there are fewer than two rows, a column does not exist, a cell is missing or not a number, a text
        column has too many distinct values, the target has too many or only
        one class, or no column is left.
    OptionError
        If ``task`` is unknown.
    """
    if task not in ("auto", "regression", "classification"):
        raise errors.unknown_choice("task", task, ("auto", "regression", "classification"))
    if len(table) < 2:
        raise errors.DataError(f"{table.path} has only {len(table)} row of data. At least 2 are needed to train on.")
    ignored = tuple(ignore)
    for name in (target, *ignored):
        check_exists(table, name)
    if target in ignored:
        raise errors.DataError(f"{target!r} is the target and cannot be dropped.")
    features = [name for name in table.columns if name != target and name not in ignored]
    check_missing(table, [*features, target])
    _check_decimals(table, features if task == "classification" else [target, *features])
    classes = _classes(table, target, task)
    columns, dropped = _columns(table, features)
    if not columns:
        raise errors.DataError(f"{table.path} has no column to predict {target!r} from that is not constant.")
    return Encoding(columns, target, classes, dropped, ignored, tuple(_notes(table, target, task, classes, dropped)))


def _columns(table: Table, features: Sequence[str]) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    columns, dropped = [], []
    for name in features:
        distinct = set(table.columns[name])
        if _is_numeric(table, name):
            constant = len(set(_numbers(table, name).tolist())) == 1
            column = Column(name)
        else:
            constant = len(distinct) == 1
            column = Column(name, tuple(sorted(distinct)))
        if constant:
            dropped.append(name)
            continue
        if len(column.levels) > MAX_CATEGORIES:
            raise errors.DataError(
                f"{table.path}: column {name!r} has {len(distinct)} distinct text values, more than the "
                f"{MAX_CATEGORIES} that are one-hot encoded. Group them, or leave the column out (--drop {name!r})."
            )
        columns.append(column)
    return tuple(columns), tuple(dropped)


def _notes(table: Table, target: str, task: str, classes: tuple[str, ...], dropped: tuple[str, ...]) -> Iterable[str]:
    if dropped:
        yield f"Left out, because constant: {', '.join(dropped)}."
    if task == "auto" and not classes:
        values = np.unique(_numbers(table, target))
        if len(values) <= min(_FEW_VALUES, len(table) // 2) and np.all(values == np.round(values)):
            yield (
                f"{target!r} has only {len(values)} distinct whole numbers and is fitted as a quantity; "
                "--task classification fits them as classes."
            )


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # float() would take 1_000
    except ValueError:
        return None


def _has_decimal_comma(cell: str) -> bool:
    return _number(cell) is None and _number(cell.replace(",", ".", 1)) is not None


def _check_decimals(table: Table, names: Iterable[str]) -> None:
    """Raise where most of what is no number in a column is one but for its decimal comma: it is no text."""
    for name in names:
        text = [i for i, cell in enumerate(table.columns[name]) if _number(cell) is None]
        commas = [i for i in text if _has_decimal_comma(table.columns[name][i])]
        if not _is_numeric(table, name) and 2 * len(commas) > len(text):
            cell, line = table.columns[name][commas[0]], table.lines[commas[0]]
            raise errors.DataError(
                f"{table.path}: column {name!r} line {line}: {cell!r} is not a finite number. Write decimals with a "
                f"point ({len(commas)} values of this column have a comma)."
            )


def _is_numeric(table: Table, name: str) -> bool:
    """Whether at least half of the cells are numbers; what else such a column holds is then an error."""
    cells = table.columns[name]
    return 2 * sum(_number(cell) is not None for cell in cells) >= len(cells)


def _numbers(table: Table, name: str) -> np.ndarray:
    """The column as float64, shape (n,)."""
    cells = table.columns[name]
    values = [_number(cell) for cell in cells]
    junk = [i for i, value in enumerate(values) if value is None or not math.isfinite(value)]
    if junk:
        cell = cells[junk[0]]
        others = f" (and {len(junk) - 1} more in this column)" if len(junk) > 1 else ""
        fix = "Infinite values cannot be fitted: correct" if values[junk[0]] is not None else "Correct"
        hint = " Write decimals with a point." if _has_decimal_comma(cell) else ""
        raise errors.DataError(
            f"{table.path}: column {name!r} line {table.lines[junk[0]]}: {cell!r} is not a finite number{others}. "
            f"{fix} it, or leave out such rows or the column.{hint}"
        )
    return np.array(values, np.float64)


def _classes(table: Table, target: str, task: str) -> tuple[str, ...]:
    """The class names in the order of their labels; empty where the target is a quantity."""
    numeric = _is_numeric(table, target)
    if task == "regression" or (task == "auto" and numeric):
        return ()
    values = set(_class_names(table.columns[target]))
    if len(values) == 1:
        raise errors.DataError(f"{table.path}: the target {target!r} has a single class, {values.pop()!r}. Give two.")
    if len(values) > MAX_CLASSES:
        raise errors.DataError(
            f"{table.path}: the target {target!r} has {len(values)} distinct classes, more than {MAX_CLASSES}. "
            "Group them, or fit numbers with --task regression."
        )

    def order(name: str) -> tuple[bool, float, str]:
        value = _number(name)
        return value is None, value or 0.0, name

    return tuple(sorted(values, key=order))


def _class_names(cells: Iterable[str]) -> list[str]:
    """Class names as text, with one spelling for each number (``1``, ``1.0`` and ``+1`` are one class)."""

    def name(cell: str) -> str:
        value = _number(cell)
        if value is None or not math.isfinite(value):
            return cell
        return str(int(value)) if value.is_integer() else repr(value)

    return [name(cell) for cell in cells]


def _labels(table: Table, target: str, classes: tuple[str, ...]) -> np.ndarray:
    return _positions(table, target, _class_names(table.columns[target]), classes, "class")


def _one_hot(table: Table, column: Column) -> np.ndarray:
    labels = _positions(table, column.name, table.columns[column.name], column.levels, "category")
    return np.eye(len(column.levels))[labels]


def _positions(table: Table, name: str, cells: Sequence[str], known: tuple[str, ...], noun: str) -> np.ndarray:
    index = {value: position for position, value in enumerate(known)}
    for line, cell in zip(table.lines, cells, strict=True):
        if cell not in index:
            raise errors.DataError(
                f"{table.path}: column {name!r} line {line}: the {noun} {cell!r} does not occur in the training "
                f"data{errors.nearest(cell, known)}. Leave out such rows, or add training rows with it."
            )
    return np.array([index[cell] for cell in cells], np.int32)
