"""Several backbones trained together, each on its own share of the rows.

A network trained on all rows knows their targets, and what is Bayesian on top
of it cannot see how wrong it will be elsewhere. Here every backbone leaves out
some rows, every row is left out by some backbones, and the predictions of those
say how well the whole ensemble will do: they decide when training stops and,
later, how wide the intervals are. Breiman (1996), "Out-of-bag estimation";
Lakshminarayanan, Pritzel & Blundell (2017), "Simple and scalable predictive
uncertainty estimation using deep ensembles", arXiv:1612.01474.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from . import left_out, out_of_fold, regularisation, training
from ._keys import children
from ._typing import Array, Key
from .backbone_runs import Run, Shared, group_size, lag, start, train_together
from .errors import TrainingError
from .likelihoods import Likelihood
from .networks.base import Network
from .pretraining import Pretrained, PretrainingOptions, finite, plan_training
from .regularisation import Regularisation

SIGMA_GRID = (0.3, 1.0, 3.0, 10.0)
"""Prior standard deviations tried, for noise of one standard deviation of the target."""

MOST_EPOCHS = 1000
"""Epochs of a run whose length is not given, fewer where an epoch has many steps; it may end earlier."""

NEGLIGIBLE = 5.0
"""A prior scale takes no part if its weight would be less than the exponential of minus this."""


@dataclasses.dataclass(frozen=True)
class Backbones:
    """The outcome of ``train_backbones``.

    Attributes
    ----------
    members : the trained networks, each with its prior scale, length and history and, where asked for, statistics.
    row_weights : (members, rows) one for the rows a member was trained on, zero for those it left out.
    parts : (members,) number of the part a member belongs to; a part shares prior scale and length, the best is 0.
    num_parts : one row in how many each member left out.
    whole_inputs : whether rows with the same inputs were left out together.
    search : the loss by prior scale and look: the squared error the ensemble is expected to make on new rows, in
        units of the assumed noise, or its log loss for classes and where the network gives the noise. Where inputs
        are compressed, only the prior scales are tried again that take part without.
    epochs : (looks,) epochs after which left-out rows were looked at.
    unseen_rmse : (parts, outputs) expected error of a part on new rows, working units; None for classes.
    compressed : whether the members take inputs with their long tails compressed.
    """

    members: tuple[Pretrained, ...]
    row_weights: np.ndarray
    parts: np.ndarray
    num_parts: int
    whole_inputs: bool
    search: Regularisation
    epochs: np.ndarray
    unseen_rmse: np.ndarray | None
    compressed: bool = False

    def __repr__(self) -> str:
        return f"Backbones({len(self.members)} members, sigmas={self.sigmas}, num_parts={self.num_parts})"

    @property
    def sigmas(self) -> list[float | None]:
        """Prior standard deviation of each part's weights; None for no prior."""
        return [self.members[int(np.argmax(self.parts == part))].sigma for part in np.unique(self.parts)]


def train_backbones(
    network: Network,
    likelihood: Likelihood,
    key: Key,
    rows: training.Rows,
    noise_std: np.ndarray,
    options: PretrainingOptions,
    num_backbones: int,
    *,
    stacked: bool,
    seed: int,
    groups: np.ndarray | None = None,
    most_epochs: int = MOST_EPOCHS,
    compressed: Array | None = None,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Backbones:
    """Train ``num_backbones`` networks on different rows, and stop where left-out rows are predicted best.

    Parameters
    ----------
    rows : padded training rows.
    noise_std : (outputs,) the noise the training objective assumes, working units.
    stacked : keep backbones of other prior scales that predict left-out rows nearly as well, as further parts.
    seed : decides which rows each backbone leaves out.
    groups : (rows without padding,) numbers of what is left out together; None for no such wish.
    most_epochs : of a run whose length is not given.
    compressed : the rows' inputs once more, which are taken instead where left-out rows show that they are better.
    on_progress : called with (epochs done, of how many, loss on left-out rows).

    Notes
    -----
    As in ``pretrain``: ``sigma="auto"`` is chosen by the loss on left-out rows, and so is the number of epochs
    unless both it and ``sigma`` are given, or weights are averaged.
    """
    real = np.asarray(rows.real) > 0
    num_rows = int(real.sum())
    program, rates = plan_training(network, likelihood, num_rows, options, most_epochs)
    weights, num_parts, whole_inputs = left_out.share_out(
        np.asarray(rows.x), real, num_backbones, seed, groups=groups
    )  # fmt: skip
    collect = None
    if options.averaging is not None:
        rates, collect = options.averaging.apply(rates)
    shared = Shared(program, rows, real, np.asarray(noise_std, np.float32), np.int32(options.burn_in * len(rates)),
                     rates, collect, num_backbones,
                     left_out.num_groups(np.asarray(rows.x)[real], whole_inputs, groups))  # fmt: skip
    stops = collect is None and (options.epochs is None or options.sigma == "auto")
    started, state = start(shared, children(key, num_backbones), weights)
    sigmas = SIGMA_GRID if isinstance(options.sigma, str) else (options.sigma,)
    # The same initialisations for every sigma: differences are then due to sigma.
    runs = [Run(shared, sigma, started, state, weights) for sigma in sigmas]
    rounds = 1 if compressed is None else 2
    ends = train_together(runs, stops, _in_round(on_progress, 0, rounds))
    kept, others = _kept(runs, stacked), None
    if compressed is not None:
        others = _better_with(compressed, kept, stops, _in_round(on_progress, 1, rounds))
    if others is not None:
        runs, kept = others, _kept(others, stacked)
    search = _search(runs, kept[0], len(ends))
    if options.track_statistics and stops:
        kept = [run.repeated(np.int32(options.burn_in * run.best.epoch)) for run in kept]
    rmse = [run.best.rmse for run in kept]
    return Backbones(
        members=tuple(itertools.chain.from_iterable(_members(run, search) for run in kept)),
        row_weights=np.tile(weights, (len(kept), 1)),
        parts=np.repeat(np.arange(len(kept)), num_backbones),
        num_parts=num_parts,
        whole_inputs=whole_inputs,
        search=search,
        epochs=ends,
        unseen_rmse=None if rmse[0] is None else np.array(rmse),
        compressed=others is not None,
    )


def _members(run: Run, search: Regularisation) -> list[Pretrained]:
    """The networks of a run, each with its own history."""
    return [
        Pretrained(params, run.state, {"loss": history}, statistics, finite(run.sigma), len(history), search)
        for params, statistics, history in run.members()
    ]


def _better_with(x: Array, runs: list[Run], stops: bool, on_progress) -> list[Run] | None:
    """The given runs, best first, with other inputs ``x``; None where these are not clearly better."""
    others = [run.with_inputs(x) for run in runs]
    train_together(others, stops, on_progress, rival=runs[0])
    return others if lag(others, runs[0]) <= -runs[0].shared.evidence else None


def _in_round(on_progress, number: int, rounds: int):
    """A report of one of several trainings of equal length as one of them all."""
    if on_progress is None:
        return None
    return lambda done, total, loss: on_progress(number * total + done, rounds * total, loss)


def _kept(runs: list[Run], stacked: bool) -> list[Run]:
    """The runs that take part, best first: the best alone, or all that are nearly as good."""
    order = sorted(runs, key=lambda run: run.best.loss)
    best, shared = order[0].best.loss, order[0].shared
    if not np.isfinite(best):
        raise TrainingError(f"the predictions of left-out rows are never finite. {training.CAUSES}")
    if not stacked:
        return order[:1]
    weight = out_of_fold.STACKING * shared.num_groups
    return order[:1] + [run for run in order[1:] if weight * shared.gap(run.best.loss, best) < NEGLIGIBLE]


def _search(runs: list[Run], best: Run, num_looks: int) -> Regularisation:
    """What was tried and what was best; the loss of a run that ended early is infinite from there on."""
    losses = np.full((len(runs), num_looks), np.inf)
    for row, run in zip(losses, runs, strict=True):
        row[: len(run.losses)] = run.losses
    scale = {run.sigma: np.inf if run.sigma is None else float(run.sigma) for run in runs}
    return Regularisation(scale[best.sigma], best.best.epoch, losses, tuple(scale.values()), best.best.rmse)


def compile_ahead(
    network: Network,
    likelihood: Likelihood,
    key: Key,
    rows: training.Rows,
    noise_std: np.ndarray,
    options: PretrainingOptions,
    num_backbones: int,
    num_rows: int,
    most_epochs: int = MOST_EPOCHS,
) -> None:
    """Compile what ``train_backbones`` will train groups of members with, on ``num_rows`` of ``rows``."""
    real = np.asarray(rows.real, np.float32)
    program, _ = plan_training(network, likelihood, num_rows, options, most_epochs)
    size = min(group_size(program, rows.x), num_backbones)
    settings = training.Settings(
        np.tile(real, (size, 1)), np.float32(1.0), np.asarray(noise_std, np.float32), np.int32(0)
    )
    averages = options.averaging is not None
    training.compile_ahead(program, key, rows, settings, averages=averages, run=regularisation.run_members)
