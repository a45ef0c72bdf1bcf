"""Work on all cores where compiled programs keep only one busy."""

import contextlib
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import jax

MAX_THREADS = 8
SECONDS_ASLEEP = 0.2
"""How long a thread that waits for others may not see a signal."""

filters_of_warnings = threading.RLock()
"""Held by what may change the filters of warnings for a while, as ``warnings.catch_warnings`` does: they are the
process's, and two threads that do would leave them changed."""


def beside(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start ``function()`` in a thread of its own where a core is free for it; call what is returned for its result.

    Elsewhere, on one core or an accelerator, it only runs when asked for.
    """
    if num_workers() == 1:
        return function
    with_precision = _in_precision_of_caller(function)
    pool = ThreadPoolExecutor(1)
    future = pool.submit(with_precision)
    pool.shutdown(wait=False)
    return future.result


def num_workers() -> int:
    """Cores that programs can be given to one by one; one on an accelerator, which a program has to itself."""
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
    workers = num_workers()
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


def follow(
    first: Callable[[Callable[[], None]], Any],
    others: Sequence[Callable[[], Any]],
    interrupt: Callable[[], None],
    abandon: Callable[[], None],
) -> list[Any]:
    """Results of ``first(go)`` and of ``others``, which start when it calls ``go()`` or ends, a thread for each core.

    Ctrl-C meanwhile only calls ``interrupt()``, which should make what runs end soon, with a result or without. With an
    error of one, no other is started any more, and ``abandon()`` should end those that run.
    """
    waiting, started = [_in_precision_of_caller(other) for other in others], []
    with ThreadPoolExecutor(num_workers()) as pool, _on_ctrl_c(interrupt):

        def go() -> None:
            if not started:
                started.extend(pool.submit(other) for other in waiting)

        leader = pool.submit(_in_precision_of_caller(first), go)
        try:
            _wait_awake([leader], started)
            go()
            _wait_awake(started, started)
            return [future.result() for future in (leader, *started)]
        except BaseException:
            for future in started:
                future.cancel()
            abandon()
            raise


def _wait_awake(awaited: Sequence[Future], others: Sequence[Future]) -> None:
    """Wait for what is ``awaited``; an error of that or of ``others``, which may grow meanwhile, is raised at once.

    A signal that the system gives to another thread is seen meanwhile.
    """
    while pending := [future for future in awaited if not future.done()]:
        wait([*pending, *others], timeout=SECONDS_ASLEEP, return_when=FIRST_EXCEPTION)
        for future in (*awaited, *others):
            if future.done():
                future.result()


@contextlib.contextmanager
def _on_ctrl_c(function: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``function`` and raises nothing, in the main thread, unless a program has its own way with it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: function())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
