"""Trainings of some backbones with one prior scale each, side by side, and how well they predict left-out rows."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from . import out_of_fold, regularisation, training, weight_statistics
from ._threads import side_by_side
from ._typing import Array, Key, Params, State
from .convolutions import convolves
from .likelihoods import Categorical, Gaussian, HeteroskedasticGaussian, split_outputs
from .networks.base import Network
from .pretraining import precision
from .short_rows import ShortRows

GROUP = 4
"""Backbones trained by one compiled call; groups run on different cores. The same everywhere: so are the results. Only
networks with convolutions are trained one by one on a CPU, where those with a kernel for each member are slow, and
those that leave out padding, each batch of which is put through one of two programs."""

NUM_LOOKS = 25
"""How often the predictions for left-out rows are looked at during training."""

PATIENCE = 0.5
"""Training ends once the best look lies this share of the run so far back, and no less than a tenth of the whole."""

FORWARD_ROWS = 1024
"""Rows that all backbones of a group are applied to at once."""


class _Look(NamedTuple):
    """The state of all groups after an epoch, and how well left-out rows are predicted then."""

    epoch: int
    loss: float
    rmse: np.ndarray | None
    groups: list[training.Progress]


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all runs have in common."""

    program: training.Program
    rows: training.Rows
    real: np.ndarray
    noise_std: np.ndarray
    burn_in: np.int32
    rates: np.ndarray
    collect: np.ndarray | None
    num_backbones: int
    num_groups: int  # of rows that are left out as wholes: their errors are one piece of evidence

    @functools.cached_property
    def group_size(self) -> int:
        """Members of a group."""
        return group_size(self.program, self.rows.x)

    @property
    def evidence(self) -> float:
        """A difference between losses, in nats per row, that is hardly due to chance."""
        return self.num_groups**-0.5

    def gap(self, loss: float, best: float) -> float:
        """How much worse left-out rows are predicted, in nats per row."""
        if type(self.program.likelihood) is Gaussian:
            return 0.5 * float(np.log(loss / best)) if np.isfinite(loss) else np.inf
        return loss - best

    def look(self, run: "Run", epoch: int) -> _Look:
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


class Run:
    """One training of some members with one prior scale, group by group."""

    def __init__(
        self, shared: Shared, sigma: float | None, starts: list[training.Progress], state: State, weights: np.ndarray
    ):
        self.shared, self.sigma, self.weights = shared, sigma, weights
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
        settings = training.Settings(members, precision(self.sigma), shared.noise_std, shared.burn_in)
        for begin in range(0, last - first, training.EPOCHS_PER_CALL):
            chunk = slice(begin, begin + training.EPOCHS_PER_CALL)
            self.groups[number], losses, _ = regularisation.run_members(
                shared.program, self.groups[number], self.state, shared.rows, settings,
                training.pad_chunk(rates[chunk]), training.pad_chunk(collect[chunk]), np.int32(len(rates[chunk])),
            )  # fmt: skip
            self.histories[number].append(np.asarray(losses)[:, : len(rates[chunk])])

    def repeated(self, burn_in: np.int32) -> "Run":
        """The same run up to its best look, with statistics after ``burn_in`` epochs: a share of a length now known."""
        shared = dataclasses.replace(self.shared, burn_in=burn_in)
        again = Run(shared, self.sigma, self.starts, self.state, self.weights)
        tasks = ((number, 0, self.best.epoch) for number in range(len(again.groups)))
        side_by_side(again.advance, tasks, compiled=True)
        again.losses, again.best = self.losses, self.best._replace(groups=list(again.groups))
        return again

    def with_inputs(self, x: Array) -> "Run":
        """The same run, not begun, of rows with other inputs."""
        shared = dataclasses.replace(self.shared, rows=self.shared.rows._replace(x=x))
        return Run(shared, self.sigma, self.starts, self.state, self.weights)

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


def start(shared: Shared, keys: list[Key], weights: np.ndarray) -> tuple[list[training.Progress], State]:
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


def train_together(runs: list[Run], stops: bool, on_progress, rival: Run | None = None) -> np.ndarray:
    """All runs, look by look, until each has ended or is hopeless; the epochs of the looks.

    With a ``rival``, that has ended, they end too where they lag behind it: at first by what chance may do, and towards
    the end unless they are ahead by as much.
    """
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
        hopeless = regularisation.hopeless(last / num_epochs, shared.num_groups)
        alive = [
            run for run in alive
            if last - run.best.epoch <= max(PATIENCE * last, num_epochs / 10)
            and shared.gap(run.best.loss, leader.loss) <= hopeless
        ]  # fmt: skip
        if not alive:
            break
        if rival is not None and lag(runs, rival) > shared.evidence * (1 - 2 * last / num_epochs):
            break
    return ends[1:]


def lag(runs: list[Run], rival: Run) -> float:
    """How much worse the best of the runs predicts left-out rows than the rival did after as many looks."""
    looks = max(len(run.losses) for run in runs)
    return rival.shared.gap(min(run.best.loss for run in runs), min(rival.losses[:looks]))


def group_size(program: training.Program, x: Any) -> int:
    """Members of a group, for rows like those of ``x``."""
    network, on_cpu = program.network, jax.default_backend() == "cpu"
    alone = on_cpu and (isinstance(network, ShortRows) or convolves(network, x.shape[1:], x.dtype))
    return 1 if alone else GROUP


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
