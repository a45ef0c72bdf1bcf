"""A process that runs tasks it reads, one line of JSON each, and answers with one marked line each.

    python -m benchmarks.quality.worker CORE|- DATA

Given a core it stays on it, whatever number of threads XLA, the BLAS or the library would like.
"""

import json
import os
import sys
import traceback
from pathlib import Path

MARK = "benchmark-answer:"


def main() -> None:
    core, folder = sys.argv[1], Path(sys.argv[2])
    if core != "-" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(core) % len(cores)]})
    from benchmarks.quality import registry
    from benchmarks.quality.table import Task

    known = registry.tables()
    for line in sys.stdin:
        task = Task(**json.loads(line))
        try:
            answer = {"metrics": known[task.table].run(task, folder)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-3000:]}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
