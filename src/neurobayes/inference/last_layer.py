"""Exact draws when the random weights enter the output linearly and the noise is Gaussian.

Given the noise the posterior of the weights is then Gaussian; the noise, and
on request a common factor on the prior standard deviations, is integrated by
quadrature. Whether the weights enter linearly is read off the traced network.
Rasmussen & Williams (2006), "Gaussian Processes for Machine Learning", section 2.1, doi:10.7551/mitpress/3206.001.0001.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _checks, linearity
from .._typing import Key
from ..errors import OptionError, TrainingError
from ..likelihoods import Gaussian, HeteroskedasticGaussian
from ..linear_regression import OutputPosterior, Spectrum, decompose
from ..log_density import LogDensity
from ..posterior import Posterior
from . import _quadrature
from .base import Engine, RunControl

MAX_SCALARS = 8192
"""Largest eigenproblem, the smaller of rows and weights of an output; beyond, sampling is faster."""

MAX_DESIGN = 2**28
"""Largest number of entries of the design matrix (1 GiB in float32)."""

NOISE_RANGE = (-100.0, 60.0)
"""Where the unconstrained noise (its logarithm, for the usual priors) is looked for."""

SCALE_RANGE = (-8.0, 8.0)
NUM_SCALE_NODES = 41
"""Grid of the logarithm of the prior scale, in standard deviations of its hyperprior."""

NEGLIGIBLE_WEIGHT = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastLayer(Engine):
    """Independent, exact draws by linear algebra; no warm-up, no start, no tuning.

    For random weights that enter the output linearly (those of the output
    layer, or any part of them) under Gaussian noise. With several outputs each
    must have random weights of its own.

    Parameters
    ----------
    num_noise_nodes : quadrature nodes over the noise, >= 120; more are added where its density is uneven.
    prior_scale : factor on the prior standard deviations of all random weights, or ``"auto"``: unknown, with a
        log-normal prior of median 1 (95 % between 1/7 and 7), and integrated.
    """

    num_noise_nodes: int = 240
    prior_scale: float | str = 1.0

    def __post_init__(self) -> None:
        _checks.check_positive_int("num_noise_nodes", self.num_noise_nodes, minimum=120)
        if isinstance(self.prior_scale, str):
            _checks.check_one_of("prior_scale", self.prior_scale, ("auto",))
        else:
            _checks.check_positive("prior_scale", self.prior_scale)

    def run(
        self,
        key: Key,
        log_density: LogDensity,
        start: np.ndarray,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        control: RunControl = RunControl(),  # noqa: B008 - frozen
    ) -> Posterior:
        reason, design = examine(log_density)
        if design is None:
            raise OptionError(f"engine='last_layer' does not apply: {reason}. Use engine='auto' or engine='nuts'.")
        return self.solve(
            design, key, log_density.terms.noise_prior,
            num_samples=num_samples, num_chains=num_chains, control=control,
        )  # fmt: skip

    def solve(
        self, design: "Design", key: Key, noise_prior: Any, *, num_samples: int, num_chains: int, control: RunControl
    ) -> Posterior:
        """The posterior of a regression problem that ``examine`` has found."""
        started = time.perf_counter()
        num_samples = control.independent_draws(num_samples)
        spectra = _spectra(design)
        scales = self._integrate(spectra, noise_prior)
        outputs = _mixtures(design, spectra, scales)
        draws, scale_draws = _draw(design, outputs, scales, key, noise_prior, num_chains * num_samples)
        shape = (num_chains, num_samples)
        stats = {"diverging": np.zeros(shape, bool)}
        if scale_draws is not None:
            stats["prior_scale"] = scale_draws.reshape(shape)
        info = {
            "engine": "last_layer",
            "independent": True,
            "log_evidence": float(scales.log_evidence),
            "effective_dimensions": [output.effective_dimensions for output in outputs],
            "seconds": time.perf_counter() - started,
        }
        if control.on_progress is not None:
            control.on_progress("sampling", num_samples, num_samples)
        mixture = Mixture(design.prior_mean, tuple(outputs))
        return Posterior(draws.astype(np.float32).reshape(*shape, -1), stats, info, analytic=mixture)

    def _integrate(self, spectra: list[Spectrum], noise_prior: Any) -> "ScaleNodes":
        """The noise, and the prior scale where it is unknown, integrated over the evidence."""

        def given(scale: float) -> NoiseNodes:
            return _integrate_noise(spectra, noise_prior, scale, self.num_noise_nodes)

        if self.prior_scale != "auto":
            noise = given(float(self.prior_scale))
            return ScaleNodes(
                np.array([np.log(float(self.prior_scale))]), np.zeros(1), [noise], noise.log_evidence.sum()
            )
        found: dict[float, NoiseNodes] = {}

        def log_joint(log_scale: np.ndarray) -> np.ndarray:
            for t in log_scale[:, 0].tolist():
                found.setdefault(t, given(np.exp(t)))
            evidence = np.array([found[t].log_evidence.sum() for t in log_scale[:, 0].tolist()])
            return (evidence - 0.5 * log_scale[:, 0] ** 2 - 0.5 * np.log(2 * np.pi))[:, None]

        nodes, log_weights, log_evidence = _quadrature.integrate(
            log_joint, *SCALE_RANGE, 1, NUM_SCALE_NODES, num_coarse=NUM_SCALE_NODES
        )
        return ScaleNodes(
            nodes[:, 0], log_weights[:, 0], [found[t] for t in nodes[:, 0].tolist()], float(log_evidence[0])
        )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The exact posterior as a mixture of Gaussians, for moments without draws.

    Attributes
    ----------
    prior_mean : (size,) centre of the random weights' prior, where the network is linearised.
    outputs : the posterior of each output's weights and noise.
    """

    prior_mean: np.ndarray
    outputs: tuple[OutputPosterior, ...]

    @property
    def noise_var(self) -> np.ndarray:
        """Posterior mean of each output's noise variance, ``(outputs,)``."""
        return np.array([output.noise_var for output in self.outputs])

    def moments(self, hoisted: Any, carry: Any, num_rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As ``analytic_moments``."""
        return analytic_moments(self, hoisted, carry, num_rows)


def analytic_moments(
    mixture: Mixture, hoisted: Any, carry: Any, num_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior mean and variance of the network's outputs (noise not included), each ``(n, outputs)``.

    ``hoisted`` and ``carry`` are the split forward pass for the rows wanted, as ``hoisting.hoist_network`` and
    ``early`` give it; ``num_rows`` of them, the first ones, where not all are wanted.
    """
    scalars = np.stack([output.scalars for output in mixture.outputs], axis=1)
    values, slopes = linearity.linearise(hoisted, np.asarray(mixture.prior_mean, np.float32), carry, scalars)
    values, slopes = values[:num_rows], slopes[:, :num_rows]
    moments = [output.moments(values[:, i], slopes[:, :, i]) for i, output in enumerate(mixture.outputs)]
    mean, variance = (np.stack(parts, axis=1) for parts in zip(*moments, strict=True))
    return mean, variance


class Design(NamedTuple):
    """The training rows of positive weight as one linear regression for each output.

    ``scalars`` is (slots, outputs), ``slopes`` (slots, rows, outputs), ``residuals`` (rows, outputs).
    """

    scalars: np.ndarray
    slopes: np.ndarray
    residuals: np.ndarray
    row_weights: np.ndarray
    prior_mean: np.ndarray
    prior_std: np.ndarray

    def slot_std(self, output: int) -> np.ndarray:
        """Prior standard deviation of each slot of an output, zero for an unused one."""
        return np.append(self.prior_std, 0.0)[self.scalars[:, output]]


class NoiseNodes(NamedTuple):
    """Quadrature over the noise at one prior scale; ``(nodes, outputs)`` each, but ``log_evidence`` (outputs,)."""

    unconstrained: np.ndarray
    noise_std: np.ndarray
    log_weights: np.ndarray
    log_evidence: np.ndarray


class ScaleNodes(NamedTuple):
    """Quadrature over the prior scale, ``(nodes,)`` each, with that over the noise at each node."""

    log_scale: np.ndarray
    log_weights: np.ndarray
    noise: list[NoiseNodes]
    log_evidence: float


def examine(log_density: LogDensity) -> tuple[str, Design | None]:
    """The regression problem behind a log density, or why there is none."""
    form, terms = log_density.form, log_density.terms
    if isinstance(form.likelihood, HeteroskedasticGaussian):
        return "the noise is an output of the network", None
    if type(form.likelihood) is not Gaussian:
        return "the likelihood is not Gaussian", None
    if not linearity.late_is_affine(form.hoisted, form.num_theta, terms.carry):
        return "the random weights do not enter the output linearly", None
    centre = np.asarray(terms.prior.mean, np.float32)
    num_outputs = form.num_noise
    if num_outputs == 1:
        scalars = np.arange(max(form.num_theta, 1), dtype=np.int32)[:, None]
    else:
        entering = linearity.entering_scalars(form.hoisted, centre, terms.carry, terms.row_weights)
        found = linearity.separate(entering)
        if found is None:
            return "several outputs share random weights", None
        scalars = found
    row_weights = np.asarray(terms.row_weights, float)
    if min(len(scalars), len(row_weights)) > MAX_SCALARS or len(scalars) * len(row_weights) * num_outputs > MAX_DESIGN:
        return f"{len(scalars)} random weights of an output on {len(row_weights)} rows are too many", None
    values, slopes = linearity.linearise(form.hoisted, centre, terms.carry, scalars)
    real = row_weights > 0
    residuals = np.asarray(terms.y, float)[real] - values[real]
    slopes = slopes[:, real]
    if not (np.all(np.isfinite(residuals)) and np.all(np.isfinite(slopes))):
        raise TrainingError("the network's features are not finite on the training rows. Look for extreme inputs.")
    return "", Design(
        scalars, slopes, residuals, row_weights[real], centre.astype(float), np.asarray(terms.prior.std, float)
    )  # fmt: skip


def compile_ahead(hoisted: Any, size: int, num_rows: int, num_outputs: int, noise_prior: Any) -> None:
    """Compile what a ``LastLayer`` run will, for random weights ``(size,)`` that are likely to enter linearly."""
    if num_outputs > 1:
        linearity.compile_entering(hoisted, size, num_rows)
    linearity.compile_ahead(hoisted, size, num_outputs)
    _noise_prior(np.zeros((1, num_outputs)), noise_prior)


def _spectra(design: Design) -> list[Spectrum]:
    """One spectrum for each output; outputs with equal features and priors share a decomposition."""
    groups: list[tuple[np.ndarray, np.ndarray, list[int]]] = []
    for output in range(design.residuals.shape[1]):
        std, slopes = design.slot_std(output), design.slopes[:, :, output]
        for other_std, other_slopes, members in groups:
            if np.array_equal(std, other_std) and np.array_equal(slopes, other_slopes):
                members.append(output)
                break
        else:
            groups.append((std, slopes, [output]))
    spectra: dict[int, Spectrum] = {}
    for std, slopes, members in groups:
        targets = [design.residuals[:, output] for output in members]
        spectra.update(zip(members, decompose(slopes * std[:, None], targets, design.row_weights), strict=True))
    return [spectra[output] for output in range(design.residuals.shape[1])]


def _integrate_noise(spectra: list[Spectrum], noise_prior: Any, scale: float, num_nodes: int) -> NoiseNodes:
    """The noise of every output integrated, the outputs side by side."""

    def log_joint(unconstrained: np.ndarray) -> np.ndarray:
        log_prior, noise_std = _noise_prior(unconstrained, noise_prior)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            evidence = [s.log_evidence(noise_std[:, i], scale) for i, s in enumerate(spectra)]
        return log_prior + np.stack(evidence, axis=1)

    nodes, log_weights, log_evidence = _quadrature.integrate(log_joint, *NOISE_RANGE, len(spectra), num_nodes)
    if not np.all(np.isfinite(log_evidence)) or np.max(log_weights[[0, -1]]) > np.log(1e-6):
        raise TrainingError(
            "the posterior of the noise has no bounds. Give noise_prior a distribution that keeps it from zero and "
            "infinity, such as HalfNormal or InverseGamma."
        )
    return NoiseNodes(nodes, _noise_prior(nodes, noise_prior)[1], log_weights, log_evidence)


def _noise_prior(unconstrained: np.ndarray, noise_prior: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log prior density in the unconstrained coordinate, and the noise std, both shaped like it, in float64."""
    num_rows = len(unconstrained)
    size = max(_quadrature.NUM_COARSE, 1 << (num_rows - 1).bit_length())  # one program serves all grids
    with jax.enable_x64(True):
        padded = np.pad(unconstrained, ((0, size - num_rows), (0, 0)), mode="edge")
        log_prior, noise_std = _evaluate_noise_prior(padded, noise_prior)
        return np.asarray(log_prior)[:num_rows], np.asarray(noise_std)[:num_rows]


@jax.jit
def _evaluate_noise_prior(unconstrained, noise_prior):
    from numpyro.distributions.transforms import biject_to

    transform = biject_to(noise_prior.support)
    noise_std = transform(unconstrained)
    volume = transform.log_abs_det_jacobian(unconstrained, noise_std)
    return noise_prior.log_prob(noise_std) + volume, noise_std


def _mixtures(design: Design, spectra: list[Spectrum], scales: ScaleNodes) -> list[OutputPosterior]:
    """The posterior of each output's weights over all nodes of noise and prior scale that matter."""
    outputs = []
    for i, spectrum in enumerate(spectra):
        weights = np.concatenate(
            [np.exp(w + noise.log_weights[:, i]) for w, noise in zip(scales.log_weights, scales.noise, strict=True)]
        )
        noise_std = np.concatenate([noise.noise_std[:, i] for noise in scales.noise])
        scale = np.repeat(np.exp(scales.log_scale), [len(noise.noise_std) for noise in scales.noise])
        kept = weights > NEGLIGIBLE_WEIGHT * weights.max()
        outputs.append(
            OutputPosterior(
                design.scalars[:, i], design.slot_std(i), spectrum, noise_std[kept], scale[kept],
                weights[kept] / weights[kept].sum(),
            )
        )  # fmt: skip
    return outputs


def _draw(
    design: Design, outputs: list[OutputPosterior], scales: ScaleNodes, key: Key, noise_prior: Any, num_draws: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions ``(draws, size)`` and, where it is unknown, the prior scale of each draw.

    Draw i depends on the key and i alone, so chains are consecutive parts of one stream.
    """
    words = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
    for_scale, for_noise, for_weights = (np.random.default_rng(s) for s in np.random.SeedSequence(words).spawn(3))
    uniforms = for_scale.random((num_draws, 2))
    log_scale, chosen = scales.log_scale[np.zeros(num_draws, int)], np.zeros(num_draws, int)
    if len(scales.log_scale) > 1:
        log_scale, chosen = _quadrature.draw(scales.log_scale, scales.log_weights, uniforms)
    uniforms = for_noise.random((num_draws, len(outputs), 2))
    unconstrained = np.empty((num_draws, len(outputs)))
    for node in np.unique(chosen):
        noise, here = scales.noise[node], chosen == node
        for i in range(len(outputs)):
            grid = noise.unconstrained[:, i], noise.log_weights[:, i]
            unconstrained[here, i] = _quadrature.draw(*grid, uniforms[here, i])[0]
    noise_std = _noise_prior(unconstrained, noise_prior)[1]
    normals = for_weights.standard_normal((num_draws, len(outputs), len(design.scalars)))
    theta = np.empty((num_draws, len(design.prior_mean) + 1))  # the last column takes the unused slots
    for i, output in enumerate(outputs):
        drawn = output.spectrum.draw(normals[:, i], noise_std[:, i], np.exp(log_scale))
        theta[:, output.scalars] = np.append(design.prior_mean, 0.0)[output.scalars] + output.prior_std * drawn
    positions = np.concatenate([theta[:, :-1], unconstrained], axis=1)
    return positions, np.exp(log_scale) if len(scales.log_scale) > 1 else None
