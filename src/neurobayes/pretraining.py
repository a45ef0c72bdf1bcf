"""The deterministic stage of a fit: choose the regularisation where asked, then train on all rows."""

import dataclasses
from collections.abc import Callable

import numpy as np

from . import regularisation, schedules, training
from ._keys import children
from ._threads import beside
from ._typing import Key, Params, State
from .likelihoods import Likelihood
from .networks.base import Network
from .regularisation import Regularisation
from .weight_statistics import TrainingStatistics

FULL_BATCH_ROWS = 256
"""Up to this many rows every step takes all of them; above, steps take ``BATCH_ROWS``."""

BATCH_ROWS = 128
DEFAULT_EPOCHS = 500
DEFAULT_STEPS = 20_000


@dataclasses.dataclass(frozen=True)
class PretrainingOptions:
    """How to train the network before its Bayesian part is sampled.

    Attributes
    ----------
    epochs : number of epochs, or the most that are considered where the data choose; None for the default.
    learning_rate : step size, optax schedule, or None for the default cosine.
    batch_size : rows per step; None for the default by the number of rows.
    averaging : weight averaging, or None.
    sigma : prior standard deviation of every weight, ``"auto"`` to choose it from the data, None for no prior.
    track_statistics : keep per-weight statistics, which automatic selection needs.
    burn_in : share of the epochs before these are gathered.
    """

    epochs: int | None = None
    learning_rate: schedules.LearningRate | None = None
    batch_size: int | None = None
    averaging: schedules.AveragingConfig | None = None
    sigma: float | str | None = "auto"
    track_statistics: bool = False
    burn_in: float = 0.5


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained network and what was chosen for it."""

    params: Params = dataclasses.field(repr=False)
    state: State = dataclasses.field(repr=False)
    history: dict[str, np.ndarray] = dataclasses.field(repr=False)
    statistics: TrainingStatistics | None = dataclasses.field(repr=False)
    sigma: float | None
    num_epochs: int
    search: Regularisation | None


def default_batch_size(num_rows: int, batch_size: int | None) -> int | None:
    """The rows per step, None for all of them."""
    if batch_size is None:
        return None if num_rows <= FULL_BATCH_ROWS else BATCH_ROWS
    return None if batch_size >= num_rows else batch_size


def default_epochs(steps_per_epoch: int, most: int = DEFAULT_EPOCHS) -> int:
    """Epochs of a run whose length is not given: ``most``, fewer where an epoch has many steps."""
    return int(min(most, max(50, DEFAULT_STEPS // steps_per_epoch)))


def pretrain(
    network: Network,
    likelihood: Likelihood,
    key: Key,
    rows: training.Rows,
    noise_std: np.ndarray,
    options: PretrainingOptions,
    *,
    seed: int,
    groups: np.ndarray | None = None,
    most_epochs: int = DEFAULT_EPOCHS,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Pretrained:
    """Train on all rows with the prior scale and length that unseen rows favour, or those that are given.

    With ``sigma="auto"`` both are chosen; with a given ``sigma`` and no
    ``epochs``, the length is; with both given, nothing is searched. Averaging
    needs the whole run, so it leaves the length as it is. ``most_epochs``
    bounds a length that is not given, and rows of the same number in
    ``groups`` are left out together.
    """
    num_rows = int(np.asarray(rows.real).sum())
    key, key_search = children(key, 2)
    program, rates = plan_training(network, likelihood, num_rows, options, most_epochs)
    sigma, search = options.sigma, None
    if sigma == "auto" or options.epochs is None:
        program, sigma, search = _search(program, key, key_search, rows, noise_std, options, rates, seed, groups)
        if options.averaging is None:
            rates = rates[: search.num_epochs]
    collect = None
    if options.averaging is not None:
        rates, collect = options.averaging.apply(rates)
    settings = training.Settings(
        row_weights=np.asarray(rows.real, np.float32),
        prior_precision=precision(sigma),
        noise_std=np.asarray(noise_std, np.float32),
        burn_in=np.int32(options.burn_in * len(rates)),
    )
    report = None if on_progress is None else lambda done, loss: on_progress(done, len(rates), loss)
    result, state = training.train(
        program, key, rows, settings, learning_rates=rates, collect=collect, on_progress=report
    )
    return Pretrained(result.params, state, result.history, result.statistics, finite(sigma), len(rates), search)


def compile_ahead(
    network: Network,
    likelihood: Likelihood,
    key: Key,
    rows: training.Rows,
    noise_std: np.ndarray,
    options: PretrainingOptions,
    num_rows: int,
    most_epochs: int = DEFAULT_EPOCHS,
) -> None:
    """Compile what ``pretrain`` will train ``num_rows`` of ``rows`` with; of a search and a final run the search's."""
    program, _ = plan_training(network, likelihood, num_rows, options, most_epochs)
    searched, averages = options.sigma == "auto" or options.epochs is None, options.averaging is not None
    if searched:
        program, averages = regularisation.search_program(program), False
    settings = training.Settings(
        np.asarray(rows.real, np.float32), np.float32(1.0), np.asarray(noise_std, np.float32), np.int32(0)
    )
    training.compile_ahead(program, key, rows, settings, averages=averages)


def plan_training(
    network: Network,
    likelihood: Likelihood,
    num_rows: int,
    options: PretrainingOptions,
    most_epochs: int = DEFAULT_EPOCHS,
) -> tuple[training.Program, np.ndarray]:
    """The program for ``num_rows`` rows and its step sizes ``(epochs, steps)``, for the longest run considered."""
    program = training.Program(
        network, likelihood, batch_size=default_batch_size(num_rows, options.batch_size),
        track_statistics=options.track_statistics,
    )  # fmt: skip
    steps = training.num_steps_per_epoch(program, num_rows)
    num_epochs = options.epochs or default_epochs(steps, most_epochs)
    return program, schedules.learning_rates(options.learning_rate, num_epochs, steps)


def _search(program, key, key_search, rows, noise_std, options, rates, seed, groups):
    """The program of the final run, the prior scale, and the length of training that unseen rows favour.

    Whatever the search finds, one program will do it: that of the search where it can, else one that a core compiles
    while the other compiles the search.
    """
    sigma, noise = options.sigma, np.asarray(noise_std, np.float32)
    sigmas = regularisation.SIGMA_GRID if isinstance(sigma, str) else (float(sigma) if sigma else np.inf,)
    averages = options.averaging is not None
    if regularisation.one_by_one() and not (averages or options.track_statistics):
        program, compiled = regularisation.search_program(program), None
    else:
        settings = training.Settings(np.asarray(rows.real, np.float32), np.float32(1.0), noise)
        compiled = beside(lambda: training.compile_ahead(program, key, rows, settings, averages=averages))
    search = regularisation.choose(program, key_search, rows, noise, sigmas, rates, seed, groups)
    if compiled is not None:
        compiled()
    return program, search.sigma, search


def finite(sigma: float | str | None) -> float | None:
    """A prior scale as it is reported: None where there is no prior."""
    return None if sigma is None or not np.isfinite(float(sigma)) else float(sigma)


def precision(sigma: float | str | None) -> np.float32:
    """One over the prior variance; zero for no prior."""
    return np.float32(1.0 / float(sigma) ** 2 if sigma else 0.0)
