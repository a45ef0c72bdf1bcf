"""A Gaussian at the mode of the weights, with the curvature of the generalised Gauss-Newton matrix.

MacKay (1992), "A practical Bayesian framework for backpropagation networks",
Neural Computation 4; Immer et al. (2021), "Scalable marginal likelihood
estimation for model selection in deep learning", arXiv:2104.04975.

The joint mode of weights and noise is no good place: a flexible network fits
its rows, and the noise collapses. The noise is therefore put where the
marginal likelihood, weights integrated out, times its prior is largest, and
is Gaussian there in its unconstrained coordinate, independent of the weights.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._typing import Array, Key
from ..errors import OptionError, TrainingError
from ..likelihoods import LOG_2PI, Gaussian, HeteroskedasticGaussian
from ..log_density import Form, LogDensity, Terms, constrain_noise
from ..posterior import Posterior
from ..priors import WeightPrior
from ._gauss_newton import GaussianApproximation, Spectrum, predictive_moments, spectrum, to_position
from .base import Engine, RunControl

__all__ = ["GaussianApproximation", "Laplace", "predictive_moments"]

MAX_FULL = 1024
"""Most random weights for which ``structure="auto"`` takes the full matrix."""

MAX_LOW_RANK = 50_000
STRUCTURES = ("auto", "full", "low_rank", "kronecker", "diagonal")

MAX_ROUNDS = 8
GRADIENT_TOLERANCE = 1e-4
"""On the whitened weights: the mode is this near, in prior standard deviations, or nearer."""

MAX_STALLED = 10
MAX_CURVATURES = 3
NUM_NEWTON_STEPS = 2
NEGLIGIBLE_DISTANCE = 0.02
"""Newton steps after L-BFGS, which take the curvature anew while they go further than this."""

SCALE_GRID = np.exp(np.linspace(-4.0, 4.0, 161))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laplace(Engine):
    """Independent draws of a Gaussian at the mode; seconds, and no warm-up.

    ``posterior.info`` holds the Gaussian itself as ``"gaussian"`` (for
    ``laplace.predictive_moments``) and ``"log_evidence"``.

    Parameters
    ----------
    structure : ``"full"``; ``"low_rank"``, the leading curvature and the prior elsewhere, never too narrow;
        ``"kronecker"``, for dense layers, each independent of the others and with factored curvature;
        ``"diagonal"``; or ``"auto"``: full up to 1,024 random weights, low rank up to 50,000, else diagonal.
    rank : number of leading directions of ``"low_rank"``.
    prior_scale : factor on the prior standard deviations of all random weights, or ``"marginal_likelihood"``:
        the one with the largest evidence.
    linearised : a regression's predictive mean and variance are those of the network linearised at the mode, in
        closed form, where the curvature is known in all directions (full, or diagonal of at most 4,096 weights);
        else, and with False, those of draws put through the network, whose variance is larger where it is curved.
    max_iterations : L-BFGS iterations to the mode, at most.
    """

    structure: str = "auto"
    rank: int = 128
    prior_scale: float | str = 1.0
    linearised: bool = True
    max_iterations: int = 500

    def __post_init__(self) -> None:
        _checks.check_one_of("structure", self.structure, STRUCTURES)
        _checks.check_positive_int("rank", self.rank)
        _checks.check_positive_int("max_iterations", self.max_iterations)
        if isinstance(self.prior_scale, str):
            _checks.check_one_of("prior_scale", self.prior_scale, ("marginal_likelihood",))
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
        form = log_density.form
        if form.num_noise and type(form.likelihood) is not Gaussian:
            raise OptionError(
                f"engine='laplace' places Gaussian noise only, not that of {type(form.likelihood).__name__}. "
                "Use engine='nuts'."
            )
        started = time.perf_counter()
        num_samples = control.independent_draws(num_samples)
        search = _Search(self, key, log_density, np.asarray(start, np.float32))
        search.run(control)
        words = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
        gaussian = search.gaussian()
        draws = gaussian.draw(np.random.default_rng(words), num_chains * num_samples)
        if form.num_noise:
            noise_std = constrain_noise(draws[:, form.num_theta :], log_density.terms.noise_prior)
            gaussian = dataclasses.replace(gaussian, noise_var=np.mean(np.asarray(noise_std, float) ** 2, axis=0))
        numbers = form.num_noise > 0 or isinstance(form.likelihood, HeteroskedasticGaussian)
        exact_moments = self.linearised and numbers and gaussian.is_complete
        shape = (num_chains, num_samples)
        info = {
            "engine": "laplace",
            "independent": True,
            "approximation": "Laplace",
            "structure": search.structure,
            "rank": len(gaussian.eigenvalues),
            "prior_scale": search.scale,
            "log_evidence": search.log_evidence(),
            "num_iterations": search.num_iterations,
            "gaussian": gaussian,
            "seconds": time.perf_counter() - started,
        }
        if control.on_progress is not None:
            control.on_progress("sampling", num_samples, num_samples)
        return Posterior(
            draws.reshape(*shape, -1), {"diverging": np.zeros(shape, bool)}, info,
            analytic=gaussian if exact_moments else None,
        )  # fmt: skip


class _Search:
    """Mode, curvature, noise and prior scale, found in turns: the first two are for given values of the others."""

    def __init__(self, config: Laplace, key: Key, log_density: LogDensity, start: np.ndarray):
        self.config, self.key = config, key
        self.form, self.base = log_density.form, log_density.terms
        self.scale = 1.0 if isinstance(config.prior_scale, str) else float(config.prior_scale)
        size = self.form.num_theta
        self.u = (start[:size] - np.asarray(self.base.prior.mean)) / (np.asarray(self.base.prior.std) * self.scale)
        self.noise = start[size:]
        self.noise_cov = np.zeros((self.form.num_noise,) * 2)
        self.num_iterations = 0
        automatic = "full" if size <= MAX_FULL else "low_rank" if size <= MAX_LOW_RANK else "diagonal"
        self.structure = automatic if config.structure == "auto" else config.structure
        self.spectrum = Spectrum(np.zeros(0), None, np.zeros((0, 1)))

    @property
    def terms(self) -> Terms:
        """The terms at the current prior scale."""
        std = np.asarray(self.base.prior.std, np.float32) * np.float32(self.scale)
        return self.base._replace(prior=WeightPrior(self.base.prior.mean, std))

    def run(self, control: RunControl) -> None:
        chooses_scale = isinstance(self.config.prior_scale, str)
        for done in range(MAX_ROUNDS):
            self._mode_and_curvature()
            if control.on_progress is not None:
                control.on_progress("warm-up", done + 1, MAX_ROUNDS)
            noise = self._best_noise() if self.form.num_noise else self.noise
            factor = self._best_scale() if chooses_scale else 1.0
            width = np.sqrt(np.diag(self.noise_cov))
            settled = bool(np.all(np.abs(noise - self.noise) <= 0.02 * width)) and abs(np.log(factor)) < 0.06
            if settled or done == MAX_ROUNDS - 1:
                return
            self.noise, self.scale, self.u = noise, self.scale * factor, (self.u / factor).astype(np.float32)

    def _mode_and_curvature(self) -> None:
        form, terms = self.form, self.terms
        u, value, iterations = _optimise(form, self.config.max_iterations, self.u, self.noise, terms)
        if not np.isfinite(float(value)):
            raise TrainingError(
                "the log density is not finite at its mode. Likely causes: weights or inputs of extreme size, or a "
                "likelihood without an upper bound. Look at the inputs, or lower priors_sigma."
            )
        self.num_iterations += int(iterations)
        for _ in range(MAX_CURVATURES):
            self.spectrum = spectrum(form, self.key, u, self.noise, terms, self.structure, self.config.rank)
            u, distance = self._newton(np.asarray(u))
            if distance < NEGLIGIBLE_DISTANCE:
                break
        self.u = u

    def _newton(self, u: np.ndarray) -> tuple[np.ndarray, float]:
        """Steps with the curvature held, and how far the first went in posterior standard deviations.

        Line searches in float32 stop early; where the model is linear, these steps are exact.
        """
        form, terms, distance = self.form, self.terms, 0.0
        value, gradient = _value_and_gradient(form, u, self.noise, terms)
        for _ in range(NUM_NEWTON_STEPS):
            gradient = np.asarray(gradient, float)
            step = solve(self.spectrum, gradient)
            moved = np.asarray(u + step, np.float32)
            new_value, new_gradient = _value_and_gradient(form, moved, self.noise, terms)
            if not float(new_value) >= float(value) - 1e-6 * abs(float(value)):
                break
            distance = max(distance, float(np.sqrt(step @ gradient)))
            u, value, gradient = moved, new_value, new_gradient
        return u, distance

    def _best_noise(self) -> np.ndarray:
        form, terms = self.form, self.terms
        squares = _residual_squares(form, self.u, self.noise, terms)
        by_noise = self.spectrum.by_noise.astype(np.float32)
        num_rows = np.float32(np.sum(terms.row_weights))
        noise, cov = _maximise_noise(self.noise, squares, num_rows, by_noise, terms.noise_prior)
        noise, self.noise_cov = np.asarray(noise), np.asarray(cov, float)
        if not (np.all(np.isfinite(noise)) and np.all(np.isfinite(self.noise_cov))):
            raise TrainingError(
                "the noise has no most likely value. Give noise_prior a distribution such as HalfNormal."
            )
        return noise

    def _best_scale(self) -> float:
        """The factor on the current prior scale with the largest evidence of the model linearised at the mode.

        With log likelihood ``l + g (u - u0) - (u - u0) G (u - u0) / 2`` all Gaussians are closed-form.
        """
        values, vectors = self.spectrum.values, self.spectrum.vectors
        u = self.u.astype(float)
        gradient = np.asarray(_value_and_gradient(self.form, self.u, self.noise, self.terms)[1], float) + u
        if vectors is not None:
            inside = vectors.T @ u
            outside = float(u @ u - inside @ inside)  # no curvature there: the mode stays
            u, gradient = inside, vectors.T @ gradient
        else:
            outside = 0.0
        pull = gradient + values * u
        variance = SCALE_GRID[:, None] ** 2
        evidence = (0.5 * pull**2 * variance / (1.0 + variance * values) - 0.5 * np.log1p(variance * values)).sum(
            axis=1
        )
        return float(SCALE_GRID[np.argmax(evidence - 0.5 * max(outside, 0.0) / SCALE_GRID**2)])

    def gaussian(self) -> GaussianApproximation:
        terms = self.terms
        mode = np.asarray(to_position(self.u, self.noise, terms), float)
        values, vectors, _ = self.spectrum
        return GaussianApproximation(
            mode, np.asarray(terms.prior.std, float), values, vectors, self.noise_cov, np.zeros(0)
        )

    def log_evidence(self) -> float:
        """Laplace's approximation to the log marginal likelihood, in nats."""
        terms = self.terms
        value, _ = _value_and_gradient(self.form, self.u, self.noise, terms)
        size = self.form.num_theta + self.form.num_noise
        log_volume = np.sum(np.log(np.asarray(terms.prior.std, float))) - 0.5 * np.sum(np.log1p(self.spectrum.values))
        log_volume += 0.5 * np.linalg.slogdet(self.noise_cov)[1] if self.form.num_noise else 0.0
        return float(value) + 0.5 * size * LOG_2PI + float(log_volume)


def solve(spectrum: Spectrum, v: np.ndarray) -> np.ndarray:
    """``(I + G)^-1 v``."""
    shrink = spectrum.values / (1.0 + spectrum.values)
    if spectrum.vectors is None:
        return v - shrink * v
    return v - spectrum.vectors @ (shrink * (spectrum.vectors.T @ v))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _optimise(form: Form, max_iterations: int, u: Array, noise: Array, terms: Terms):
    """L-BFGS over the whitened weights at given noise: (weights, log density, iterations)."""

    def loss(u):
        return -form(to_position(u, noise, terms), terms).astype(u.dtype)  # a prior in float64 makes it float64

    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        u, state, count, stalled, _ = carry
        value, gradient = value_and_grad(u, state=state)
        updates, state = solver.update(gradient, state, u, value=value, grad=gradient, value_fn=loss)
        u = jnp.asarray(optax.apply_updates(u, updates))
        new_value, new_gradient = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        progress = value - new_value > 1e-7 * jnp.abs(value)
        return u, state, count + 1, jnp.where(progress, 0, stalled + 1), jnp.linalg.norm(new_gradient)

    def goes_on(carry):
        _, _, count, stalled, norm = carry
        return (count < max_iterations) & (stalled < MAX_STALLED) & (norm > GRADIENT_TOLERANCE)

    u = jnp.asarray(u)
    first = (u, solver.init(u), jnp.int32(0), jnp.int32(0), jnp.asarray(jnp.inf, u.dtype))
    u, _, count, _, _ = jax.lax.while_loop(goes_on, step, first)
    return u, -loss(u), count


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(form: Form, u: Array, noise: Array, terms: Terms) -> tuple[Array, Array]:
    return jax.value_and_grad(lambda u: form(to_position(u, noise, terms), terms))(u)


@functools.partial(jax.jit, static_argnums=0)
def _residual_squares(form: Form, u: Array, noise: Array, terms: Terms) -> Array:
    """Weighted sum of squared residuals of each output."""
    outputs = form.outputs(to_position(u, noise, terms), terms.carry)
    return jnp.sum(jnp.asarray(terms.row_weights)[:, None] * (terms.y - outputs) ** 2, axis=0)


@jax.jit
def _maximise_noise(noise: Array, squares: Array, num_rows: Array, by_noise: Array, noise_prior: Any):
    """The most likely unconstrained noise with the weights integrated out, and its covariance, by Newton's method.

    The curvature's eigenvectors are held, which is exact for one output and where outputs share no weights.
    """
    from numpyro.distributions.transforms import biject_to

    transform: Any = biject_to(noise_prior.support)
    present = transform(noise)

    def log_posterior(noise):
        std = transform(noise)
        values = by_noise @ (present / std) ** 2
        data = -jnp.sum(0.5 * squares / std**2 + num_rows * jnp.log(std)) - 0.5 * jnp.sum(jnp.log1p(values))
        return data + jnp.sum(noise_prior.log_prob(std) + transform.log_abs_det_jacobian(noise, std))

    def precision(noise):
        values, vectors = jnp.linalg.eigh(-jax.hessian(log_posterior)(noise))
        return (vectors * jnp.maximum(jnp.abs(values), 0.1)) @ vectors.T

    def step(_, noise):
        change = jnp.clip(jnp.linalg.solve(precision(noise), jax.grad(log_posterior)(noise)), -0.5, 0.5)
        return noise + change.astype(noise.dtype)

    noise = jax.lax.fori_loop(0, 60, step, noise)
    return noise, jnp.linalg.inv(precision(noise))
