"""Bayesian linear regression with unknown noise, in float64 on one eigendecomposition.

    y_i ~ N(offset_i + x_i . (theta - mean), noise_std²)   with weight w_i,    theta_j ~ N(mean_j, (scale std_j)²)

In the eigenbasis of the whitened, weighted features every quantity is a sum
over eigenvalues for each noise level, so that an integral over the noise costs
next to nothing. Directions that the data do not inform are never divided by.
"""

import dataclasses

import numpy as np

from .likelihoods import LOG_2PI

NODES_PER_BLOCK = 64
"""Noise levels looked at at once: each needs a few numbers for every eigenvalue."""

DRAWS_PER_BLOCK = 128
"""Draws made at once: what each leaves behind on the way is several times the draw itself."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A design in the eigenbasis of its whitened features.

    Attributes
    ----------
    basis : (features, rank) orthonormal directions, in units of the prior standard deviation, that the data inform.
    eigenvalues : (rank,) of the weighted, whitened Gram matrix; positive.
    projected : (rank,) the targets along the left singular directions.
    residual : sum of squares, weighted, that no weights explain.
    num_rows : sum of the row weights.
    """

    basis: np.ndarray
    eigenvalues: np.ndarray
    projected: np.ndarray
    residual: float
    num_rows: float

    def shrinkage(self, noise_std: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
        """Share of each direction that the data determine, ``(nodes, rank)``; its sum is the effective dimension."""
        scaled = np.square(scale)[..., None] * self.eigenvalues
        return scaled / (scaled + np.square(noise_std)[..., None])

    def log_evidence(self, noise_std: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """Log density of the targets given the noise, the weights integrated out, ``(nodes,)`` in nats."""
        variance = np.square(noise_std)
        determined = np.empty(len(variance))
        for first in range(0, len(variance), NODES_PER_BLOCK):
            part = variance[first : first + NODES_PER_BLOCK, None]
            total = part + scale**2 * self.eigenvalues
            # The rank directions have variance ``total``, the others ``variance``: no difference of large numbers.
            terms = np.log1p(scale**2 * self.eigenvalues / part) + self.projected**2 / total
            determined[first : first + NODES_PER_BLOCK] = np.sum(terms, axis=-1)
        return -0.5 * (self.num_rows * (LOG_2PI + np.log(variance)) + determined + self.residual / variance)

    def conditional_mean(self, noise_std: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
        """Posterior mean given the noise in the eigenbasis, ``(nodes, rank)``, in prior standard deviations."""
        return self.shrinkage(noise_std, scale) * (self.projected / np.sqrt(self.eigenvalues))

    def draw(self, normals: np.ndarray, noise_std: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
        """Exact draws given the noise of each, ``(draws, features)``, in prior standard deviations.

        ``normals`` (draws, features) are standard normal numbers.
        """
        scales = np.broadcast_to(scale, noise_std.shape)
        draws = np.empty(normals.shape)
        for first in range(0, len(normals), DRAWS_PER_BLOCK):
            part = slice(first, first + DRAWS_PER_BLOCK)
            some, noise, scale = normals[part], noise_std[part], scales[part]
            left = np.sqrt(1.0 - self.shrinkage(noise, scale))
            moved = scale[:, None] * (left - 1.0) * (some @ self.basis) + self.conditional_mean(noise, scale)
            draws[part] = scale[:, None] * some + moved @ self.basis.T
        return draws


def decompose(features: np.ndarray, targets: list[np.ndarray], row_weights: np.ndarray) -> list[Spectrum]:
    """The spectrum of whitened ``features`` (features, n) for each of ``targets`` (n,), which share one decomposition.

    Rows of weight zero must have been left out. The smaller of the two Gram
    matrices is decomposed; what rounding leaves of a zero eigenvalue is dropped.
    """
    root = np.sqrt(np.asarray(row_weights, float))
    weighted = np.asarray(features, float) * root
    num_features, n = weighted.shape
    wide = num_features > n
    eigenvalues, vectors = np.linalg.eigh(weighted.T @ weighted if wide else weighted @ weighted.T)
    kept = eigenvalues > np.finfo(float).eps * max(n, num_features) * max(eigenvalues.max(initial=0.0), 0.0)
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    root_eigenvalues = np.sqrt(eigenvalues)
    basis = weighted @ vectors / root_eigenvalues if wide else vectors
    spectra = []
    for target in targets:
        scaled = root * target
        # The left singular directions, ``weighted.T @ basis / root_eigenvalues``, are not needed as a matrix.
        projected = vectors.T @ scaled if wide else basis.T @ (weighted @ scaled) / root_eigenvalues
        explained = vectors @ projected if wide else weighted.T @ (basis @ (projected / root_eigenvalues))
        residual = float(np.sum((scaled - explained) ** 2))
        spectra.append(Spectrum(basis, eigenvalues, projected, residual, float(np.sum(row_weights))))
    return spectra


@dataclasses.dataclass(frozen=True)
class OutputPosterior:
    """The posterior of one output's weights: a mixture of Gaussians over nodes of noise and prior scale.

    Given node ``q`` the weights are Gaussian with mean
    ``prior_mean + prior_std * basis @ conditional_mean[q]``; see ``Spectrum``.

    Attributes
    ----------
    scalars : (slots,) positions in ``theta``; ``len(theta)`` marks an unused slot.
    prior_std : (slots,) prior standard deviations, zero for an unused slot.
    spectrum : the training design.
    noise_std, prior_scale, weights : (nodes,) each; the weights sum to one.
    """

    scalars: np.ndarray
    prior_std: np.ndarray
    spectrum: Spectrum
    noise_std: np.ndarray
    prior_scale: np.ndarray
    weights: np.ndarray

    @property
    def effective_dimensions(self) -> float:
        """Expected number of directions that the data determine."""
        return float(self.weights @ self.spectrum.shrinkage(self.noise_std, self.prior_scale).sum(axis=-1))

    @property
    def noise_var(self) -> float:
        """Posterior mean of the noise variance."""
        return float(self.weights @ np.square(self.noise_std))

    def moments(self, offset: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact posterior mean and variance of ``offset + slopes.T @ (theta - prior_mean)``, each ``(n,)``.

        ``slopes`` is (slots, n), as ``linearity.linearise`` gives it for this output.
        """
        whitened = np.asarray(slopes, float).T * self.prior_std
        inside = whitened @ self.spectrum.basis
        means = self.spectrum.conditional_mean(self.noise_std, self.prior_scale)
        mean = self.weights @ means
        deviation = np.sqrt(self.weights)[:, None] * (means - mean)
        variance_scale = np.square(self.prior_scale)
        explained = (self.weights * variance_scale) @ self.spectrum.shrinkage(self.noise_std, self.prior_scale)
        prior_var = (self.weights @ variance_scale) * np.sum(whitened**2, axis=1)
        if len(explained) <= len(deviation):
            change = deviation.T @ deviation
            change[np.diag_indices_from(change)] -= explained
            variance = prior_var + np.sum((inside @ change) * inside, axis=1)
        else:
            variance = prior_var - inside**2 @ explained + np.sum((inside @ deviation.T) ** 2, axis=1)
        return np.asarray(offset, float) + inside @ mean, np.maximum(variance, 0.0)
