"""Predictions of several backbones, each with draws of its own Bayesian part, as one distribution.

Backbones come in parts, each trained with one prior scale. Calibration by
left-out rows changes the variance of a part and never its mean: the deviations
of draws from that mean are stretched, and the noise is that which left-out rows
show.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from . import out_of_fold, predictive
from ._threads import side_by_side
from .likelihoods import LOG_2PI
from .out_of_fold import OutOfFold
from .predictive import Source

ROWS_AT_ONCE = 2**16
"""Rows for which the moments of all backbones are held at once."""

VALUES_PER_BLOCK = 2**22
"""Outputs of all draws that are held at once."""


class Mixture(NamedTuple):
    """Backbones with their draws, and what left-out rows say about their variance (None: nothing is changed).

    ``parts`` is the number of each backbone's part, and ``weights`` (parts,) the share of each part.
    """

    sources: tuple[Source, ...]
    parts: np.ndarray
    weights: np.ndarray
    calibration: OutOfFold | None = None

    @property
    def num_outputs(self) -> int:
        """Numbers that are predicted for a row."""
        return self.sources[0].noise_outputs or self.sources[0].noise_std.shape[1]

    @property
    def member_weights(self) -> np.ndarray:
        """Share of each backbone; those of a part count alike."""
        return self.weights[self.parts] / np.bincount(self.parts)[self.parts]

    @property
    def draw_weights(self) -> np.ndarray:
        """Share of each draw; draws are numbered through the backbones in order."""
        counts = [len(source.theta) for source in self.sources]
        return np.repeat(self.member_weights / counts, counts)

    def noise_vars(self, x: np.ndarray, means: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Noise variance of each part, ``(parts, n or 1, outputs)``.

        ``means`` are the parts' predictions, ``own`` the noise variance that their posteriors have.
        """
        if self.calibration is None or self.calibration.noise_var is None:
            return own
        if self.calibration.noise_head is not None:
            return self.calibration.noise_head(own)
        constant, variation = self.calibration.noise_var[:, None], self.calibration.noise_variation
        return constant if variation is None else constant * variation.factor(x, means)

    def factors(self) -> np.ndarray:
        """Factor on the epistemic variance of each part, ``(parts, 1 or outputs)``."""
        if self.calibration is not None and self.calibration.epistemic_factor is not None:
            return self.calibration.epistemic_factor
        return np.ones((len(self.weights), 1))


def member_moments(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and variance of each backbone's predictions over its draws, ``(members, n, outputs)``, and mean noise var.

    The last is ``(members, 1, outputs)`` where the noise is the same for all rows.
    """
    sources = ((source, x) for source in mixture.sources)
    if all(source.analytic is not None for source in mixture.sources):
        moments = side_by_side(predictive.noisy_moments, sources)
    else:  # these keep all cores busy by themselves
        moments = [predictive.noisy_moments(*each) for each in sources]
    mean, variance, noise_var = (np.stack(parts).astype(float) for parts in zip(*moments, strict=True))
    return mean, variance, noise_var


def regression_moments(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, epistemic variance (within and between backbones) and noise variance, ``(n, outputs)``, working units."""
    return _by_blocks(_regression_moments, mixture, x)


def _by_blocks(
    moments: Callable[[Mixture, np.ndarray], tuple[np.ndarray, ...]], mixture: Mixture, x: np.ndarray
) -> Any:
    """``moments(mixture, x)`` of not too many rows at a time."""
    parts = [moments(mixture, x[first : first + ROWS_AT_ONCE]) for first in range(0, len(x), ROWS_AT_ONCE)]
    return tuple(np.concatenate(values) for values in zip(*parts, strict=True))


def _regression_moments(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    means, variances, own = part_moments(mixture, x)
    mean = np.tensordot(mixture.weights, means, 1)
    epistemic = mixture.factors()[:, None, :] * variances + (means - mean) ** 2
    noise_var = np.tensordot(mixture.weights, mixture.noise_vars(x, means, own), 1)
    return mean, np.tensordot(mixture.weights, epistemic, 1), np.broadcast_to(noise_var, mean.shape)


def part_moments(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, epistemic and noise variance of each part before calibration, as ``member_moments`` has them."""
    means, variances, noise_vars = member_moments(mixture, x)
    groups = [mixture.parts == part for part in range(len(mixture.weights))]
    return (
        np.stack([means[group].mean(axis=0) for group in groups]),
        np.stack([variances[group].mean(axis=0) + means[group].var(axis=0) for group in groups]),
        np.stack([noise_vars[group].mean(axis=0) for group in groups]),
    )


def member_probabilities(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities ``(members, n, classes)`` and mean entropy of the draws ``(members, n)`` of each backbone."""
    moments = [predictive.class_moments(source, x) for source in mixture.sources]
    probabilities, entropy = (np.stack(parts).astype(float) for parts in zip(*moments, strict=True))
    return probabilities, entropy


def class_moments(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean class probabilities ``(n, classes)`` and mean entropy of the draws ``(n,)`` in nats.

    With a temperature, the share of the entropy that the draws agree on stays as it was.
    """
    return _by_blocks(_class_moments, mixture, x)


def _class_moments(mixture: Mixture, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shares = mixture.member_weights
    probabilities, entropy = (np.tensordot(shares, values, 1) for values in member_probabilities(mixture, x))
    if mixture.calibration is None or mixture.calibration.temperature is None:
        return probabilities, entropy
    tempered = out_of_fold.temper(probabilities, mixture.calibration.temperature)
    before, after = (scipy.special.entr(np.asarray(p, float)).sum(axis=-1) for p in (probabilities, tempered))
    return tempered, entropy * after / np.maximum(before, np.finfo(float).tiny)


def function_draws(
    mixture: Mixture, x: np.ndarray, picked: np.ndarray, *, noise: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Outputs ``(draws, n, d)`` and noise std ``(draws, n or 1, d)`` of the draws numbered ``picked``, working units.

    Draws are numbered through the backbones in order. With calibration their deviations from the mean are stretched.
    Without ``noise`` its std is None.
    """
    counts = np.array([len(source.theta) for source in mixture.sources])
    member = np.searchsorted(np.cumsum(counts), picked, side="right")
    within = picked - (np.cumsum(counts) - counts)[member]
    outputs: Any = None
    noise_std: Any = None
    for k in np.unique(member):
        source, here = mixture.sources[k], member == k
        values, std = predictive.observation_draws(
            source, x, source.theta[within[here]], source.noise_std[within[here]]
        )
        outputs = np.empty((len(picked), *values.shape[1:])) if outputs is None else outputs
        noise_std = np.empty((len(picked), *std.shape[1:])) if noise_std is None else noise_std
        outputs[here], noise_std[here] = values, std
    if mixture.calibration is None or mixture.calibration.epistemic_factor is None:
        return outputs, noise_std if noise else None
    (means, _, own), part = part_moments(mixture, x), mixture.parts[member]
    stretch = np.sqrt(mixture.factors())[part][:, None, :]
    for k in np.unique(part):
        outputs[part == k] = means[k] + stretch[part == k] * (outputs[part == k] - means[k])
    return outputs, np.sqrt(mixture.noise_vars(x, means, own))[part] if noise else None


def num_draws(mixture: Mixture) -> int:
    """Draws of all backbones together."""
    return sum(len(source.theta) for source in mixture.sources)


def _row_blocks(mixture: Mixture, x: np.ndarray):
    """Blocks of rows for which the outputs of all draws fit into memory."""
    width = mixture.num_outputs * (3 if mixture.sources[0].noise_outputs else 1)  # both heads, and the noise again
    rows = max(8, VALUES_PER_BLOCK // max(1, num_draws(mixture) * max(1, width)))
    return [slice(first, first + rows) for first in range(0, len(x), rows)]


def quantiles(mixture: Mixture, x: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Quantiles of the predictive mixture over all draws, noise included, ``(levels, n, outputs)``, working units."""
    everything, parts = np.arange(num_draws(mixture)), []
    for block in _row_blocks(mixture, x):
        outputs, noise = function_draws(mixture, x[block], everything)
        assert noise is not None
        parts.append(predictive.solve_quantiles(outputs, noise, mixture.draw_weights, levels))
    return np.concatenate(parts, axis=1)


def log_density(mixture: Mixture, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log density of targets ``(n, d)`` under the mixture over all draws, ``(n,)`` in nats, working units."""
    everything, parts = np.arange(num_draws(mixture)), []
    for block in _row_blocks(mixture, x):
        outputs, noise = function_draws(mixture, x[block], everything)
        assert noise is not None
        each = gaussian_log_density(y[block], outputs, noise)
        parts.append(scipy.special.logsumexp(each, axis=0, b=mixture.draw_weights[:, None]))
    return np.concatenate(parts)


def gaussian_log_density(y: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Log density of targets ``(n, d)`` for each of ``(draws, n, d)`` means, ``(draws, n)`` in nats, in float64."""
    scaled = (y - mean) / std
    return -np.sum(0.5 * scaled**2 + np.log(std) + 0.5 * LOG_2PI, axis=-1)
