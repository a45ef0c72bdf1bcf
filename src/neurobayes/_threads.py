"""Work on all cores where compiled programs keep only one busy."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

MAX_THREADS = 8


def beside(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start ``function()`` in a thread of its own where a core is free for it; call what is returned for its result.

    Elsewhere, on one core or an accelerator, it only runs when asked for.
    """
    if _num_workers() == 1:
        return function
    with_precision = _in_precision_of_caller(function)
    pool = ThreadPoolExecutor(1)
    future = pool.submit(with_precision)
    pool.shutdown(wait=False)
    return future.result


def _num_workers() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


def _in_precision_of_caller(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for another thread, which contexts of the calling one do not reach."""
    double = bool(jax.config.read("jax_enable_x64"))

    def run(*arguments: Any) -> Any:
        # Entered only where it changes something: within the context programs are cached apart.
        with jax.enable_x64(True) if double else contextlib.nullcontext():
            return function(*arguments)

    return run


def side_by_side(function: Callable[..., Any], items: Iterable[tuple], *, compiled: bool = False) -> list[Any]:
    """``function(*item)`` of each item, in order; on a CPU with one thread for each core.

    The first item runs alone, so that what all share is compiled once, unless it is ``compiled`` already. Items are
    taken from the iterable only shortly before they run.
    """
    waiting = iter(items)
    results = [function(*item) for item in itertools.islice(waiting, 0 if compiled else 1)]
    only = list(itertools.islice(waiting, 2))
    if len(only) < 2:  # a pool of threads costs as much as a short program
        return results + [function(*item) for item in only]
    waiting = itertools.chain(only, waiting)
    workers = _num_workers()
    if workers == 1:
        return results + [function(*item) for item in waiting]
    run = _in_precision_of_caller(function)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future] = deque()
        for item in waiting:
            if len(pending) > workers:
                results.append(pending.popleft().result())
            pending.append(pool.submit(run, *item))
        return results + [future.result() for future in pending]
