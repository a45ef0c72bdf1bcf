"""The Bayesian part of each backbone: which weights, their density, their draws, and all of them together."""

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import log_density, priors, row_blocks
from .._keys import children
from .._threads import filters_of_warnings, follow, num_workers, side_by_side
from .._typing import Key, Params
from ..checkpoint import Checkpoint
from ..diagnostics import Diagnostics
from ..errors import MemoryBudgetWarning
from ..inference.empirical_prior import learn_scales
from ..posterior import Posterior
from ..predictive import Source
from ..subspaces import RandomPart
from . import resuming
from .choosing import Trained, choose
from .deterministic_stage import Stage
from .extent import epoch_work
from .progress import Report
from .sampling import Sampling, judge, on_host, sample, stopping_rule, with_draws

MOST_SIDE_BY_SIDE = 2**22
"""Most entries of a design matrix with which exact posteriors of several backbones are solved at once."""

MOST_GRADIENT_WORK = 1e9
"""Most floating-point operations of a gradient with which two samplers run at once: a larger one takes all cores by
itself, and two need twice the memory."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One backbone with the draws of its Bayesian part."""

    source: Source
    posterior: Posterior
    diagnostics: Diagnostics


def sample_members(
    plan: Any,
    stage: Stage,
    key_train: Key,
    key_sample: Key,
    sampling: Sampling,
    report: Report,
    checkpoint: Checkpoint | None,
) -> tuple[Member, ...]:
    """The Bayesian parts of all backbones, side by side where each leaves cores idle."""
    count = len(stage.params)
    together = _Together(report, count)
    keys = [key_sample] if count == 1 else children(key_sample, count)
    share = sampling.shared(count, exact=plan.exact is not None)
    # Training has used the first two keys of key_train, or one for each backbone.
    keys_choice = children(children(key_train, count + 2)[-1], count)

    def draw(number: int, go: Callable[[], None] | None = None) -> Member:
        return _sample_member(
            number, keys[number], plan=plan, stage=stage, key_choice=keys_choice[number], sampling=share,
            checkpoint=checkpoint, report=together.of(number, go), interrupted=together.interrupted(number),
        )  # fmt: skip

    if count > 1 and _leaves_cores_idle(plan, sampling):
        # The others start when the first has compiled what they all run.
        others = [functools.partial(draw, number) for number in range(1, count)]
        return tuple(follow(functools.partial(draw, 0), others, together.interrupt, together.abandon))
    first = draw(0)
    work = first.posterior.draws.shape[-1] * plan.prepared.num_rows
    if first.posterior.info.get("engine") == "last_layer" and work <= MOST_SIDE_BY_SIDE:
        return (first, *side_by_side(draw, ((number,) for number in range(1, count)), compiled=True))
    # Samplers keep all cores busy by themselves, and large designs the memory.
    return (first, *map(draw, range(1, count)))


def _leaves_cores_idle(plan: Any, sampling: Sampling) -> bool:
    """Whether the chains of one backbone do; seconds given for each backbone in turn are kept to in turn."""
    return (
        plan.exact is None
        and sampling.engine.one_core
        and sampling.seconds is None
        and sampling.num_chains < num_workers()
        and epoch_work(plan.network, plan.prepared) <= MOST_GRADIENT_WORK
    )


class _Together:
    """What runs of several backbones share: their progress as that of one run, and Ctrl-C."""

    def __init__(self, report: Report, count: int):
        self.report, self.count = report, count
        self.done: dict[str, list[int]] = {}
        self.lock = threading.Lock()
        self.interrupts = 0
        self.is_abandoned = False

    def of(self, number: int, on_sampling: Callable[[], None] | None = None) -> Report:
        """The report of one backbone, which calls ``on_sampling`` when its first draws are there."""

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage == "sampling" and on_sampling is not None:
                on_sampling()
            with self.lock:
                counts = self.done.setdefault(stage, [0] * self.count)
                counts[number] = done
                self.report(stage, sum(counts), total * self.count, note)

        return report

    def interrupt(self) -> None:
        """Ctrl-C: ends what has draws; all, as long as the first backbone has none."""
        self.interrupts += 1

    def abandon(self) -> None:
        """An error of one: ends all."""
        self.is_abandoned = True

    def interrupted(self, number: int) -> Callable[[], bool]:
        """Whether there was an interrupt since it was asked last that ends this backbone."""
        seen = self.interrupts

        def ended() -> bool:
            nonlocal seen
            new, seen = self.interrupts > seen, self.interrupts
            has_draws = "sampling" in self.done and self.done["sampling"][number] > 0
            return self.is_abandoned or (new and (number == 0 or has_draws))

        return ended


def _sample_member(
    number: int,
    key: Key,
    *,
    plan: Any,
    stage: Stage,
    key_choice: Key,
    sampling: Sampling,
    report: Report,
    checkpoint: Checkpoint | None,
    interrupted: Callable[[], bool],
) -> Member:
    """The Bayesian part of one backbone."""
    params = stage.params[number]
    warm = None if plan.warm is None else plan.warm.members[number]
    if len(stage.params) > 1 and checkpoint is not None:
        checkpoint = Checkpoint(checkpoint.folder / f"backbone-{number:02d}", checkpoint.fingerprint)
    noise = stage.starting_noise(plan, number)
    key_choice, key_prior = children(key_choice, 2)
    with filters_of_warnings:  # clustering changes them
        partition = _choose(plan, key_choice, stage, number, noise) if warm is None else warm.source.partition
    if checkpoint is not None:
        resuming.check_choice(checkpoint, partition)
    density, start = _density(plan, partition, params, stage, number, noise, key_prior)
    source = Source(
        plan.network, partition, params, stage.state, np.zeros((0, partition.size)), np.zeros((0, 0)),
        noise_outputs=plan.prepared.num_outputs if plan.likelihood.outputs_per_target > 1 else 0,
    )  # fmt: skip
    posterior = sample(
        sampling, key, density, start, checkpoint=checkpoint, report=report,
        is_enough=stopping_rule(sampling, plan.prepared, source, density),
        warm_start=None if warm is None else warm.posterior.adaptation, interrupted=interrupted,
    )  # fmt: skip
    source = on_host(with_draws(source, density, posterior.flat_draws))._replace(analytic=posterior.analytic)
    if plan.learns_prior:
        posterior.info["priors_sigma"] = _prior_stds(partition, density)
    return Member(source, posterior, judge(plan.prepared, source, posterior, len(stage.params)))


def _choose(plan: Any, key: Key, stage: Stage, number: int, noise: np.ndarray) -> RandomPart:
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


def _density(plan: Any, partition: RandomPart, params: Params, stage: Stage, number: int, noise: np.ndarray, key: Key):
    """The log density of a backbone's Bayesian part given its rows, and the trained position."""
    rows = plan.prepared.rows
    noise_prior = plan.noise_prior if stage.ensemble is None else ensemble_noise_prior(plan, noise)
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
            stacklevel=7,
        )
    start = np.asarray(priors.split(partition, params))
    if density.form.num_noise:
        unconstrained = log_density.unconstrain_noise(noise, noise_prior)
        # A prior with bounds need not hold the observed error: its middle does.
        start = np.concatenate([start, np.where(np.isfinite(unconstrained), unconstrained, 0.0)])
    if plan.learns_prior and density.form.num_theta:
        factors = learn_scales(density, key, start)
        blocks = density.form.blocks or (density.form.num_theta,)
        std = (prior.std * np.repeat(factors, blocks)).astype(np.float32)
        density = dataclasses.replace(density, terms=density.terms._replace(prior=prior._replace(std=std)))
    return density, start


def ensemble_noise_prior(plan: Any, noise: np.ndarray) -> Any:
    """A backbone's own rows would say that there is hardly any noise: it has learnt them. Others measured it."""
    if not plan.noise_is_default or plan.noise_prior is None:
        return plan.noise_prior
    return priors.known_noise_prior(noise, plan.prepared.num_rows)


def _prior_stds(partition: RandomPart, density: log_density.LogDensity) -> dict[str, float]:
    """The learnt prior standard deviation of each leaf's Bayesian weights; of a subspace, that of its coordinates."""
    blocks = density.form.blocks or (density.form.num_theta,)
    first = np.cumsum((0, *blocks[:-1]))
    std = np.asarray(density.terms.prior.std)
    names = [path for path, count in partition.counts().items() if count] if density.form.blocks else ["subspace"]
    return {name: float(std[at]) for name, at in zip(names, first, strict=True)}
