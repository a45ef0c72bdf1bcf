"""Step sizes and averaging as arrays, so that a change of schedule recompiles nothing."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from . import _checks
from .errors import OptionError, nearest

LearningRate = float | Callable[[Any], Any]
"""A constant step size, or an optax schedule: step number -> step size."""

DEFAULT_PEAK = 0.01
DEFAULT_FLOOR = 0.05


@dataclasses.dataclass(frozen=True)
class AveragingConfig:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407).

    Parameters
    ----------
    schedule : step sizes while averaging: ``"constant"`` (at ``swa_lr``), ``"linear"`` (falls from the base rate
        to ``swa_lr`` over the first half of the averaging stage, then stays), or ``"cyclic"`` (falls from the base
        rate to ``swa_lr`` in every cycle; weights are averaged at the end of each).
    start_pct : share of the epochs after which averaging starts, in [0, 1).
    swa_lr : lowest step size; half the base rate by default.
    cycle_length : epochs in a cycle, ``"cyclic"`` only; a fifth of the averaging stage by default.
    collect_freq : epochs between averaged weights, for ``"constant"`` and ``"linear"``.
    """

    schedule: str = "constant"
    start_pct: float = 0.75
    swa_lr: float | None = None
    cycle_length: int | None = None
    collect_freq: int = 1

    def __post_init__(self) -> None:
        _checks.check_one_of("swa_config['schedule']", self.schedule, ("constant", "linear", "cyclic"))
        _checks.check_fraction("swa_config['start_pct']", self.start_pct, allow_zero=True)
        _checks.check_positive_int("swa_config['collect_freq']", self.collect_freq)
        if self.swa_lr is not None:
            _checks.check_positive("swa_config['swa_lr']", self.swa_lr)
        if self.cycle_length is not None:
            _checks.check_positive_int("swa_config['cycle_length']", self.cycle_length)

    @classmethod
    def from_user(cls, config: "Mapping[str, Any] | AveragingConfig | None") -> "AveragingConfig | None":
        """The config for a user's mapping; unknown entries raise."""
        if config is None or isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            raise OptionError(f"swa_config must be a dict such as {{'schedule': 'constant'}}, got {config!r}.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in config:
            if name not in known:
                raise OptionError(
                    f"swa_config has no entry {name!r}{nearest(str(name), known)}. It takes: {', '.join(known)}."
                )
        return cls(**config)

    def apply(self, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Step sizes and collection flags for the whole run; at least the last epoch is collected."""
        num_epochs = len(rates)
        start = min(math.ceil(self.start_pct * num_epochs), num_epochs - 1)
        stage = num_epochs - start
        rates, collect = rates.copy(), np.zeros(num_epochs, np.float32)
        base = rates[start:].copy()
        low = np.full_like(base, 0.5) * base if self.swa_lr is None else np.full_like(base, self.swa_lr)
        position = np.arange(stage)
        if self.schedule == "constant":
            rates[start:] = low
        elif self.schedule == "linear":
            share = np.minimum(position / max(1, stage // 2), 1.0)[:, None]
            rates[start:] = (1 - share) * base + share * low
        else:
            cycle = min(self.cycle_length or max(1, stage // 5), stage)
            share = ((position % cycle) / max(1, cycle - 1))[:, None]
            rates[start:] = (1 - share) * base + share * low
            collect[start + cycle - 1 :: cycle] = 1.0
            return rates, collect
        collect[start :: self.collect_freq] = 1.0
        return rates, collect


def learning_rates(rate: LearningRate | None, num_epochs: int, steps_per_epoch: int) -> np.ndarray:
    """Step sizes, shape ``(num_epochs, steps_per_epoch)``.

    None is the library's default: a cosine from 0.01 down to a twentieth of it.
    A schedule is read once for every step.
    """
    total = num_epochs * steps_per_epoch
    if rate is None:
        share = np.arange(total) / total
        values = DEFAULT_PEAK * (DEFAULT_FLOOR + (1 - DEFAULT_FLOOR) * 0.5 * (1 + np.cos(np.pi * share)))
    elif callable(rate):
        values = np.broadcast_to(_read_schedule(rate, total), (total,))
        if not np.all(np.isfinite(values)):
            raise OptionError("the learning-rate schedule gives a value that is not finite.")
    else:
        values = np.full(total, _checks.check_positive("learning_rate", rate))
    return np.asarray(values, np.float32).reshape(num_epochs, steps_per_epoch)


def _read_schedule(rate: Callable[[Any], Any], num_steps: int) -> np.ndarray:
    lowered = jax.jit(jax.vmap(rate)).lower(np.arange(num_steps))
    return _run(_Lowered(lowered.as_text(), num_steps, lowered))


@dataclasses.dataclass(frozen=True)
class _Lowered:
    """A schedule before compilation, equal to every other of the same text, which holds all its constants.

    The schedule itself does not tell: each call of optax makes another function, and one that stays the same may read
    what has changed since.
    """

    text: str
    num_steps: int
    program: Any = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=64)
def _run(lowered: _Lowered) -> np.ndarray:
    return np.asarray(lowered.program.compile()(np.arange(lowered.num_steps)))
