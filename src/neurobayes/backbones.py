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
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from . import left_out, out_of_fold, regularisation, training, weight_statistics
from ._keys import children
from ._threads import side_by_side
from ._typing import Array, Key, Params, State
from .convolutions import convolves
from .errors import TrainingError
from .likelihoods import Categorical, Gaussian, HeteroskedasticGaussian, Likelihood, split_outputs
from .networks.base import Network
from .pretraining import Pretrained, PretrainingOptions, finite, plan_training, precision
from .regularisation import Regularisation

SIGMA_GRID = (0.3, 1.0, 3.0, 10.0)
"""Prior standard deviations tried, for noise of one standard deviation of the target."""

GROUP = 4
"""Backbones trained by one compiled call; groups run on different cores. The same everywhere: so are the results. Only
networks with convolutions are trained one by one on a CPU, where those with a kernel for each member are slow."""

MOST_EPOCHS = 1000
"""Epochs of a run whose length is not given, fewer where an epoch has many steps; it may end earlier."""

NUM_LOOKS = 25
"""How often the predictions for left-out rows are looked at during training."""

PATIENCE = 0.5
"""Training ends once the best look lies this share of the run so far back, and no less than a tenth of the whole."""

NEGLIGIBLE = 5.0
"""A prior scale takes no part if its weight would be less than the exponential of minus this."""

FORWARD_ROWS = 1024
"""Rows that all backbones of a group are applied to at once."""


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
        units of the assumed noise, or its log loss for classes and where the network gives the noise.
    epochs : (looks,) epochs after which left-out rows were looked at.
    unseen_rmse : (parts, outputs) expected error of a part on new rows, working units; None for classes.
    """

    members: tuple[Pretrained, ...]
    row_weights: np.ndarray
    parts: np.ndarray
    num_parts: int
    whole_inputs: bool
    search: Regularisation
    epochs: np.ndarray
    unseen_rmse: np.ndarray | None

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
    most_epochs: int = MOST_EPOCHS,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Backbones:
    """Train ``num_backbones`` networks on different rows, and stop where left-out rows are predicted best.

    Parameters
    ----------
    rows : padded training rows.
    noise_std : (outputs,) the noise the training objective assumes, working units.
    stacked : keep backbones of other prior scales that predict left-out rows nearly as well, as further parts.
    seed : decides which rows each backbone leaves out.
    most_epochs : of a run whose length is not given.
    on_progress : called with (epochs done, of how many, loss on left-out rows).

    Notes
    -----
    As in ``pretrain``: ``sigma="auto"`` is chosen by the loss on left-out rows, and so is the number of epochs
    unless both it and ``sigma`` are given, or weights are averaged.
    """
    real = np.asarray(rows.real) > 0
    num_rows = int(real.sum())
    program, rates = plan_training(network, likelihood, num_rows, options, most_epochs)
    weights, num_parts, whole_inputs = left_out.share_out(np.asarray(rows.x), real, num_backbones, seed)
    collect = None
    if options.averaging is not None:
        rates, collect = options.averaging.apply(rates)
    shared = _Shared(program, rows, real, np.asarray(noise_std, np.float32), np.int32(options.burn_in * len(rates)),
                     rates, collect, num_backbones)  # fmt: skip
    stops = collect is None and (options.epochs is None or options.sigma == "auto")
    groups, state = _start(shared, children(key, num_backbones), weights)
    sigmas = SIGMA_GRID if options.sigma == "auto" else (options.sigma,)
    # The same initialisations for every sigma: differences are then due to sigma.
    runs = [_Run(shared, precision(sigma), groups, state, weights) for sigma in sigmas]
    ends = _train_together(runs, stops, on_progress)
    kept = _kept(runs, num_rows, stacked)
    if options.track_statistics and stops:
        for i in kept:
            runs[i] = runs[i].repeated(np.int32(options.burn_in * runs[i].best.epoch))
    rmse = [runs[i].best.rmse for i in kept]
    scales = tuple(np.inf if sigma is None else float(sigma) for sigma in sigmas)
    search = _search(runs, scales, kept[0], len(ends))
    members = tuple(
        Pretrained(params, runs[i].state, {"loss": history}, statistics, finite(sigmas[i]), len(history), search)
        for i in kept
        for params, statistics, history in runs[i].members()
    )
    return Backbones(
        members=members,
        row_weights=np.tile(weights, (len(kept), 1)),
        parts=np.repeat(np.arange(len(kept)), num_backbones),
        num_parts=num_parts,
        whole_inputs=whole_inputs,
        search=search,
        epochs=ends,
        unseen_rmse=None if rmse[0] is None else np.array(rmse),
    )


def _kept(runs: "list[_Run]", num_rows: int, stacked: bool) -> list[int]:
    """The runs that take part, best first: the best alone, or all that are nearly as good."""
    order = sorted(range(len(runs)), key=lambda i: runs[i].best.loss)
    best = runs[order[0]].best
    if not np.isfinite(best.loss):
        raise TrainingError(f"the predictions of left-out rows are never finite. {training.CAUSES}")
    if not stacked:
        return order[:1]
    gaps = {i: out_of_fold.STACKING * num_rows * runs[i].shared.gap(runs[i].best, best) for i in order[1:]}
    return order[:1] + [i for i, gap in gaps.items() if gap < NEGLIGIBLE]


def _search(runs: "list[_Run]", scales: tuple[float, ...], best: int, num_looks: int) -> Regularisation:
    """What was tried and what was best; the loss of a run that ended early is infinite from there on."""
    losses = np.full((len(runs), num_looks), np.inf)
    for row, run in zip(losses, runs, strict=True):
        row[: len(run.losses)] = run.losses
    return Regularisation(scales[best], runs[best].best.epoch, losses, scales, runs[best].best.rmse)


def compile_ahead(
    network: Network,
    likelihood: Likelihood,
    key: Key,
    rows: training.Rows,
    noise_std: np.ndarray,
    options: PretrainingOptions,
    num_backbones: int,
    most_epochs: int = MOST_EPOCHS,
) -> None:
    """Compile what ``train_backbones`` will train groups of members with."""
    real = np.asarray(rows.real, np.float32)
    program, _ = plan_training(network, likelihood, int(real.sum()), options, most_epochs)
    size = min(_group_size(program, rows.x), num_backbones)
    settings = training.Settings(
        np.tile(real, (size, 1)), np.float32(1.0), np.asarray(noise_std, np.float32), np.int32(0)
    )
    averages = options.averaging is not None
    training.compile_ahead(program, key, rows, settings, averages=averages, run=regularisation.run_members)


def _start(shared: "_Shared", keys: list[Key], weights: np.ndarray) -> tuple[list[training.Progress], State]:
    """Initialised groups, and the network's state; the program that trains them is compiled meanwhile."""
    averages, size = shared.collect is not None, shared.group_size
    settings = training.Settings(weights[:size], np.float32(1.0), shared.noise_std, shared.burn_in)
    first, state = regularisation.start_members(
        shared.program, keys[:size], shared.rows, settings, averages=averages
    )  # fmt: skip
    groups = [first]
    for begin in range(size, len(keys), size):
        members = keys[begin : begin + size]
        groups.append(training.initialise_members(shared.program, members, shared.rows.x, averages=averages)[0])
    return groups, state


def _train_together(runs: "list[_Run]", stops: bool, on_progress) -> np.ndarray:
    """All runs, look by look, until each has ended or is hopeless; the epochs of the looks."""
    shared = runs[0].shared
    num_epochs = len(shared.rates)
    looks = min(NUM_LOOKS, num_epochs) if stops else 1
    # Closer together at first, where a few rows are soon memorised.
    ends = np.unique(np.round(num_epochs * np.linspace(0, 1, looks + 1) ** 2).astype(int))
    alive = list(runs)
    for first, last in itertools.pairwise(ends.tolist()):
        tasks = [(run, number) for run in alive for number in range(len(run.groups))]
        side_by_side(lambda run, number, a=first, b=last: run.advance(number, a, b), tasks, compiled=first > 0)
        for run in alive:
            run.record(shared.look(run, last))
        leader = min((run.best for run in runs), key=lambda look: look.loss)
        if on_progress is not None:
            on_progress(last, num_epochs, leader.loss)
        hopeless = regularisation.hopeless(last / num_epochs, int(shared.real.sum()))
        alive = [
            run for run in alive
            if last - run.best.epoch <= max(PATIENCE * last, num_epochs / 10)
            and shared.gap(run.best, leader) <= hopeless
        ]  # fmt: skip
        if not alive:
            break
    return ends[1:]


def _group_size(program: training.Program, x: Any) -> int:
    slow = jax.default_backend() == "cpu" and convolves(program.network, x.shape[1:], x.dtype)
    return 1 if slow else GROUP


class _Look(NamedTuple):
    """The state of all groups after an epoch, and how well left-out rows are predicted then."""

    epoch: int
    loss: float
    rmse: np.ndarray | None
    groups: list[training.Progress]


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What all runs have in common."""

    program: training.Program
    rows: training.Rows
    real: np.ndarray
    noise_std: np.ndarray
    burn_in: np.int32
    rates: np.ndarray
    collect: np.ndarray | None
    num_backbones: int

    @functools.cached_property
    def group_size(self) -> int:
        """Members of a group."""
        return _group_size(self.program, self.rows.x)

    def gap(self, look: _Look, best: _Look) -> float:
        """How much worse left-out rows are predicted, in nats per row."""
        if type(self.program.likelihood) is Gaussian:
            return 0.5 * float(np.log(look.loss / best.loss)) if np.isfinite(look.loss) else np.inf
        return look.loss - best.loss

    def look(self, run: "_Run", epoch: int) -> _Look:
        """How well the members of ``run`` together predict the rows that each left out."""
        network = self.program.network

        def predicted(group: training.Progress) -> np.ndarray:
            params = group.params if group.average is None else group.average
            return np.asarray(_group_outputs(network, params, run.state, self.rows.x))

        outputs = np.concatenate(side_by_side(predicted, ((group,) for group in run.groups), compiled=bool(run.losses)))
        outputs = outputs[:, self.real].astype(float)
        unseen, y = run.weights[:, self.real] == 0, np.asarray(self.rows.y)[self.real]
        if type(self.program.likelihood) is Categorical:
            probabilities = out_of_fold.ensemble_probabilities(scipy.special.softmax(outputs, axis=-1), unseen)
            loss, rmse = out_of_fold.log_loss(probabilities, y), None
        elif isinstance(self.program.likelihood, HeteroskedasticGaussian):
            (mean, log_std), y = split_outputs(outputs), y.astype(float)
            loss = out_of_fold.ensemble_log_loss(mean, np.exp(2.0 * log_std), unseen, y, self.num_backbones)
            rmse = np.sqrt(out_of_fold.ensemble_error(mean, unseen, y, self.num_backbones))
        else:
            errors = out_of_fold.ensemble_error(outputs, unseen, y.astype(float), self.num_backbones)
            loss, rmse = float(np.mean(errors / self.noise_std.astype(float) ** 2)), np.sqrt(errors)
        return _Look(epoch, loss if np.isfinite(loss) else np.inf, rmse, list(run.groups))


class _Run:
    """One training of some members with one prior scale, group by group."""

    def __init__(
        self, shared: _Shared, prior_precision: np.float32, starts: list[training.Progress], state: State,
        weights: np.ndarray,
    ):  # fmt: skip
        self.shared, self.prior_precision, self.weights = shared, prior_precision, weights
        self.starts, self.state, self.groups = starts, state, list(starts)
        self.histories: list[list[np.ndarray]] = [[] for _ in self.groups]
        self.losses: list[float] = []
        self.best = _Look(0, np.inf, None, list(self.groups))

    def record(self, look: _Look) -> None:
        """Remember a look, and its networks if it is the best so far."""
        self.losses.append(look.loss)
        if look.loss < self.best.loss:
            self.best = look

    def advance(self, number: int, first: int, last: int) -> None:
        """One group from epoch ``first`` to ``last``."""
        shared = self.shared
        rates = training.pad_steps(shared.program, shared.rates[first:last], len(shared.real))
        collect = np.zeros(last - first, np.float32) if shared.collect is None else shared.collect[first:last]
        size = shared.group_size
        members = self.weights[number * size : number * size + size]
        settings = training.Settings(members, self.prior_precision, shared.noise_std, shared.burn_in)
        for begin in range(0, last - first, training.EPOCHS_PER_CALL):
            chunk = slice(begin, begin + training.EPOCHS_PER_CALL)
            self.groups[number], losses, _ = regularisation.run_members(
                shared.program, self.groups[number], self.state, shared.rows, settings,
                training.pad_chunk(rates[chunk]), training.pad_chunk(collect[chunk]), np.int32(len(rates[chunk])),
            )  # fmt: skip
            self.histories[number].append(np.asarray(losses)[:, : len(rates[chunk])])

    def repeated(self, burn_in: np.int32) -> "_Run":
        """The same run up to its best look, with statistics after ``burn_in`` epochs: a share of a length now known."""
        shared = dataclasses.replace(self.shared, burn_in=burn_in)
        again = _Run(shared, self.prior_precision, self.starts, self.state, self.weights)
        tasks = ((number, 0, self.best.epoch) for number in range(len(again.groups)))
        side_by_side(again.advance, tasks, compiled=True)
        again.losses, again.best = self.losses, self.best._replace(groups=list(again.groups))
        return again

    def members(self) -> list[tuple[Params, Any, np.ndarray]]:
        """Weights, statistics where they were gathered, and training losses of every member at the best look."""
        found = []
        for group, history in zip(self.best.groups, self.histories, strict=True):
            losses = np.concatenate(history, axis=1)[:, : self.best.epoch]
            # Cut on the host: cutting there one leaf after another would take longer than training on few rows.
            kept = jax.tree.map(np.asarray, group._replace(key=None, opt_state=None, best_params=None))
            for k in range(len(losses)):
                member = jax.tree.map(lambda leaf, k=k: leaf[k].copy(), kept)
                statistics = member.statistics
                if statistics is not None:
                    statistics = weight_statistics.summarise(statistics, int(member.num_averaged))
                params = member.params if member.average is None else member.average
                found.append((params, statistics, losses[k]))
        return found


@functools.partial(jax.jit, static_argnums=0)
def _group_outputs(network: Network, params: Params, state: State, x: Array) -> Array:
    """Outputs ``(members, rows, d)`` of all members of a group, in blocks of rows."""

    def one(params, x):
        return network.apply(params, state, x)

    def apply(params, x):
        if jax.tree.leaves(params)[0].shape[0] == 1:  # not vmapped: see GROUP
            return one(jax.tree.map(lambda leaf: leaf[0], params), x)[None]
        return jax.vmap(one, in_axes=(0, None))(params, x)

    size = x.shape[0]
    if size <= FORWARD_ROWS:
        return apply(params, x)

    def block(first):
        at = jnp.minimum(first + jnp.arange(FORWARD_ROWS), size - 1)
        return apply(params, x[at])

    blocks = jax.lax.map(block, jnp.arange(0, size, FORWARD_ROWS))
    return jnp.concatenate(jnp.unstack(blocks), axis=1)[:, :size]
