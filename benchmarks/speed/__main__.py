"""The one command: run the named cases (all of them by default), print the table, write the JSON."""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import _common
from benchmarks._common import Result

GROUPS = ("training", "convolutions", "memory", "hoisting", "engines", "together")
DEFAULT_OUT = _common.ROOT / "benchmarks" / "results" / "speed.json"


def cases() -> dict[str, Callable[[int], Result]]:
    """Every case by name: a function of the number of repeats."""
    found: dict[str, Callable[[int], Result]] = {}
    for group in GROUPS:
        found |= importlib.import_module(f"benchmarks.speed.{group}").CASES
    return found


def main() -> int:
    known = cases()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases to run: {', '.join(known)}; default all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per timing; medians are reported (default 5)")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="FILE", help="JSON to write or bring up to date"
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    where = _common.environment()
    print(f"{where['cores']} cores, Python {where['python']}, {where['versions']}", flush=True)
    results = []
    for name in options.names or known:
        started = time.perf_counter()
        results.append(known[name](options.repeats))
        _common.write_json(options.out, results[-1:])
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(_common.table(results))
    print(f"\nwritten to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
