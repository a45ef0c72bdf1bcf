"""Runs tasks in separate processes, side by side, and hands over each answer as it comes."""

import collections
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import ROOT
from benchmarks.quality.table import Task
from benchmarks.quality.worker import MARK

# XLA takes the size of its thread pool from NPROC; XLA_FLAGS no longer limit it (checked with jaxlib 0.10).
THREAD_VARIABLES = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

OnDone = Callable[[Task, dict[str, Any], float], None]


class Worker:
    """One process, started anew when it dies; with one thread it is kept on one core."""

    def __init__(self, number: int, threads: int, folder: Path):
        self.core = str(number) if threads == 1 else "-"
        self.threads = threads
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() closes it

    def run(self, task: Task) -> dict[str, Any]:
        """The worker's answer, or an ``error`` if the process ended instead."""
        if self.process is None:
            self.process = self._start()
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(task.to_dict()) + "\n")
            stdin.flush()
            for line in stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        except BrokenPipeError:
            pass
        status = self.process.wait()
        self._end()
        self.messages.seek(0)
        return {"error": f"the process ended with status {status}", "traceback": self.messages.read()[-3000:]}

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            **dict.fromkeys(THREAD_VARIABLES, str(self.threads)),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        self.messages.seek(0)
        self.messages.truncate()
        command = [sys.executable, "-m", "benchmarks.quality.worker", self.core, str(self.folder)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip

    def kill(self) -> None:
        """End the process; a ``run`` under way then answers with an error."""
        if (process := self.process) is not None:
            process.kill()

    def close(self) -> None:
        self._end()
        self.messages.close()

    def _end(self) -> None:
        """Nothing is left of the process, its pipes included."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.__exit__(None, None, None)
            self.process = None


def run(tasks: Sequence[Task], jobs: int, threads: int, folder: Path, on_done: OnDone) -> None:
    """Run all tasks; ``on_done`` is called for one at a time, in the order they end."""
    waiting, lock = collections.deque(tasks), threading.Lock()
    workers = [Worker(i, threads, folder) for i in range(min(jobs, len(tasks)))]
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        while not failures:
            with lock:
                if not waiting:
                    return
                task = waiting.popleft()
            started = time.perf_counter()
            answer = worker.run(task)
            with lock:
                if failures:
                    return
                try:
                    on_done(task, answer, time.perf_counter() - started)
                except BaseException as error:
                    failures.append(error)

    loops = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for loop in loops:
        loop.start()
    try:
        _join(loops)
    except KeyboardInterrupt as stop:
        failures.append(stop)
    for worker in workers:
        worker.kill()
    _join(loops)
    for worker in workers:
        worker.close()
    if failures:
        raise failures[0]


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
