"""The deterministic stage of a fit: one trained network, or several that have each seen a share of the rows."""

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import backbones, left_out, out_of_fold, predictive, pretraining, priors, regularisation
from .._threads import beside
from .._typing import Key, Params, State
from ..backbones import Backbones
from ..checkpoint import Checkpoint
from ..errors import CalibrationWarning, ConvergenceWarning, OptionError, UnitsWarning
from ..networks.base import Network
from ..pretraining import DEFAULT_EPOCHS, Pretrained, PretrainingOptions, default_batch_size, pretrain
from . import extent, resuming
from .base import Prepared, abstract_key, compressed
from .progress import Report

MIN_NOISE_START = 1e-3

_ONE_PART = np.zeros(1, int)

FEW_ROWS = 5000
"""Below this many rows, intervals above a single backbone are known to be too narrow."""


class Stage(NamedTuple):
    """Trained networks with the rows each was trained on.

    ``row_weights`` is (members, rows), zero for padding; ``parts`` (members,) which of them share a prior scale;
    ``ensemble`` is None for a single network; ``prepared`` is the data as the networks take it.
    """

    params: list[Params]
    state: State
    pretrained: list[Pretrained | None]
    row_weights: np.ndarray
    parts: np.ndarray
    ensemble: Backbones | None
    prepared: Prepared

    def starting_noise(self, plan: Any, member: int) -> np.ndarray:
        """Error of a trained network, ``(outputs,)``: on unseen rows where it was measured, else on training rows.

        One, where the likelihood has no noise to start.
        """
        if not plan.likelihood.num_noise(plan.prepared.num_outputs):
            return np.ones(1, np.float32)
        rows, scale = plan.prepared.rows, target_scale(plan.prepared.rows)
        pretrained = self.pretrained[member]
        unseen = None
        if self.ensemble is not None:
            unseen = None if self.ensemble.unseen_rmse is None else self.ensemble.unseen_rmse[self.parts[member]]
        elif pretrained is not None and pretrained.search is not None:
            unseen = pretrained.search.unseen_rmse
        if unseen is not None:
            return np.maximum(unseen, MIN_NOISE_START * scale)
        outputs = predictive.deterministic_outputs(plan.network, self.params[member], self.state, np.asarray(rows.x))
        real = np.asarray(rows.real) > 0
        residual = (outputs - np.asarray(rows.y))[real]
        return np.clip(np.sqrt(np.mean(residual**2, axis=0)), MIN_NOISE_START * scale, None)


def train(
    plan: Any, key: Key, seed: int, options: PretrainingOptions, report: Report, checkpoint: Checkpoint | None
) -> Stage:
    """Weights and frozen state: given, initial, held by a checkpoint, or those of the deterministic stage."""
    rows = plan.prepared.rows
    real = np.asarray(rows.real, np.float32)
    if plan.warm is not None:
        return _continued(plan, real)
    if plan.weights is not None:
        state = _initial_state(plan.network, key, rows.x)
        _warn_of_units(plan, state)
        return Stage([plan.weights], state, [None], real[None], _ONE_PART, None, plan.prepared)
    if plan.untrained:
        params, state = _initial(plan.network, key, rows.x)
        return Stage([params], state, [None], real[None], _ONE_PART, None, plan.prepared)
    burn_in = 0.5 if plan.select_config is None else plan.select_config.burn_in
    options = dataclasses.replace(options, track_statistics=plan.needs_statistics, burn_in=burn_in)
    if plan.num_backbones > 1:
        return _ensemble(plan, key, seed, options, report, checkpoint)
    pretrained = None
    if checkpoint is not None:
        pretrained = resuming.load_trained(
            checkpoint, plan.template, state_template(plan.network, plan.prepared.rows.x)
        )
    if pretrained is None:
        network, longest = extent.of_training(plan, options)
        pretrained = pretrain(
            network, plan.likelihood, key, rows, _assumed_noise(plan), options, seed=seed,
            groups=plan.prepared.groups, most_epochs=min(DEFAULT_EPOCHS, longest), on_progress=_reporter(report),
        )  # fmt: skip
        if checkpoint is not None:
            resuming.save_trained(checkpoint, pretrained)
    return Stage([pretrained.params], pretrained.state, [pretrained], real[None], _ONE_PART, None, plan.prepared)


def compile_ahead(plan: Any, key: Key, options: PretrainingOptions) -> bool:
    """Start to compile what ``train`` will run, on a core that is free for it, and say whether that was done.

    So is what it will run with as many rows as there is room for, whose batches may be others. ``key`` may be any.
    """
    trains = plan.warm is None and plan.weights is None and not plan.untrained
    if not trains or not regularisation.one_by_one():
        return False
    options = dataclasses.replace(options, track_statistics=plan.needs_statistics)
    network, longest = extent.of_training(plan, options)
    common = network, plan.likelihood, key, plan.prepared.rows, _assumed_noise(plan), options
    by_batch = {default_batch_size(n, options.batch_size): n for n in (plan.most_rows, plan.prepared.num_rows)}

    def compile_all() -> None:
        for num_rows in reversed(by_batch.values()):  # those that are there first
            if plan.num_backbones > 1:
                epochs = min(backbones.MOST_EPOCHS, longest)
                backbones.compile_ahead(*common, plan.num_backbones, num_rows, epochs)
            else:
                pretraining.compile_ahead(*common, num_rows, min(DEFAULT_EPOCHS, longest))

    beside(compile_all)
    return True


def _ensemble(plan, key, seed, options, report, checkpoint) -> Stage:
    rows, ensemble = plan.prepared.rows, None
    other = compressed(plan.prepared) if plan.may_compress else None
    if checkpoint is not None:
        ensemble = resuming.load_backbones(
            checkpoint, plan.template, state_template(plan.network, plan.prepared.rows.x)
        )
    if ensemble is None:
        network, longest = extent.of_training(plan, options)
        ensemble = backbones.train_backbones(
            network, plan.likelihood, key, rows, _assumed_noise(plan), options, plan.num_backbones,
            stacked=plan.exact is not None, seed=seed, groups=plan.prepared.groups,
            most_epochs=min(backbones.MOST_EPOCHS, longest),
            on_progress=_reporter(report), compressed=None if other is None else other.rows.x,
        )  # fmt: skip
        if checkpoint is not None:
            resuming.save_backbones(checkpoint, ensemble)
    members = list(ensemble.members)
    prepared = plan.prepared if other is None or not ensemble.compressed else other
    return Stage(
        [m.params for m in members], members[0].state, list(members), ensemble.row_weights, ensemble.parts, ensemble,
        prepared,
    )  # fmt: skip


def _continued(plan: Any, real: np.ndarray) -> Stage:
    """The networks of an earlier fit for the rows of this one.

    A row's share is decided by its place and the earlier fit's seed, so rows that come after the earlier ones leave
    those where they were; any other rows are refused.
    """
    earlier = plan.warm
    common = min(earlier.num_rows, plan.prepared.num_rows)
    hashes = training_row_hashes(plan.prepared)
    if earlier.ensemble is not None and np.any(hashes[:common] != earlier.row_hashes[:common]):
        raise OptionError(
            f"warm_start keeps which rows each of {len(earlier.members)} backbones has seen, so X must begin with the "
            f"{earlier.num_rows} rows of the earlier fit, in their order; new ones come after them. Otherwise fit anew."
        )
    params = [member.source.params for member in earlier.members]
    state, weights, ensemble = earlier.members[0].source.state, real[None], earlier.ensemble
    if ensemble is not None:
        _check_groups(earlier.groups, plan.prepared.groups, common)
        num_parts = int(earlier.parts.max()) + 1
        shares, _, _ = left_out.share_out(
            np.asarray(plan.prepared.rows.x), real, len(params) // num_parts, earlier.seed,
            ensemble.num_parts, ensemble.whole_inputs, plan.prepared.groups,
        )  # fmt: skip
        weights = shares = np.tile(shares, (num_parts, 1))  # the same in every part
        rmse = ensemble.unseen_rmse
        if rmse is not None:
            rmse = _unseen_rmse(plan, params, state, shares, earlier.parts)
        ensemble = dataclasses.replace(ensemble, row_weights=shares, unseen_rmse=rmse)
    return Stage(params, state, [None] * len(params), weights, earlier.parts, ensemble, plan.prepared)


def _check_groups(earlier: np.ndarray | None, groups: np.ndarray | None, common: int) -> None:
    """Raise where the rows of an earlier fit would not be left out together as they were."""
    if earlier is None and groups is None:
        return
    if earlier is None or groups is None or np.any(earlier[:common] != groups[:common]):
        kind = "had no groups" if earlier is None else "was made with groups"
        raise OptionError(
            f"warm_start keeps which rows are left out together, and the earlier fit {kind}: give the same ones"
            f"{' of all rows' if earlier is not None else ', none'}, or fit anew."
        )


def training_row_hashes(prepared: Any) -> np.ndarray:
    """A number for each row of a fit, without their padding."""
    n = prepared.num_rows
    return left_out.hashes(np.asarray(prepared.rows.x)[:n], np.asarray(prepared.rows.y)[:n])


def _unseen_rmse(plan: Any, params: list[Params], state: State, weights: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Error of each part's networks on the rows that each has not seen, ``(parts, outputs)``, working units."""
    rows, real = plan.prepared.rows, np.asarray(plan.prepared.rows.real) > 0
    x, y = np.asarray(rows.x), np.asarray(rows.y, float)[real]
    outputs = np.stack([
        plan.likelihood.means(predictive.deterministic_outputs(plan.network, each, state, x))[real] for each in params
    ])  # fmt: skip
    unseen = weights[:, real] == 0
    return np.sqrt([
        out_of_fold.ensemble_error(outputs[parts == p], unseen[parts == p], y, int(np.sum(parts == p)))
        for p in np.unique(parts)
    ])  # fmt: skip


def _reporter(report: Report):
    return lambda done, total, loss: report("training", done, total, f"loss {loss:.4g}")


def _assumed_noise(plan: Any) -> np.ndarray:
    """Training compares losses at noise of one target's spread; classes have no noise."""
    return target_scale(plan.prepared.rows) if plan.likelihood.is_regression else np.ones(1, np.float32)


def target_scale(rows: Any) -> np.ndarray:
    """Standard deviation of the targets in working units: one when they are standardised, else that of the user's."""
    return priors.target_scale(np.asarray(rows.y), np.asarray(rows.real))


def state_template(network: Network, x: Any) -> State:
    """Shapes of the network's state for rows like those of ``x``."""
    return jax.eval_shape(network.init, abstract_key(), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))[1]


@functools.partial(jax.jit, static_argnums=0)
def _initial(network: Network, key: Key, x: Any) -> tuple[Params, State]:
    return network.init(key, x[:1])


@functools.partial(jax.jit, static_argnums=0)
def _initial_state(network: Network, key: Key, x: Any) -> State:
    """The state alone: random weights take a second to compile, and are not drawn for it."""
    return network.init(key, x[:1])[1]


def _warn_of_units(plan: Any, state: State) -> None:
    """Given weights that predict worse than the mean were probably trained in other units."""
    rows = plan.prepared.rows
    if not plan.likelihood.is_regression:
        return
    outputs = predictive.deterministic_outputs(plan.network, plan.weights, state, np.asarray(rows.x))
    real = np.asarray(rows.real) > 0
    error = np.sqrt(np.mean((plan.likelihood.means(outputs) - np.asarray(rows.y))[real] ** 2))
    spread = np.sqrt(np.mean(target_scale(rows) ** 2))
    if error > 2.0 * spread:
        warnings.warn(
            f"the given weights predict y with an error of {error:.3g}, more than twice its spread of {spread:.3g}. If "
            "they were trained on standardised data, pass standardize=True, or DeterministicNN.get_params(), which "
            "remembers its units.",
            UnitsWarning,
            stacklevel=5,
        )


def warn_of_rate(plan: Any, stage: Stage, rate: Any) -> None:
    """Warn where training with a given step size ended far worse than the mean of the targets, if finite."""
    if rate is None or stage.pretrained[0] is None or not plan.likelihood.num_noise(plan.prepared.num_outputs):
        return
    factor = float(np.max(stage.starting_noise(plan, 0) / target_scale(plan.prepared.rows)))
    if factor**2 > 10.0:  # times the squared error of the mean
        warnings.warn(
            f"the trained network predicts y with an error of {factor:.3g} times its spread: training seems to have "
            "diverged. Lower sgd_lr, or leave it out.",
            ConvergenceWarning,
            stacklevel=4,
        )


def warn_of_one(num_rows: int, *, partial: bool) -> None:
    """Warn where the intervals above a single trained network are known to cover too little."""
    if partial and num_rows < FEW_ROWS:
        warnings.warn(
            f"with one backbone trained on all of {num_rows} rows, 95 % intervals are known to cover as little as a "
            "third of new rows. Leave num_backbones at 'auto', or check coverage on rows of your own and correct it "
            "with model.calibrate.",
            CalibrationWarning,
            stacklevel=3,
        )
