"""Advances chains in compiled chunks: progress, interruption, checkpoints and stopping rules in one place.

Samplers carry their random key in their state, so that draws do not depend on
how a run is cut into chunks, interrupted or resumed.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from .. import checkpoint as checkpoints
from .._threads import side_by_side
from ..errors import ConvergenceWarning, TrainingError
from .base import RunControl

LONGEST = 256
VALUES_PER_CHUNK = 2**22
"""Most iterations of a compiled call, and most numbers in the positions of a chain that it returns."""

CHUNK = LONGEST
FIRST_CHUNK = 16
SECONDS_PER_CHUNK = 0.2
"""Iterations per call: as many as take about this long, from a few to begin with. Often enough for progress and
interruption, rarely enough to cost nothing, whatever an iteration takes."""

BETWEEN_CHECKS = 50
"""Draws after which quality is judged first, and least number between two judgements."""

SECONDS_BETWEEN_CHECKPOINTS = 1.0
"""Least time between two saves; in a long run it is ``SHARE_BETWEEN_CHECKPOINTS`` of the time so far."""

SHARE_BETWEEN_CHECKPOINTS = 0.01


class Group(Protocol):
    """Chains that advance together in one compiled program; where it ``waits`` no other group runs meanwhile."""

    state: Any
    waits: bool

    @property
    def longest(self) -> int:
        """Most iterations that one call can make."""
        ...

    def dispatch(self, num_steps: int, sampling: bool) -> Any:
        """Start ``num_steps <= longest`` iterations and return at once: (state, positions, reports), padded."""
        ...

    def is_healthy(self, state: Any) -> bool:
        """Whether every chain still has a finite density."""
        ...


@dataclasses.dataclass
class Chains:
    """A ``Group``: what advances it, its state, and the part of the state that is finite while it is healthy.

    ``advance(state, num_steps, sampling)`` is a compiled program, and ``size`` the length of a position.
    """

    advance: Callable[[Any, np.int32, bool], Any]
    state: Any
    density: Callable[[Any], Any]
    size: int
    waits: bool = False

    @property
    def longest(self) -> int:
        return longest_chunk(self.size)

    def dispatch(self, num_steps: int, sampling: bool) -> Any:
        return self.advance(self.state, np.int32(num_steps), sampling)

    def is_healthy(self, state: Any) -> bool:
        return bool(np.all(np.isfinite(np.asarray(self.density(state)))))


def longest_chunk(size: int) -> int:
    """Iterations that a compiled call can make of positions of this length."""
    return int(np.clip(VALUES_PER_CHUNK // max(1, size), 8, LONGEST))


def chains_by_program(num_chains: int) -> list[np.ndarray]:
    """The numbers of the chains that run in one program.

    All of them on an accelerator, as a batch. On a CPU each by itself: programs that are started together run on
    all cores, and one chain's draws cannot depend on its neighbours.
    """
    chains = np.arange(num_chains)
    return np.split(chains, num_chains) if jax.default_backend() == "cpu" else [chains]


def from_all_processes(arrays: Any) -> Any:
    """Arrays ``(chain, …)`` with the chains of all JAX processes, in the order of the processes."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental.multihost_utils import process_allgather

    counts = np.asarray(process_allgather(np.int32(len(jax.tree.leaves(arrays)[0])))).ravel()

    def gather(array: np.ndarray) -> np.ndarray:
        # Processes may differ in their numbers of chains, and what is gathered may not.
        padded = np.pad(array, [(0, counts.max() - len(array))] + [(0, 0)] * (array.ndim - 1))
        everything = np.asarray(process_allgather(padded))
        return np.concatenate([part[:count] for part, count in zip(everything, counts, strict=True)])

    return jax.tree.map(gather, arrays)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Draws ``(chain, draw, size)``, reports by name, and how the run ended."""

    draws: np.ndarray
    stats: dict[str, np.ndarray]
    ended_by: str


def advance(groups: Sequence[Group], num_warmup: int, num_samples: int, control: RunControl) -> Outcome:
    """Run all groups through warm-up and sampling.

    Ctrl-C during sampling ends the run with the draws made so far; during
    warm-up it is raised, since nothing usable exists yet.
    """
    run = _Run(groups, num_warmup, num_samples, control)
    run.restore()
    ended_by = "interrupt"
    try:
        ended_by = run.loop()
    except KeyboardInterrupt:
        if run.counters["sampling"] == 0:
            raise
        warnings.warn(
            f"interrupted: {run.counters['sampling']} of {num_samples} draws per chain are kept.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return run.outcome(ended_by)


class _Run:
    """The state of one run between chunks."""

    def __init__(self, groups: Sequence[Group], num_warmup: int, num_samples: int, control: RunControl):
        self.groups, self.control = groups, control
        self.totals = {"warm-up": num_warmup, "sampling": num_samples}
        # Kept with a checkpoint, so that a resumed run stops where an uninterrupted one does.
        self.counters = {"warm-up": 0, "sampling": 0, "next check": min(CHUNK, BETWEEN_CHECKS), "milliseconds": 0}
        self.kept: list[dict[str, np.ndarray]] = []
        self.unsaved: list[dict[str, np.ndarray]] = []
        self.started = self.saved = time.perf_counter()
        self.unsaved_work = False
        self.size = FIRST_CHUNK

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        snapshot = None if self.control.checkpoint is None else self.control.checkpoint.load()
        if snapshot is None:
            return
        leaves, taken = snapshot.state, 0
        for group in self.groups:
            size = len(jax.tree.leaves(group.state))
            group.state = checkpoints.restore_leaves(group.state, leaves[taken : taken + size])
            taken += size
        self.counters |= snapshot.counters
        self.started -= self.counters["milliseconds"] / 1000
        if snapshot.draws:
            self.kept = [snapshot.draws]

    def loop(self) -> str:
        """Chunks until the end or a stopping rule; why it ended."""
        reason = None
        for stage, total in self.totals.items():
            reason = self._stopping_reason() if stage == "sampling" else None
            while reason is None and self.counters[stage] < total:
                self._chunk(stage, min(self._next_size(stage), total - self.counters[stage]))
                self._save(force=False)
                if self.control.on_progress is not None:
                    self.control.on_progress(stage, self.counters[stage], total)
                if self.control.interrupted is not None and self.control.interrupted():
                    raise KeyboardInterrupt
                reason = self._stopping_reason() if stage == "sampling" else None
            self._check_health(stage)
        self._save(force=True)
        return reason or "num_samples"

    def _next_size(self, stage: str) -> int:
        """Iterations of the next call; none passes a judgement, whose time must not depend on the machine's speed."""
        size = min(self.size, CHUNK, *(group.longest for group in self.groups))
        if stage == "sampling" and self.control.is_enough is not None:
            size = min(size, max(1, self.counters["next check"] - self.counters[stage]))
        return size

    def _chunk(self, stage: str, size: int) -> None:
        sampling, started = stage == "sampling", time.perf_counter()
        pending = self._advanced(size, sampling)
        wanted = size * SECONDS_PER_CHUNK / max(time.perf_counter() - started, 1e-6)
        # A first trajectory may be far shorter than those that follow, so sizes grow slowly.
        self.size = int(np.clip(wanted, max(1, size // 4), max(self.size, 2 * size)))
        if sampling:
            parts = [{"position": np.asarray(x)[:, :size], **_cut(reports, size)} for _, x, reports in pending]
            chunk = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            self.kept.append(chunk)
            self.unsaved.append(chunk)
        for group, (state, _, _) in zip(self.groups, pending, strict=True):
            group.state = state
        self.counters[stage] += size
        self.unsaved_work = True

    def _advanced(self, size: int, sampling: bool) -> list[Any]:
        """What every group's next iterations give, on all devices and cores."""

        def advance(group: Group) -> Any:
            return jax.block_until_ready(group.dispatch(size, sampling))

        if any(group.waits for group in self.groups):
            return [advance(group) for group in self.groups]
        if jax.default_backend() != "cpu":
            return jax.block_until_ready([group.dispatch(size, sampling) for group in self.groups])
        # A CPU may run a whole program within the call that starts it, so each call has a thread of its own.
        return side_by_side(advance, ((group,) for group in self.groups), compiled=True)

    def _save(self, *, force: bool) -> None:
        if self.control.checkpoint is None or not self.unsaved_work:
            return
        now = time.perf_counter()
        pause = max(SECONDS_BETWEEN_CHECKPOINTS, SHARE_BETWEEN_CHECKPOINTS * (now - self.started))
        if not force and now - self.saved < pause:
            return
        self.counters["milliseconds"] = int(1000 * (now - self.started))
        new = {name: np.concatenate([c[name] for c in self.unsaved], axis=1) for name in self.unsaved[0]} if (
            self.unsaved
        ) else {}  # fmt: skip
        self.control.checkpoint.save(self.counters, [group.state for group in self.groups], new)
        self.unsaved, self.saved, self.unsaved_work = [], time.perf_counter(), False

    def _stopping_reason(self) -> str | None:
        """``"seconds"`` or ``"until"`` when its rule is met; quality is judged ever more rarely as draws grow."""
        done = self.counters["sampling"]
        if done == 0:
            return None
        if self.control.seconds is not None and time.perf_counter() - self.started >= self.control.seconds:
            return "seconds"
        if self.control.is_enough is not None and done >= self.counters["next check"]:
            if self.control.is_enough(self._joined("position")):
                return "until"
            self.counters["next check"] = int(done * 1.2) + min(CHUNK, BETWEEN_CHECKS)
        return None

    def _check_health(self, stage: str) -> None:
        if not all(group.is_healthy(group.state) for group in self.groups):
            raise TrainingError(
                f"the log density is not finite after {stage}. Likely causes: weights or inputs of extreme size, "
                "a noise prior that reaches zero with a network that fits every row exactly, or, for engine='sgmcmc', "
                "steps that are too large (give SGMCMC a smaller step_size, 1e-3 for instance)."
            )

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([chunk[name] for chunk in self.kept], axis=1)

    def outcome(self, ended_by: str) -> Outcome:
        wanted = self.totals["sampling"]  # a checkpoint may hold more
        joined = {name: self._joined(name)[:, :wanted] for name in self.kept[0]}
        return Outcome(joined.pop("position"), joined, ended_by)


def _cut(reports: dict[str, Any], size: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(values)[:, :size] for name, values in reports.items()}


def map_chains(fn: Callable[..., Any], chains: Any) -> Any:
    """``fn`` of every chain, in one program on one device.

    On a CPU one chain follows another: batching would round sums in another order, so that a chain's draws
    depended on its neighbours, and would make every chain wait for the longest trajectory. Accelerators run
    chains as a batch. A single chain always runs plain.
    """
    if jax.tree.leaves(chains)[0].shape[0] == 1:
        return jax.tree.map(lambda leaf: leaf[None], fn(jax.tree.map(lambda leaf: leaf[0], chains)))
    return jax.lax.map(fn, chains) if jax.default_backend() == "cpu" else jax.vmap(fn)(chains)
