"""Priors of the random weights and of the noise.

The prior of every random scalar is Gaussian and independent of the others;
its centre and standard deviation may differ from scalar to scalar and are
data to the compiled programs, so changing them recompiles nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import trees
from ._typing import Array, Params
from .errors import OptionError, SelectionError, nearest
from .likelihoods import LOG_2PI
from .subspaces import RandomPart, Subspace


class WeightPrior(NamedTuple):
    """Independent Gaussians over the random scalars, both fields of shape ``(size,)``."""

    mean: Any
    std: Any

    def log_prob(self, theta: Array) -> Array:
        """Log density in nats, a scalar, with every constant."""
        return gaussian_log_prob(theta, self.mean, self.std)


def gaussian_log_prob(x: Array, mean: Array | float, std: Array | float) -> Array:
    """Sum over all entries of the log density of independent Gaussians."""
    scaled = (x - mean) / std
    return -jnp.sum(0.5 * scaled**2 + jnp.log(std) + 0.5 * LOG_2PI)


def prior_std_tree(params: Params, priors_sigma: float | Mapping[str, float], *, default: float = 1.0) -> Params:
    """The prior standard deviation of every scalar, a pytree of numpy arrays shaped like ``params``.

    ``priors_sigma`` is one number for all, or a mapping from layer or leaf
    names to numbers; a leaf takes the entry of its longest matching name, and
    ``default`` where none matches.
    """
    leaves = trees.flatten(params)
    per_leaf = prior_std_by_leaf(list(leaves), priors_sigma, default=default)
    filled = {path: np.full(leaf.shape, per_leaf[path], np.float32) for path, leaf in leaves.items()}
    return trees.unflatten(filled, params)


def prior_std_by_leaf(
    paths: Sequence[str], priors_sigma: float | Mapping[str, float], *, default: float = 1.0
) -> dict[str, float]:
    """Leaf path -> the prior standard deviation of its scalars, by the rule of ``prior_std_tree``."""
    if isinstance(priors_sigma, Mapping):
        return _resolve_names(list(paths), priors_sigma, default)
    return dict.fromkeys(paths, _positive("priors_sigma", priors_sigma))


def weight_prior(
    partition: RandomPart, params: Params, priors_sigma: float | Mapping[str, float], prior_mean: str
) -> WeightPrior:
    """The prior of the random scalars of ``params``, or of the coordinates of a subspace.

    ``prior_mean`` is ``"map"`` (centred at the values in ``params``) or ``"zero"``. In a subspace the prior is
    that of all weights restricted to it, where ``priors_sigma`` must be one number.
    """
    if isinstance(partition, Subspace):
        std = np.full(partition.size, _positive("priors_sigma", priors_sigma), np.float32)
        centre = params if prior_mean == "map" else jax.tree.map(np.zeros_like, params)
        return WeightPrior(split(partition, centre), std)
    # By the numbers of scalars: a value for every frozen weight would take as much memory as the network.
    counts = partition.counts()
    per_leaf = prior_std_by_leaf(list(counts), priors_sigma)
    std = np.repeat(np.array([per_leaf[path] for path in counts], np.float32), list(counts.values()))
    mean = split(partition, params) if prior_mean == "map" else np.zeros(partition.size, np.float32)
    return WeightPrior(mean, std)


split = jax.jit(lambda partition, params: partition.split(params))


def target_scale(y: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Standard deviation of each column of the real rows of ``y``; one where a column is constant."""
    std = y[real > 0].std(axis=0, dtype=np.float64)
    return np.where(std > 0, std, 1.0).astype(np.float32)


def default_noise_prior(scale: np.ndarray) -> Any:
    """Half-normal on the noise std with the targets' own standard deviations ``(d,)`` as its scales."""
    import numpyro.distributions as dist

    return dist.HalfNormal(np.asarray(scale, np.float32))


def known_noise_prior(noise_std: np.ndarray, num_rows: int) -> Any:
    """Log-normal about a noise std ``(d,)`` that is known a hundred times better than ``num_rows`` rows would tell."""
    import numpyro.distributions as dist

    width = np.float32(0.1 / np.sqrt(2.0 * num_rows))
    return dist.LogNormal(np.log(np.asarray(noise_std, np.float32)), width)


def check_noise_prior(noise_prior: Any, num_outputs: int) -> Any:
    """``noise_prior`` itself, if it is a NumPyro distribution of positive scalars, one or one per output."""
    import numpyro.distributions as dist

    if not isinstance(noise_prior, dist.Distribution):
        raise OptionError(
            f"noise_prior must be a NumPyro distribution over positive numbers, such as "
            f"numpyro.distributions.HalfNormal(1.0); got {type(noise_prior).__name__}."
        )
    if tuple(noise_prior.event_shape) or tuple(noise_prior.batch_shape) not in ((), (1,), (num_outputs,)):
        raise OptionError(
            f"noise_prior has shape {tuple(noise_prior.batch_shape) + tuple(noise_prior.event_shape)}; "
            f"give a scalar distribution or one of shape ({num_outputs},), one entry per output."
        )
    support: Any = noise_prior.support
    low = getattr(support, "lower_bound", None)
    positive = support in (dist.constraints.positive, dist.constraints.nonnegative) or (
        low is not None and bool(np.all(np.asarray(low) >= 0.0))
    )
    if support.is_discrete or not positive:
        fault = "is over whole numbers" if support.is_discrete else "gives weight to negative numbers"
        raise OptionError(
            f"noise_prior={type(noise_prior).__name__} {fault}, but noise is a standard deviation. "
            "Use HalfNormal, LogNormal, Gamma, InverseGamma or HalfCauchy."
        )
    return noise_prior


def _resolve_names(paths: list[str], sigmas: Mapping[str, float], default: float) -> dict[str, float]:
    chosen = dict.fromkeys(paths, default)
    for name in sorted(sigmas, key=len):  # longer names are more specific, so they come last
        under = [path for path in paths if trees.is_under(path, trees.as_path(name))]
        if not under:
            known = sorted({trees.parent(path) for path in paths})
            raise SelectionError(
                f"priors_sigma names {name!r}, but the network has no such layer{nearest(name, known)}. "
                f"It has {', '.join(known)}."
            )
        chosen.update(dict.fromkeys(under, _positive(f"priors_sigma[{name!r}]", sigmas[name])))
    return chosen


def _positive(name: str, value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.floating | np.integer)
        or not 0 < value < np.inf
    ):
        raise OptionError(f"{name} must be a positive number, got {value!r}.")
    return float(value)
