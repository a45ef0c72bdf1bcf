"""Quality of the predictions, next to published numbers: run the named tables and write JSON and Markdown.

Finished (data set, split, method) triples are kept and skipped in the next call; a change of the configuration
makes them count as unfinished.
"""

import argparse
import ast
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import _common
from benchmarks._common import Result
from benchmarks.quality import configuration, registry, runner, store
from benchmarks.quality.table import Record, Settings, Table, Task

DEFAULT_DATA = _common.ROOT.parent / "shared" / "data"
DEFAULT_OUT = _common.ROOT / "benchmarks" / "results" / "quality"
SHOWN = ("rmse", "nll", "accuracy", "ece", "coverage", "first_nll", "mean_nll", "final_rmse", "step_seconds")


def main() -> int:
    known = registry.tables()
    options = _options(known)
    settings = Settings(
        options.data.resolve(), options.full, options.splits, dict(_change(text) for text in options.option)
    )
    chosen = [known[name] for name in options.tables or known]
    if any(table.needs_data for table in chosen) and not settings.data.is_dir():
        print(f"there is no data folder {settings.data}; say where the data sets are: --data DIR", file=sys.stderr)
        return 2
    if not settings.reference.is_dir():
        print(f"there is no {settings.reference}: published numbers are left out", file=sys.stderr)
    failed = 0
    for table in chosen:
        try:
            if not options.report_only:
                _run(table, settings, options)
        except KeyboardInterrupt:
            print(f"{table.name}: stopped; the same command goes on from here", file=sys.stderr)
            return 130
        failed += _write_report(table, settings, options)
    return 1 if failed else 0


def _options(known: Mapping[str, Table]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(known)}; default all")
    parser.add_argument("--full", action="store_true", help="all splits, seeds and steps; hours")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default 1)")
    parser.add_argument("--splits", type=int, metavar="N", help="the first N splits or seeds of each data set")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these data sets")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods (or rows of the ablation)")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, metavar="DIR", help="folder of the data sets")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default benchmarks/results/quality)")
    parser.add_argument("--fresh", action="store_true", help="run finished tasks again")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the reports again")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="change the one configuration for a trial, such as num_backbones=4; needs --out",
    )  # fmt: skip
    options = parser.parse_args()
    unknown = [name for name in options.tables if name not in known]
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(known)}")
    if options.option and options.out is None:
        parser.error("--option also needs --out DIR, so that the results of the default configuration stay as they are")
    for name in ("jobs", "threads", "splits"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: give at least 1")
    options.out = options.out or DEFAULT_OUT
    return options


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _records_path(out: Path, table: Table) -> Path:
    return out / "records" / f"{table.name}.jsonl"


def _run(table: Table, settings: Settings, options: argparse.Namespace) -> None:
    path = _records_path(options.out, table)
    tasks = [
        task
        for task in table.tasks(settings)
        if task.dataset in (options.datasets or [task.dataset]) and task.method in (options.methods or [task.method])
    ]
    if not tasks:
        raise SystemExit(f"{table.name}: no such data set or method among {_names(table.tasks(settings))}")
    finished = set() if options.fresh else {store.key(record) for record in store.latest(store.read(path), tasks)[0]}
    waiting = [task for task in tasks if task.key not in finished]
    print(f"{table.name}: {len(tasks)} tasks, {len(tasks) - len(waiting)} done before", flush=True)
    if not waiting:
        return
    source, started, done = configuration.source_digest(_common.ROOT / "src" / "neurobayes"), time.perf_counter(), 0

    def on_done(task: Task, answer: dict[str, Any], seconds: float) -> None:
        nonlocal done
        done += 1
        where = {"jobs": options.jobs, "threads": options.threads, "load": _common.environment()["load_average"]}
        store.append(path, {**task.to_dict(), "digest": task.digest, **answer, "source": source, "where": where})
        elapsed = time.perf_counter() - started
        left = elapsed / done * (len(waiting) - done)
        label = f"[{done}/{len(waiting)}] {table.name}: {task.dataset}, split {task.split}, {task.method}"
        print(f"{label}: {_brief(answer)}; {seconds:.1f} s, about {left:.0f} s left", flush=True)

    runner.run(waiting, options.jobs, options.threads, settings.data, on_done)


def _names(tasks: list[Task]) -> str:
    return ", ".join(dict.fromkeys([task.dataset for task in tasks] + [task.method for task in tasks]))


def _brief(answer: Mapping[str, Any]) -> str:
    if "error" in answer:
        return f"FAILED, {answer['error']}"
    found = answer["metrics"]
    return ", ".join(f"{name} {found[name]:.3g}" for name in SHOWN if name in found)


def _write_report(table: Table, settings: Settings, options: argparse.Namespace) -> int:
    """Writes the table's files from all its records, of either mode; the number of tasks that failed."""
    everything = [
        *table.tasks(Settings(settings.data, True, None, settings.changes)),
        *table.tasks(Settings(settings.data, False, None, settings.changes)),
    ]
    records, failures = store.latest(store.read(_records_path(options.out, table)), everything)
    if not records and not failures:
        print(f"{table.name}: nothing has been run yet", flush=True)
        return 0
    found = table.report(records, settings)
    result = Result(table.name, found.checks, {})
    text = "\n\n".join(
        [
            f"# {table.title}",
            _state(records),
            found.markdown,
            *(["## Targets", _common.table([result])] if found.checks else []),
            *(["## Failed", "\n".join(_failure(record) for record in failures)] if failures else []),
        ]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{table.name}.md").write_text(text + "\n")
    if found.figure is not None:
        found.figure(options.out / f"{table.name}.png")
    content = {
        "table": table.name,
        "our_model": settings.our_model,
        "baselines": configuration.BASELINES,
        "environment": _common.environment(),
        "rows": found.rows,
        "checks": [check.to_dict() for check in found.checks],
        "failures": [_failure(record) for record in failures],
    }
    (options.out / f"{table.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{text}\n\nwritten to {options.out / table.name}.md and .json\n", flush=True)
    return len(failures)


def _state(records: list[Record]) -> str:
    """What the numbers were measured with, and whether they belong to the source as it is now."""
    sources = sorted({record["source"] for record in records if record["options"].get("method") == "ours"})
    now = configuration.source_digest(_common.ROOT / "src" / "neurobayes")
    text = f"{len(records)} results"
    text += f", ours with the library's source at {', '.join(sources)}." if sources else "."
    if sources not in ([], [now]):
        text += f" The source has changed since (now {now}): `--methods ours --fresh` runs ours again."
    return text


def _failure(record: Record) -> str:
    return f"- {record['dataset']}, split {record['split']}, {record['method']}: {record['error']}"


if __name__ == "__main__":
    sys.exit(main())
