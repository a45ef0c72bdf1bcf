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

from .. import _checks, _weight_checks, left_out, predictive, priors, row_blocks, selection, selectors, trees
from .._keys import as_seed, children
from .._typing import Key, Params
from ..backbones import Backbones
from ..checkpoint import Checkpoint
from ..data import Scaling
from ..diagnostics import Diagnostics, combine
from ..errors import CalibrationWarning, OptionError
from ..inference import last_layer
from ..inference.base import Engine
from ..likelihoods import Gaussian, Likelihood
from ..mixture import Mixture, member_moments, member_probabilities
from ..networks.base import Network
from ..out_of_fold import OutOfFold, calibrate_temperature, calibrate_variance
from ..partition import Partition
from ..posterior import Posterior, joined
from ..predictive import Source
from ..pretraining import Pretrained, PretrainingOptions
from ..schedules import AveragingConfig, LearningRate
from . import deterministic_stage, extent, resuming
from .base import Prepared, TrainedParams, abstract_key, check_rows, network_info, prepare
from .choosing import check
from .deterministic import DeterministicNN
from .deterministic_stage import Stage
from .members import Member, ensemble_noise_prior, sample_members
from .noise import check_engine, likelihood_of, noise_prior_of
from .progress import Report
from .sampling import Sampling

MOST_OF_ONE_GROUP = 0.5
"""A group with a larger share of the rows is warned of."""


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
    groups: np.ndarray | None

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
    from_inputs: bool
    most_rows: int
    noise_varies: bool
    may_compress: bool = False
    untrained: bool = False
    warm: Fitted | None = None


def pretraining_options(
    epochs: Any, rate: LearningRate | None, batch_size: Any, swa_config: Any, sigma: Any, *, least_epochs: int = 1
) -> PretrainingOptions:
    """Checked options of the deterministic stage."""
    for name, value, least in (("sgd_epochs", epochs, least_epochs), ("sgd_batch_size", batch_size, 1)):
        if value is not None:
            _checks.check_positive_int(name, value, minimum=least)
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
    groups: Any = None,
    untrained: bool = False,
    previous: Fitted | None = None,
    warm: bool = False,
    room_for: int | None = None,
) -> Plan:
    """Check data, weights and choices against the network; raises before any training starts.

    ``previous`` is an earlier fit, whose padding is kept where a few rows were
    added; with ``warm`` its weights, units and sampler are what the fit starts from.
    ``room_for`` is the most rows that later fits will have. With ``untrained``
    the weights keep their initial values, unless they are given. ``groups`` are
    the labels of what is left out together.
    """
    likelihood = likelihood_of(noise, num_classes)
    check_engine(engine, likelihood)
    layout = {"num_classes": num_classes, "outputs_per_target": likelihood.outputs_per_target, "room_for": room_for}
    prepared, given = _data_and_weights(network, X, y, standardize, given, previous, warm, layout)
    if groups is not None:
        prepared = prepared._replace(groups=left_out.as_groups(groups, prepared.num_rows))
    example = jax.ShapeDtypeStruct((1, *prepared.rows.x.shape[1:]), prepared.rows.x.dtype)
    info = network_info(network, example)
    template, _ = jax.eval_shape(network.init, abstract_key(), example)
    weights = None if given is None else _weight_checks.check_weights_structure(given, template)
    statistics = getattr(given, "statistics", None)
    priors_sigma, learns_prior = _prior_scale(priors_sigma, template)
    config = None if select_config is None else selection.validate_select_config(select_config, info)
    asked = check(choice, config, info, template, priors_sigma)
    untrained = untrained and weights is None
    if weights is not None:
        _check_given(asked, statistics, 1 if warm else num_backbones)
    elif untrained:
        _check_untrained(asked, num_backbones, prior_mean)
    bayesian = extent.foresee(
        network, prepared.rows.x, template, choice, config, info, engine, gaussian=type(likelihood) is Gaussian
    )
    single = weights is not None or untrained
    count = 1 if single else extent.how_many(network, prepared, num_backbones, bayesian, room_for)
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
        from_inputs=bayesian.from_inputs,
        most_rows=max(prepared.num_rows, room_for or 0),
        noise_varies=noise == "varying",
        may_compress=standardize == "auto" and not single,
        untrained=untrained,
        warm=previous if warm else None,
    )


def _prior_scale(priors_sigma: Any, template: Params) -> tuple[Any, bool]:
    """The prior scale of the Bayesian weights, checked, and whether it is only where learning it starts."""
    learns = isinstance(priors_sigma, str)
    if learns:
        _checks.check_one_of("priors_sigma", priors_sigma, ("auto",))
        priors_sigma = 1.0
    priors.prior_std_by_leaf(list(trees.shapes(template)), priors_sigma)
    return priors_sigma, learns


def _check_given(asked: set[str], statistics: Any, num_backbones: int | str) -> None:
    """Raise where given weights cannot serve: scores of a training are asked for, or several networks."""
    if asked and statistics is None:
        raise OptionError(
            f"a choice by {', '.join(sorted(asked))} needs the statistics of a training run, but the given weights "
            "came without any. Pass DeterministicNN.get_params(), or choose by 'magnitude', 'fisher' or "
            "'laplace_variance'."
        )
    if num_backbones not in ("auto", 1):
        raise OptionError(
            f"num_backbones={num_backbones} asks for networks trained here, and the weights are given, by "
            "deterministic_weights= or by the network itself. Leave num_backbones out."
        )


def _check_untrained(asked: set[str], num_backbones: int | str, prior_mean: str) -> None:
    """Raise where a network that is not trained cannot serve."""
    if asked:
        raise OptionError(
            f"a choice by {', '.join(sorted(asked))} needs the statistics of a training run, and sgd_epochs=0 trains "
            "nothing. Give sgd_epochs of at least 1, or choose layers or weights by name."
        )
    if num_backbones not in ("auto", 1):
        raise OptionError(
            f"num_backbones={num_backbones} asks for networks trained on different rows, and sgd_epochs=0 trains none. "
            "Leave num_backbones out."
        )
    if prior_mean == "map":
        raise OptionError(
            "prior_mean='map' centres the prior at trained values, and sgd_epochs=0 trains none. Pass "
            "prior_mean='zero'."
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
        check_rows(X, network, previous.columns, previous.row_shape)
        prepared = prepare(network, X, y, standardize=True, scaling=previous.scaling, earlier=earlier, **layout)
        return prepared, previous.members[0].source.params
    return _prepare(network, X, y, standardize, given, earlier, layout), given


def check_groups(plan: Plan, options: PretrainingOptions) -> None:
    """Raise where groups are given and nothing is left out; warn of a group that is most of the rows."""
    given = plan.weights is not None and (plan.warm is None or plan.warm.ensemble is None)
    searched = options.sigma == "auto" or options.epochs is None
    if plan.prepared.groups is not None and (given or plan.untrained or (plan.num_backbones == 1 and not searched)):
        raise OptionError(
            "groups says which rows are left out together, and nothing is left out here: a single network is given, or "
            "trained with map_sigma and sgd_epochs given. Leave groups out, or train several backbones."
        )
    share = 0.0 if plan.prepared.groups is None else np.bincount(plan.prepared.groups).max() / plan.prepared.num_rows
    if share > MOST_OF_ONE_GROUP:
        warnings.warn(
            f"one of the groups has {share:.0%} of the rows: networks that leave it out learn from the few others, and "
            "what they say of it decides the intervals of all. Divide it, or leave groups out.",
            CalibrationWarning,
            stacklevel=3,
        )


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
    plan = dataclasses.replace(plan, prepared=stage.prepared)
    deterministic_stage.warn_of_rate(plan, stage, options.learning_rate)
    trained = time.perf_counter()
    members = sample_members(plan, stage, key_train, key_sample, sampling, report, checkpoint)
    prepared = plan.prepared
    out_of_fold = None if stage.ensemble is None else _calibrate(plan, members, stage, stage.ensemble)
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
        groups=prepared.groups,
    )


def _calibrate(plan: Plan, members: tuple[Member, ...], stage: Stage, ensemble: Backbones) -> OutOfFold:
    """What the rows that each backbone left out say about the variance of the whole."""
    rows, real = plan.prepared.rows, np.asarray(plan.prepared.rows.real) > 0
    x, y, unseen = np.asarray(rows.x), np.asarray(rows.y)[real], stage.row_weights[:, real] == 0
    groups = left_out.num_groups(x[real], ensemble.whole_inputs, plan.prepared.groups)
    mixture = Mixture(tuple(member.source for member in members), stage.parts, np.ones(1))
    if plan.likelihood.is_regression:
        mean, variance, noise = member_moments(mixture, x)
        columns = x[real] if plan.noise_varies else None
        noise = noise[:, real] if mixture.sources[0].noise_outputs else None
        return calibrate_variance(
            mean[:, real], variance[:, real], unseen, stage.parts, y.astype(float), columns, noise, groups
        )
    return calibrate_temperature(member_probabilities(mixture, x)[0][:, real], unseen, y, groups)


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
    return prepare(network, X, y, standardize=standardize, scaling=known, earlier=earlier, **layout)


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
    noise_prior = plan.noise_prior if plan.num_backbones == 1 else ensemble_noise_prior(plan, noise)
    if hoisted is not None:
        last_layer.compile_ahead(hoisted, partition.size, len(rows.real), num_outputs, noise_prior)
    source = Source(plan.network, partition, plan.template, state, np.zeros((0, 0)), np.zeros((0, num_outputs)))
    predictive.compile_analytic(source, rows.x)


def _as_numpy(pretrained: Pretrained | None) -> Pretrained | None:
    """The deterministic stage with its arrays on the host, so that a fitted model can be pickled."""
    if pretrained is None:
        return None
    params, state = jax.tree.map(np.asarray, (pretrained.params, pretrained.state))
    return dataclasses.replace(pretrained, params=params, state=state)
