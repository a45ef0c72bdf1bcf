"""CSV files as columns of text, with the line of each row for the messages of whoever reads the cells."""

import csv
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from . import errors

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null"})
"""Cells that count as missing, whatever their case; ``None`` and the errors of spreadsheets do, too."""

_DELIMITERS = (",", ";", "\t")
_SPREADSHEET_ERROR = re.compile(r"#N/A|#[A-Z0-9/]+[!?]")  # Excel's, such as #DIV/0! and #NAME?
_SHOWN = 3  # how many faulty cells a message lists


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The cells of a CSV file as text.

    Attributes
    ----------
    path : the file, for messages.
    columns : name -> cells, stripped of surrounding blanks, in the order of the file.
    lines : the 1-based line of the file on which each row starts.
    """

    path: str
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        """Number of rows of data."""
        return len(self.lines)

    def take(self, rows: Iterable[int]) -> "Table":
        """The rows at these positions, in this order."""
        rows = list(rows)
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return Table(self.path, columns, [self.lines[row] for row in rows])


def read(path: str | os.PathLike[str]) -> Table:
    """The CSV file at ``path``: a header row, then one row of data per record.

    The delimiter (comma, semicolon or tab) is found from the first rows. A
    byte-order mark, Windows line ends, quoted fields and empty lines are fine.

    Raises
    ------
    DataError
        If the file cannot be read as UTF-8 text, is empty or has no data rows,
        if a column has no name or the name of another one, or if a row has
        more or fewer fields than the header.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file)
            file.seek(0)
            records = _records(file, delimiter)
    except FileNotFoundError:
        raise errors.DataError(f"There is no file {path!r}. Check the path.") from None
    except UnicodeDecodeError:
        raise errors.DataError(f"{path} is not UTF-8 text. Save it as 'CSV UTF-8'.") from None
    except OSError as error:
        raise errors.DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except csv.Error as error:
        raise errors.DataError(f"{path} cannot be read as CSV: {error}. Look for an unclosed quote.") from None
    if not records:
        raise errors.DataError(f"{path} is empty. A header row and at least one row of data are needed.")
    (_, header), *rows = records
    header = _checked_header(path, header)
    if not rows:
        raise errors.DataError(f"{path} has a header but no rows of data.")
    for line, record in rows:
        if len(record) != len(header):
            raise errors.DataError(
                f"{path} line {line} has {len(record)} fields but the header has {len(header)}. "
                "Quote fields that contain the delimiter."
            )
    columns = {name: [record[i].strip() for _, record in rows] for i, name in enumerate(header)}
    return Table(path, columns, [line for line, _ in rows])


def _records(file, delimiter: str) -> list[tuple[int, list[str]]]:
    """(1-based first line, fields) of each record that is not an empty line."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    records, line = [], 1
    for record in reader:
        if record:
            records.append((line, record))
        line = reader.line_num + 1  # a quoted field may hold line breaks
    return records


def _delimiter(file) -> str:
    """The delimiter that cuts the first rows into equally many fields, or else the header into most."""
    head = list(itertools.islice(file, 50))

    def score(delimiter: str) -> tuple[bool, int]:
        try:
            widths = [len(record) for record in csv.reader(head, delimiter=delimiter) if record]
        except csv.Error:
            return False, 0
        return bool(widths) and widths[0] > 1 and len(set(widths)) == 1, widths[0] if widths else 0

    return max(_DELIMITERS, key=score)  # the first of equals: comma before the others


def _checked_header(path: str, header: Sequence[str]) -> list[str]:
    names = [name.strip() for name in header]
    for position, name in enumerate(names, start=1):
        if not name:
            raise errors.DataError(
                f"{path}: column {position} has no name in the header. Name it or remove it "
                "(row numbers written by pandas are left out with to_csv(index=False))."
            )
        if names.index(name) != position - 1:
            first = names.index(name) + 1
            raise errors.DataError(f"{path}: columns {first} and {position} are both named {name!r}. Rename one.")
    return names


def labels(table: Table, name: str) -> np.ndarray:
    """The cells of a column as text, ``(n,)``: what groups of rows are called.

    Raises
    ------
    DataError
        If there is no such column, or a cell is missing.
    """
    check_exists(table, name)
    check_missing(table, [name])
    return np.array(table.columns[name], str)


def check_exists(table: Table, name: str) -> None:
    """Raise ``DataError`` unless the table has a column of this name."""
    if name not in table.columns:
        known = list(table.columns)
        listing = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        raise errors.DataError(
            f"{table.path} has no column {name!r}{errors.nearest(name, known)}. Its columns: {listing}."
        )


def check_missing(table: Table, names: Sequence[str]) -> None:
    """Raise ``DataError`` if a cell of these columns is missing; the first ones are named."""
    cells = [
        (line, name)
        for name in names
        for line, cell in zip(table.lines, table.columns[name], strict=True)
        if _is_missing(cell)
    ]
    if cells:
        shown = ", ".join(f"column {name!r} line {line}" for line, name in sorted(cells)[:_SHOWN])
        more = ", …" if len(cells) > _SHOWN else ""
        raise errors.DataError(
            f"{table.path} has {len(cells)} missing value{'s' if len(cells) > 1 else ''}: {shown}{more}. "
            "Fill them in, or leave out these rows or columns."
        )


def _is_missing(cell: str) -> bool:
    return cell.lower() in MISSING or cell == "None" or _SPREADSHEET_ERROR.fullmatch(cell) is not None
