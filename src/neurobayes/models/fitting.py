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
from ..data import Scaling
from ..diagnostics import Diagnostics, diagnose
from ..errors import MemoryBudgetWarning, OptionError, unknown_choice
from ..inference.base import Engine, RunControl
from ..likelihoods import Categorical, Gaussian, Likelihood
from ..networks.base import Network
from ..posterior import Posterior
from ..predictive import Source
from ..pretraining import Pretrained, PretrainingOptions, pretrain
from ..schedules import AveragingConfig, LearningRate
from ..subspaces import RandomPart
from .base import Prepared, TrainedParams, network_info, prepare
from .choosing import Trained, check, choose
from .deterministic import DeterministicNN
from .progress import Report

NUM_REFERENCE_ROWS = 64
"""Training rows at which convergence of the predicted function is judged."""

MIN_NOISE_START = 1e-3


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from the posterior."""

    engine: Engine
    num_warmup: int
    num_samples: int
    num_chains: int

    @classmethod
    def from_user(
        cls, engine: Any, chain_method: str, num_warmup: int, num_samples: int, num_chains: int
    ) -> "Sampling":
        """Checked options; without an engine, exact draws where they are possible, else NUTS."""
        for name, count in (("num_warmup", num_warmup), ("num_samples", num_samples), ("num_chains", num_chains)):
            _checks.check_positive_int(name, count)
        from ..inference import ENGINES

        engine = "auto" if engine is None else engine
        if isinstance(engine, str):
            if engine not in ENGINES:
                raise unknown_choice("engine", engine, ENGINES)
            config: Any = ENGINES[engine]
            has_method = "chain_method" in (field.name for field in dataclasses.fields(config))
            engine = config(chain_method=chain_method) if has_method else config()
        elif not isinstance(engine, Engine):
            raise OptionError(
                f"engine must be one of {', '.join(ENGINES)}, or a config such as nb.inference.NUTS(); got {engine!r}."
            )
        return cls(engine, num_warmup, num_samples, num_chains)


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
) -> Plan:
    """Check data, weights and choices against the network; raises before any training starts."""
    if isinstance(given, DeterministicNN):
        given = given.get_params()
    elif given is None:
        given = network.pretrained
    prepared = _prepare(network, X, y, num_classes, standardize, given)
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
        bool(asked), noise_prior, prior_mean, priors_sigma,
    )  # fmt: skip


def run(plan: Plan, key: Key, options: PretrainingOptions, sampling: Sampling, report: Report) -> Fitted:
    """Train, choose, sample and judge."""
    started = time.perf_counter()
    key_train, key_sample, seed = _stage_keys(key)
    params, state, pretrained = _trained(plan, key_train, int(seed), options, report)
    trained = time.perf_counter()
    partition = _choose(plan, jax.random.fold_in(key_train, 1), params, state, pretrained)
    density, start = _density(plan, partition, params, state, pretrained)
    posterior = _sample(sampling, key_sample, density, start, report)
    noise_std = _noise(density, posterior)
    params, state = jax.tree.map(np.asarray, (params, state))
    source = Source(plan.network, partition, params, state, posterior.flat_draws[:, : partition.size], noise_std)
    diagnostics = _judge(plan.prepared, source, posterior)
    seconds = {"training": trained - started, "sampling": time.perf_counter() - trained}
    prepared = plan.prepared
    return Fitted(
        source, posterior, prepared.scaling, prepared.row_shape, prepared.target_ndim, _as_numpy(pretrained),
        diagnostics, seconds,
    )  # fmt: skip


def _prepare(network: Network, X: Any, y: Any, num_classes: int | None, standardize: Any, given: Any) -> Prepared:
    """Scaled data: in the units of given weights where these are known, and in the user's where they are not."""
    known = given.scaling if isinstance(given, TrainedParams) else None
    if standardize == "auto":
        return prepare(network, X, y, num_classes=num_classes, standardize=given is None, scaling=known)
    return prepare(network, X, y, num_classes=num_classes, standardize=bool(standardize))


@jax.jit
def _stage_keys(key: Key):
    key_train, key_sample, key_folds = jax.random.split(key, 3)
    return key_train, key_sample, jax.random.bits(key_folds)


def _trained(plan: Plan, key: Key, seed: int, options: PretrainingOptions, report: Report):
    """Weights and frozen state: those given, or those of the deterministic stage."""
    rows = plan.prepared.rows
    if plan.weights is not None:
        return plan.weights, _initial_state(plan.network, key, rows.x), None
    options = dataclasses.replace(options, track_statistics=plan.needs_statistics)
    # The search compares losses at noise of one target's spread; classes have no noise.
    noise_std = _target_scale(rows) if plan.likelihood.is_regression else np.ones(1, np.float32)
    pretrained = pretrain(
        plan.network, plan.likelihood, key, rows, noise_std,
        options, seed=seed, on_progress=lambda done, total, loss: report("training", done, total, f"loss {loss:.4g}"),
    )  # fmt: skip
    return pretrained.params, pretrained.state, pretrained


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
    return density, np.concatenate([theta, log_density.unconstrain_noise(noise, plan.noise_prior)])


def _starting_noise(plan: Plan, params: Params, state: State, pretrained: Pretrained | None) -> np.ndarray:
    """The error of the trained network: on unseen rows where a search measured it, else on the training rows."""
    rows, scale = plan.prepared.rows, _target_scale(plan.prepared.rows)
    if pretrained is not None and pretrained.search is not None and pretrained.search.unseen_rmse is not None:
        return np.maximum(pretrained.search.unseen_rmse, MIN_NOISE_START * scale)
    outputs = predictive.deterministic_outputs(plan.network, params, state, np.asarray(rows.x))
    real = np.asarray(rows.real) > 0
    residual = (outputs - np.asarray(rows.y))[real]
    return np.clip(np.sqrt(np.mean(residual**2, axis=0)), MIN_NOISE_START * scale, None)


def _sample(sampling: Sampling, key: Key, density: log_density.LogDensity, start: np.ndarray, report: Report):
    """Draws from the engine; a density without any random scalar needs none."""
    if density.size == 0:
        shape = (sampling.num_chains, sampling.num_samples)
        return Posterior(np.zeros((*shape, 0), np.float32), {"diverging": np.zeros(shape, bool)}, {"engine": "none"})
    return sampling.engine.run(
        key, density, start, num_warmup=sampling.num_warmup, num_samples=sampling.num_samples,
        num_chains=sampling.num_chains, control=RunControl(on_progress=report),
    )  # fmt: skip


def _noise(density: log_density.LogDensity, posterior: Posterior) -> np.ndarray:
    """Noise standard deviation of each draw, (draws, outputs), in working units; empty for classes."""
    if not density.form.num_noise:
        return np.zeros((len(posterior.flat_draws), 0), np.float32)
    return np.asarray(log_density.constrain_noise(posterior.flat_draws[:, density.form.num_theta :],
                                                  density.terms.noise_prior))  # fmt: skip


def _judge(prepared: Prepared, source: Source, posterior: Posterior) -> Diagnostics:
    """Convergence of predicted values at reference rows, and of the noise."""
    chosen = np.unique(np.linspace(0, prepared.num_rows - 1, NUM_REFERENCE_ROWS).astype(int))
    values = predictive.function_draws(source, np.asarray(prepared.rows.x)[chosen], source.theta)
    values = values.reshape(posterior.num_chains, posterior.num_draws, -1)
    noise = source.noise_std.reshape(posterior.num_chains, posterior.num_draws, -1)
    quantities, info = np.concatenate([values, noise], axis=-1), posterior.info
    return diagnose(
        quantities, posterior.stats, info.get("max_tree_depth", 10), independent=info.get("independent", False)
    )


def _as_numpy(pretrained: Pretrained | None) -> Pretrained | None:
    """The deterministic stage with its arrays on the host, so that a fitted model can be pickled."""
    if pretrained is None:
        return None
    params, state = jax.tree.map(np.asarray, (pretrained.params, pretrained.state))
    return dataclasses.replace(pretrained, params=params, state=state)
