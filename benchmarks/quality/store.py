"""Records of finished tasks: one line of JSON each, appended as it ends, so that a run can be taken up again."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.table import Record, Task


def append(path: Path, record: Record) -> None:
    """Add one record; a crash during the write leaves at most a last line that ``read`` passes over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record) + "\n"
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        line = "\n" + line
    with path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """All whole records in the order written; none if there is no file."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # cut off by a crash
            continue
    return records


def key(record: Record) -> tuple:
    return record["dataset"], record["split"], record["method"], record["digest"]


def latest(records: Iterable[Record], tasks: Sequence[Task]) -> tuple[list[Record], list[Record]]:
    """The newest record of each task that has one, in the order of the tasks: the finished and the failed."""
    by_key = {key(record): record for record in records}
    found = [by_key[k] for k in dict.fromkeys(task.key for task in tasks) if k in by_key]
    return [r for r in found if "error" not in r], [r for r in found if "error" in r]
