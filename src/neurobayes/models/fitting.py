"""The stages of fitting a partially Bayesian network, from checked input to a fitted result.

``make_plan`` finds everything that can be wrong before anything is trained;
``run`` trains, chooses the Bayesian weights, samples them, and judges the run.
Both are functions of their arguments: the model that calls them changes only
when ``run`` has returned.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .. import _checks, log_density, predictive, priors, row_blocks, selection, selectors
from .._typing import Key, Params, State
from ..checkpoint import Checkpoint
from ..data import Scaling
from ..diagnostics import Diagnostics
from ..errors import MemoryBudgetWarning, OptionError, UnitsWarning
from ..likelihoods import Categorical, Gaussian, Likelihood
from ..networks.base import Network
from ..posterior import Posterior
from ..predictive import Source
from ..pretraining import Pretrained, PretrainingOptions, pretrain
from ..schedules import AveragingConfig, LearningRate
from ..subspaces import RandomPart
from . import resuming
from .base import Prepared, TrainedParams, network_info, prepare
from .choosing import Trained, check, choose
from .deterministic import DeterministicNN
from .progress import Report
from .sampling import Sampling, judge, on_host, sample, stopping_rule, with_draws

MIN_NOISE_START = 1e-3


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Everything a fit leaves behind."""

    source: Source
    posterior: Posterior
    scaling: Scaling
    row_shape: tuple[int, ...]
    target_ndim: int
    pretrained: Pretrained | None
    diagnostics: Diagnostics
    seconds: dict[str, float]
    capacity: int
    num_rows: int
    columns: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked fit that has not started: data, options, and the choice of weights known to be possible."""

    network: Network
    prepared: Prepared
    likelihood: Likelihood
    choice: selectors.Selector | None
    select_config: selection.SelectionConfig | None
    weights: Params | None
    statistics: Any
    needs_statistics: bool
    noise_prior: Any
    prior_mean: str
    priors_sigma: float | Mapping[str, float]
    template: Params
    warm: Fitted | None = None


def pretraining_options(
    epochs: Any, rate: LearningRate | None, batch_size: Any, swa_config: Any, sigma: Any
) -> PretrainingOptions:
    """Checked options of the deterministic stage."""
    for name, value in (("sgd_epochs", epochs), ("sgd_batch_size", batch_size)):
        if value is not None:
            _checks.check_positive_int(name, value)
    if rate is not None and not callable(rate):
        _checks.check_positive("sgd_lr", rate)
    if isinstance(sigma, str):
        _checks.check_one_of("map_sigma", sigma, ("auto",))
    elif sigma is not None:
        sigma = _checks.check_positive("map_sigma", sigma)
    averaging = AveragingConfig.from_user(swa_config)
    return PretrainingOptions(epochs, rate, batch_size, averaging, sigma)


def make_plan(
    network: Network,
    X: Any,
    y: Any,
    *,
    choice: selectors.Selector | None,
    select_config: Mapping[str, Any] | None,
    given: Any,
    num_classes: int | None,
    standardize: bool | str,
    noise_prior: Any,
    prior_mean: str,
    priors_sigma: Any,
    previous: Fitted | None = None,
    warm: bool = False,
) -> Plan:
    """Check data, weights and choices against the network; raises before any training starts.

    ``previous`` is an earlier fit, whose padding is kept where a few rows were
    added; with ``warm`` its weights, units and sampler are what the fit starts from.
    """
    if isinstance(given, DeterministicNN):
        given = given.get_params()
    elif given is None:
        given = network.pretrained
    earlier = None if previous is None else (previous.num_rows, previous.capacity)
    if warm and previous is not None:
        prepared = prepare(
            network, X, y, num_classes=num_classes, standardize=True, scaling=previous.scaling, earlier=earlier
        )
        given = previous.source.params
    else:
        prepared = _prepare(network, X, y, num_classes, standardize, given, earlier)
    example = jax.ShapeDtypeStruct((1, *prepared.rows.x.shape[1:]), prepared.rows.x.dtype)
    info = network_info(network, example)
    template, _ = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), example)
    weights = None if given is None else _checks.check_weights_structure(given, template)
    statistics = getattr(given, "statistics", None)
    priors.prior_std_tree(template, priors_sigma)
    if num_classes is None:
        noise_prior = priors.default_noise_prior(_target_scale(prepared.rows)) if noise_prior is None else noise_prior
        priors.check_noise_prior(noise_prior, prepared.num_outputs)
    config = None if select_config is None else selection.validate_select_config(select_config, info)
    asked = check(choice, config, info, template, priors_sigma)
    if asked and weights is not None and statistics is None:
        raise OptionError(
            f"a choice by {', '.join(sorted(asked))} needs the statistics of a training run, but the given weights "
            "came without any. Pass DeterministicNN.get_params(), or choose by 'magnitude', 'fisher' or "
            "'laplace_variance'."
        )
    return Plan(
        network, prepared, Gaussian() if num_classes is None else Categorical(), choice, config, weights, statistics,
        bool(asked), noise_prior, prior_mean, priors_sigma, template, previous if warm else None,
    )  # fmt: skip


def run(plan: Plan, key: Key, options: PretrainingOptions, sampling: Sampling, report: Report) -> Fitted:
    """Train, choose, sample and judge."""
    started = time.perf_counter()
    key_train, key_sample, seed = _stage_keys(key)
    checkpoint = None
    if sampling.checkpoint_dir is not None:
        checkpoint = Checkpoint(sampling.checkpoint_dir, resuming.run_identity(plan, key, options, sampling))
    params, state, pretrained = _trained(plan, key_train, int(seed), options, report, checkpoint)
    trained = time.perf_counter()
    if plan.warm is None:
        partition = _choose(plan, jax.random.fold_in(key_train, 1), params, state, pretrained)
    else:
        partition = plan.warm.source.partition
    if checkpoint is not None:
        resuming.check_choice(checkpoint, partition)
    density, start = _density(plan, partition, params, state, pretrained)
    source = Source(plan.network, partition, params, state, np.zeros((0, partition.size)), np.zeros((0, 0)))
    posterior = sample(
        sampling, key_sample, density, start, checkpoint=checkpoint, report=report,
        is_enough=stopping_rule(sampling, plan.prepared, source, density),
        warm_start=None if plan.warm is None else plan.warm.posterior.adaptation,
    )  # fmt: skip
    source = on_host(with_draws(source, density, posterior.flat_draws))._replace(analytic=posterior.analytic)
    diagnostics = judge(plan.prepared, source, posterior)
    seconds = {"training": trained - started, "sampling": time.perf_counter() - trained}
    prepared = plan.prepared
    return Fitted(
        source, posterior, prepared.scaling, prepared.row_shape, prepared.target_ndim, _as_numpy(pretrained),
        diagnostics, seconds, len(prepared.rows.real), prepared.num_rows, prepared.columns,
    )  # fmt: skip


def _prepare(
    network: Network,
    X: Any,
    y: Any,
    num_classes: int | None,
    standardize: Any,
    given: Any,
    earlier: tuple[int, int] | None,
) -> Prepared:
    """Scaled data: in the units of given weights where these are known, and in the user's where they are not."""
    known = given.scaling if isinstance(given, TrainedParams) else None
    if standardize == "auto":
        standardize = given is None
    else:
        known = None
    return prepare(
        network, X, y, num_classes=num_classes, standardize=bool(standardize), scaling=known, earlier=earlier
    )


@jax.jit
def _stage_keys(key: Key):
    key_train, key_sample, key_folds = jax.random.split(key, 3)
    return key_train, key_sample, jax.random.bits(key_folds)


def _trained(
    plan: Plan, key: Key, seed: int, options: PretrainingOptions, report: Report, checkpoint: Checkpoint | None
):
    """Weights and frozen state: those given, those a checkpoint holds, or those of the deterministic stage."""
    rows = plan.prepared.rows
    if plan.warm is not None:
        return plan.weights, plan.warm.source.state, None
    if plan.weights is not None:
        state = _initial_state(plan.network, key, rows.x)
        _warn_of_units(plan, state)
        return plan.weights, state, None
    if checkpoint is not None:
        kept = resuming.load_trained(checkpoint, plan.template, jax.eval_shape(plan.network.init, key, rows.x[:1])[1])
        if kept is not None:
            return kept.params, kept.state, kept
    burn_in = 0.5 if plan.select_config is None else plan.select_config.burn_in
    options = dataclasses.replace(options, track_statistics=plan.needs_statistics, burn_in=burn_in)
    # The search compares losses at noise of one target's spread; classes have no noise.
    noise_std = _target_scale(rows) if plan.likelihood.is_regression else np.ones(1, np.float32)
    pretrained = pretrain(
        plan.network, plan.likelihood, key, rows, noise_std,
        options, seed=seed, on_progress=lambda done, total, loss: report("training", done, total, f"loss {loss:.4g}"),
    )  # fmt: skip
    if checkpoint is not None:
        resuming.save_trained(checkpoint, pretrained)
    return pretrained.params, pretrained.state, pretrained


def _warn_of_units(plan: Plan, state: State) -> None:
    """Given weights that predict worse than the mean were probably trained in other units."""
    rows = plan.prepared.rows
    if not plan.likelihood.is_regression:
        return
    outputs = predictive.deterministic_outputs(plan.network, plan.weights, state, np.asarray(rows.x))
    real = np.asarray(rows.real) > 0
    error = np.sqrt(np.mean((outputs - np.asarray(rows.y))[real] ** 2))
    spread = np.sqrt(np.mean(_target_scale(rows) ** 2))
    if error > 2.0 * spread:
        warnings.warn(
            f"the given weights predict y with an error of {error:.3g}, more than twice its spread of {spread:.3g}. If "
            "they were trained on standardised data, pass standardize=True, or DeterministicNN.get_params(), which "
            "remembers its units.",
            UnitsWarning,
            stacklevel=5,
        )


@functools.partial(jax.jit, static_argnums=0)
def _initial_state(network: Network, key: Key, x: Any) -> State:
    return network.init(key, x[:1])[1]


def _target_scale(rows: Any) -> np.ndarray:
    """Standard deviation of the targets in working units: one when they are standardised, else that of the user's."""
    return priors.target_scale(np.asarray(rows.y), np.asarray(rows.real))


def _choose(plan: Plan, key: Key, params: Params, state: State, pretrained: Pretrained | None) -> RandomPart:
    """The random part of the trained network."""
    statistics, sigma = plan.statistics, None
    if pretrained is not None:
        statistics, sigma = pretrained.statistics, pretrained.sigma
    regression = plan.likelihood.is_regression
    noise = _starting_noise(plan, params, state, pretrained) if regression else np.ones(1, np.float32)
    trained = Trained(
        plan.network, params, state, plan.prepared.rows, plan.likelihood, noise,
        0.0 if sigma is None else 1.0 / sigma**2, statistics,
    )  # fmt: skip
    return choose(plan.choice, plan.select_config, trained, key, plan.priors_sigma)


def _density(plan: Plan, partition: RandomPart, params: Params, state: State, pretrained: Pretrained | None):
    """The log density of the Bayesian part, and the position of the trained weights."""
    rows = plan.prepared.rows
    prior = priors.weight_prior(partition, params, plan.priors_sigma, plan.prior_mean)
    density = log_density.build(
        plan.network, partition, params, state, rows.x, rows.y, rows.real,
        likelihood=plan.likelihood, prior=prior, noise_prior=plan.noise_prior,
    )  # fmt: skip
    if density.form.hoisted.recomputes:
        warnings.warn(
            f"the frozen part's results for {plan.prepared.num_rows} rows exceed the memory budget of "
            f"{row_blocks.CARRY_BUDGET_BYTES / 2**30:.1f} GiB, so the whole network runs for every gradient. Make "
            "layers nearer the output Bayesian, or give fewer rows.",
            MemoryBudgetWarning,
            stacklevel=4,
        )
    theta = np.asarray(priors.split(partition, params))
    if not density.form.num_noise:
        return density, theta
    noise = _starting_noise(plan, params, state, pretrained)
    unconstrained = log_density.unconstrain_noise(noise, plan.noise_prior)
    # A prior with bounds need not hold the observed error: its middle does.
    return density, np.concatenate([theta, np.where(np.isfinite(unconstrained), unconstrained, 0.0)])


def _starting_noise(plan: Plan, params: Params, state: State, pretrained: Pretrained | None) -> np.ndarray:
    """The error of the trained network: on unseen rows where a search measured it, else on the training rows."""
    rows, scale = plan.prepared.rows, _target_scale(plan.prepared.rows)
    if pretrained is not None and pretrained.search is not None and pretrained.search.unseen_rmse is not None:
        return np.maximum(pretrained.search.unseen_rmse, MIN_NOISE_START * scale)
    outputs = predictive.deterministic_outputs(plan.network, params, state, np.asarray(rows.x))
    real = np.asarray(rows.real) > 0
    residual = (outputs - np.asarray(rows.y))[real]
    return np.clip(np.sqrt(np.mean(residual**2, axis=0)), MIN_NOISE_START * scale, None)


def _as_numpy(pretrained: Pretrained | None) -> Pretrained | None:
    """The deterministic stage with its arrays on the host, so that a fitted model can be pickled."""
    if pretrained is None:
        return None
    params, state = jax.tree.map(np.asarray, (pretrained.params, pretrained.state))
    return dataclasses.replace(pretrained, params=params, state=state)
