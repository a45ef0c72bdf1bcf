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

from .. import _checks, log_density, predictive, priors, row_blocks, selection, selectors, trees
from .._keys import as_seed, children
from .._threads import side_by_side
from .._typing import Key, Params
from ..backbones import Backbones
from ..checkpoint import Checkpoint
from ..data import Scaling
from ..diagnostics import Diagnostics, combine
from ..errors import MemoryBudgetWarning, OptionError
from ..inference import last_layer
from ..inference.base import Engine
from ..inference.empirical_prior import learn_scales
from ..likelihoods import Gaussian, Likelihood
from ..mixture import Mixture, member_moments, member_probabilities
from ..networks.base import Network
from ..out_of_fold import OutOfFold, calibrate_temperature, calibrate_variance
from ..partition import Partition
from ..posterior import Posterior, joined
from ..predictive import Source
from ..pretraining import Pretrained, PretrainingOptions
from ..schedules import AveragingConfig, LearningRate
from ..subspaces import RandomPart
from . import deterministic_stage, resuming
from .base import Prepared, TrainedParams, abstract_key, network_info, prepare
from .choosing import Trained, check, choose
from .deterministic import DeterministicNN
from .deterministic_stage import Stage
from .noise import check_engine, likelihood_of, noise_prior_of
from .progress import Report
from .sampling import Sampling, judge, on_host, sample, stopping_rule, with_draws

MOST_SIDE_BY_SIDE = 2**22
"""Most entries of a design matrix with which exact posteriors of several backbones are solved at once."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One backbone with the draws of its Bayesian part."""

    source: Source
    posterior: Posterior
    diagnostics: Diagnostics


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Everything a fit leaves behind."""

    members: tuple[Member, ...]
    parts: np.ndarray
    ensemble: Backbones | None
    out_of_fold: OutOfFold | None
    pretrained: Pretrained | None
    scaling: Scaling
    row_shape: tuple[int, ...]
    target_ndim: int
    diagnostics: Diagnostics
    seconds: dict[str, float]
    capacity: int
    num_rows: int
    columns: tuple[str, ...] | None
    seed: int
    row_hashes: np.ndarray

    @property
    def mixture(self) -> Mixture:
        """The backbones as one distribution, without any calibration."""
        weights = np.ones(1) if self.out_of_fold is None else self.out_of_fold.weights
        return Mixture(tuple(member.source for member in self.members), self.parts, weights)

    @functools.cached_property
    def posterior(self) -> Posterior:
        """The draws of all backbones, the chains of one after those of another."""
        return joined([member.posterior for member in self.members])


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
    noise_is_default: bool
    prior_mean: str
    priors_sigma: float | Mapping[str, float]
    learns_prior: bool
    template: Params
    num_backbones: int
    exact: Partition | None
    noise_varies: bool
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
    num_backbones: int | str = 1,
    engine: Engine | None = None,
    noise: str = "constant",
    previous: Fitted | None = None,
    warm: bool = False,
    room_for: int | None = None,
) -> Plan:
    """Check data, weights and choices against the network; raises before any training starts.

    ``previous`` is an earlier fit, whose padding is kept where a few rows were
    added; with ``warm`` its weights, units and sampler are what the fit starts from.
    ``room_for`` is the most rows that later fits will have.
    """
    likelihood = likelihood_of(noise, num_classes)
    check_engine(engine, likelihood)
    layout = {"num_classes": num_classes, "outputs_per_target": likelihood.outputs_per_target, "room_for": room_for}
    prepared, given = _data_and_weights(network, X, y, standardize, given, previous, warm, layout)
    example = jax.ShapeDtypeStruct((1, *prepared.rows.x.shape[1:]), prepared.rows.x.dtype)
    info = network_info(network, example)
    template, _ = jax.eval_shape(network.init, abstract_key(), example)
    weights = None if given is None else _checks.check_weights_structure(given, template)
    statistics = getattr(given, "statistics", None)
    learns_prior = isinstance(priors_sigma, str)
    if learns_prior:
        _checks.check_one_of("priors_sigma", priors_sigma, ("auto",))
        priors_sigma = 1.0
    priors.prior_std_by_leaf(list(trees.shapes(template)), priors_sigma)
    config = None if select_config is None else selection.validate_select_config(select_config, info)
    asked = check(choice, config, info, template, priors_sigma)
    if asked and weights is not None and statistics is None:
        raise OptionError(
            f"a choice by {', '.join(sorted(asked))} needs the statistics of a training run, but the given weights "
            "came without any. Pass DeterministicNN.get_params(), or choose by 'magnitude', 'fisher' or "
            "'laplace_variance'."
        )
    gaussian = type(likelihood) is Gaussian
    bayesian = deterministic_stage.foresee(
        network, prepared.rows.x, template, choice, config, info, engine, gaussian=gaussian
    )
    count = 1
    if weights is not None and not warm and num_backbones not in ("auto", 1):
        raise OptionError(
            f"num_backbones={num_backbones} asks for networks trained here, and the weights are given, by "
            "deterministic_weights= or by the network itself. Leave num_backbones out."
        )
    if weights is None:
        count = deterministic_stage.how_many(network, prepared, num_backbones, bayesian)
    return Plan(
        network=network,
        prepared=prepared,
        likelihood=likelihood,
        choice=choice,
        select_config=config,
        weights=weights,
        statistics=statistics,
        needs_statistics=bool(asked),
        noise_prior=noise_prior_of(noise_prior, likelihood, prepared),
        noise_is_default=noise_prior is None,
        prior_mean=prior_mean,
        priors_sigma=priors_sigma,
        learns_prior=learns_prior,
        template=template,
        num_backbones=count,
        exact=bayesian.exact,
        noise_varies=noise == "varying",
        warm=previous if warm else None,
    )


def _data_and_weights(
    network: Network, X: Any, y: Any, standardize: bool | str, given: Any, previous: Fitted | None, warm: bool,
    layout: Mapping[str, Any],
) -> tuple[Prepared, Any]:  # fmt: skip
    """Scaled data, and the weights that are given: by the user, by the network, or by the fit to be continued."""
    if isinstance(given, DeterministicNN):
        given = given.get_params()
    elif given is None:
        given = network.pretrained
    earlier = None if previous is None else (previous.num_rows, previous.capacity)
    if warm and previous is not None:
        prepared = prepare(network, X, y, standardize=True, scaling=previous.scaling, earlier=earlier, **layout)
        return prepared, previous.members[0].source.params
    return _prepare(network, X, y, standardize, given, earlier, layout), given


def run(plan: Plan, key: Key, options: PretrainingOptions, sampling: Sampling, report: Report) -> Fitted:
    """Train, choose, sample and judge."""
    started = time.perf_counter()
    checkpoint = None
    if sampling.checkpoint_dir is not None:
        checkpoint = Checkpoint(sampling.checkpoint_dir, resuming.run_identity(plan, key, options, sampling))
    if checkpoint is None or not resuming.is_trained(checkpoint):
        _compile_ahead(plan, key, options)
    key_train, key_sample, key_folds = children(key, 3)
    seed = as_seed(key_folds) if plan.warm is None else plan.warm.seed
    stage = deterministic_stage.train(plan, key_train, seed, options, report, checkpoint)
    trained = time.perf_counter()
    share = sampling.shared(len(stage.params), exact=plan.exact is not None)
    arguments = plan, stage, key_train, key_sample, share, report, checkpoint
    first = _sample_member(0, *arguments)
    others = [(number, *arguments) for number in range(1, len(stage.params))]
    work = first.posterior.draws.shape[-1] * plan.prepared.num_rows
    if first.posterior.info.get("engine") == "last_layer" and work <= MOST_SIDE_BY_SIDE:
        members = (first, *side_by_side(_sample_member, others, compiled=True))
    else:  # samplers keep all cores busy by themselves, and large designs the memory
        members = (first, *(_sample_member(*each) for each in others))
    prepared = plan.prepared
    out_of_fold = None if stage.ensemble is None else _calibrate(plan, members, stage)
    seconds = {"training": trained - started, "sampling": time.perf_counter() - trained}
    return Fitted(
        members=members,
        parts=stage.parts,
        ensemble=stage.ensemble,
        out_of_fold=out_of_fold,
        pretrained=_as_numpy(stage.pretrained[0]),
        scaling=prepared.scaling,
        row_shape=prepared.row_shape,
        target_ndim=prepared.target_ndim,
        diagnostics=combine([member.diagnostics for member in members]),
        seconds=seconds,
        capacity=len(prepared.rows.real),
        num_rows=prepared.num_rows,
        columns=prepared.columns,
        seed=seed,
        row_hashes=deterministic_stage.training_row_hashes(prepared),
    )


def _sample_member(
    number: int,
    plan: Plan,
    stage: Stage,
    key_train: Key,
    key_sample: Key,
    sampling: Sampling,
    report: Report,
    checkpoint: Checkpoint | None,
) -> Member:
    """The Bayesian part of one backbone."""
    params = stage.params[number]
    warm = None if plan.warm is None else plan.warm.members[number]
    if len(stage.params) > 1:
        key_sample = children(key_sample, len(stage.params))[number]
        if checkpoint is not None:
            checkpoint = Checkpoint(checkpoint.folder / f"backbone-{number:02d}", checkpoint.fingerprint)
    noise = stage.starting_noise(plan, number)
    if warm is None:
        partition = _choose(plan, children(key_train, 2)[1], stage, number, noise)
    else:
        partition = warm.source.partition
    if checkpoint is not None:
        resuming.check_choice(checkpoint, partition)
    density, start = _density(plan, partition, params, stage, number, noise)
    source = Source(
        plan.network, partition, params, stage.state, np.zeros((0, partition.size)), np.zeros((0, 0)),
        noise_outputs=plan.prepared.num_outputs if plan.likelihood.outputs_per_target > 1 else 0,
    )  # fmt: skip
    posterior = sample(
        sampling, key_sample, density, start, checkpoint=checkpoint, report=report,
        is_enough=stopping_rule(sampling, plan.prepared, source, density),
        warm_start=None if warm is None else warm.posterior.adaptation,
    )  # fmt: skip
    source = on_host(with_draws(source, density, posterior.flat_draws))._replace(analytic=posterior.analytic)
    if plan.learns_prior:
        posterior.info["priors_sigma"] = _prior_stds(partition, density)
    return Member(source, posterior, judge(plan.prepared, source, posterior, len(stage.params)))


def _calibrate(plan: Plan, members: tuple[Member, ...], stage: Stage) -> OutOfFold:
    """What the rows that each backbone left out say about the variance of the whole."""
    rows, real = plan.prepared.rows, np.asarray(plan.prepared.rows.real) > 0
    y, unseen = np.asarray(rows.y)[real], stage.row_weights[:, real] == 0
    mixture = Mixture(tuple(member.source for member in members), stage.parts, np.ones(1))
    if plan.likelihood.is_regression:
        mean, variance, noise = member_moments(mixture, np.asarray(rows.x))
        x = np.asarray(rows.x)[real] if plan.noise_varies else None
        noise = noise[:, real] if mixture.sources[0].noise_outputs else None
        return calibrate_variance(mean[:, real], variance[:, real], unseen, stage.parts, y.astype(float), x, noise)
    return calibrate_temperature(member_probabilities(mixture, np.asarray(rows.x))[0][:, real], unseen, y)


def _prepare(
    network: Network, X: Any, y: Any, standardize: Any, given: Any, earlier: tuple[int, int] | None,
    layout: Mapping[str, Any],
) -> Prepared:  # fmt: skip
    """Scaled data: in the units of given weights where these are known, and in the user's where they are not."""
    known = given.scaling if isinstance(given, TrainedParams) else None
    if standardize == "auto":
        standardize = given is None
    else:
        known = None
    return prepare(network, X, y, standardize=bool(standardize), scaling=known, earlier=earlier, **layout)


def _choose(plan: Plan, key: Key, stage: Stage, number: int, noise: np.ndarray) -> RandomPart:
    """The random part of a trained network; rows that it left out have no say."""
    statistics, sigma, pretrained = plan.statistics, None, stage.pretrained[number]
    rows = plan.prepared.rows._replace(real=stage.row_weights[number])
    if pretrained is not None:
        statistics, sigma = pretrained.statistics, pretrained.sigma
    trained = Trained(
        plan.network, stage.params[number], stage.state, rows, plan.likelihood, noise,
        0.0 if sigma is None else 1.0 / sigma**2, statistics,
    )  # fmt: skip
    return choose(plan.choice, plan.select_config, trained, key, plan.priors_sigma)


def _density(plan: Plan, partition: RandomPart, params: Params, stage: Stage, number: int, noise: np.ndarray):
    """The log density of a backbone's Bayesian part given the rows it was trained on, and the trained position."""
    rows = plan.prepared.rows
    noise_prior = plan.noise_prior if stage.ensemble is None else _ensemble_noise_prior(plan, noise)
    prior = priors.weight_prior(partition, params, plan.priors_sigma, plan.prior_mean)
    density = log_density.build(
        plan.network, partition, params, stage.state, rows.x, rows.y, stage.row_weights[number],
        likelihood=plan.likelihood, prior=prior, noise_prior=noise_prior,
    )  # fmt: skip
    if density.form.hoisted.recomputes and number == 0:
        warnings.warn(
            f"the frozen part's results for {plan.prepared.num_rows} rows exceed the memory budget of "
            f"{row_blocks.CARRY_BUDGET_BYTES / 2**30:.1f} GiB, so the whole network runs for every gradient. Make "
            "layers nearer the output Bayesian, or give fewer rows.",
            MemoryBudgetWarning,
            stacklevel=5,
        )
    start = np.asarray(priors.split(partition, params))
    if density.form.num_noise:
        unconstrained = log_density.unconstrain_noise(noise, noise_prior)
        # A prior with bounds need not hold the observed error: its middle does.
        start = np.concatenate([start, np.where(np.isfinite(unconstrained), unconstrained, 0.0)])
    if plan.learns_prior and density.form.num_theta:
        factors = learn_scales(density, jax.random.key(number), start)
        blocks = density.form.blocks or (density.form.num_theta,)
        std = (prior.std * np.repeat(factors, blocks)).astype(np.float32)
        density = dataclasses.replace(density, terms=density.terms._replace(prior=prior._replace(std=std)))
    return density, start


def _ensemble_noise_prior(plan: Plan, noise: np.ndarray) -> Any:
    """A backbone's own rows would say that there is hardly any noise: it has learnt them. Others measured it."""
    if not plan.noise_is_default or plan.noise_prior is None:
        return plan.noise_prior
    return priors.known_noise_prior(noise, plan.prepared.num_rows)


def _compile_ahead(plan: Plan, key: Key, options: PretrainingOptions) -> None:
    """Compile what the exact posterior of each backbone and its predictions will run, while a core compiles training.

    Elsewhere, where nothing is compiled beside, all is compiled when it is first run.
    """
    partition = plan.exact
    if not deterministic_stage.compile_ahead(plan, key, options) or partition is None:
        return
    rows, num_outputs = plan.prepared.rows, plan.prepared.num_outputs
    state = deterministic_stage.state_template(plan.network, rows.x)
    hoisted = row_blocks.compile_ahead(plan.network, partition, plan.template, state, rows.x)
    noise = np.ones(num_outputs, np.float32)
    noise_prior = plan.noise_prior if plan.num_backbones == 1 else _ensemble_noise_prior(plan, noise)
    if hoisted is not None:
        last_layer.compile_ahead(hoisted, partition.size, len(rows.real), num_outputs, noise_prior)
    source = Source(plan.network, partition, plan.template, state, np.zeros((0, 0)), np.zeros((0, num_outputs)))
    predictive.compile_analytic(source, rows.x)


def _prior_stds(partition: RandomPart, density: log_density.LogDensity) -> dict[str, float]:
    """The learnt prior standard deviation of each leaf's Bayesian weights; of a subspace, that of its coordinates."""
    blocks = density.form.blocks or (density.form.num_theta,)
    first = np.cumsum((0, *blocks[:-1]))
    std = np.asarray(density.terms.prior.std)
    names = [path for path, count in partition.counts().items() if count] if density.form.blocks else ["subspace"]
    return {name: float(std[at]) for name, at in zip(names, first, strict=True)}


def _as_numpy(pretrained: Pretrained | None) -> Pretrained | None:
    """The deterministic stage with its arrays on the host, so that a fitted model can be pickled."""
    if pretrained is None:
        return None
    params, state = jax.tree.map(np.asarray, (pretrained.params, pretrained.state))
    return dataclasses.replace(pretrained, params=params, state=state)
