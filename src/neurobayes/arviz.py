"""Fits as ArviZ data trees, for its plots, for leave-one-out cross-validation and for comparing models.

Vehtari, Gelman & Gabry (2017), "Practical Bayesian model evaluation using leave-one-out cross-validation and
WAIC", Statistics and Computing 27, doi:10.1007/s11222-016-9696-4.
"""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks, predictive
from .errors import OptionError, missing_extra
from .mixture import gaussian_log_density
from .models.fitting import Fitted
from .models.partial_bnn import PartialBNN

if TYPE_CHECKING:
    from xarray import DataTree

_STAT_NAMES = {"num_steps": "n_steps", "accept_prob": "acceptance_rate"}
"""Sampler reports whose usual names in ArviZ differ from ours."""


def to_arviz(model: PartialBNN, X: Any = None, y: Any = None, *, seed: int | None = None) -> "DataTree":
    """A fitted model as an ArviZ ``DataTree``; everything is in the user's units.

    Several backbones are so many more chains, which count alike here and are not calibrated. A model keeps no data, so
    whatever depends on rows needs them here; leave-one-out cross-validation needs the training rows.

    Parameters
    ----------
    model : a fitted model.
    X : (n, …) rows to predict, None for none.
    y : (n,) or (n, d) targets of these rows, or (n,) labels, None for none.
    seed : chooses the draws of new observations.

    Returns
    -------
    Groups ``posterior`` (weights by leaf, ``Dense1.kernel``, and ``noise_std`` unless the network gives it) and
    ``sample_stats``; with X also ``posterior_predictive``; with y too ``log_likelihood`` (nats per row, chain and draw)
    and ``observed_data``.

    Raises
    ------
    MissingExtraError
        The extra ``arviz`` is not installed.
    OptionError
        ``y`` without ``X``.
    DataError
        X or y do not fit the model.

    Examples
    --------
    >>> import neurobayes as nb
    >>> data = nb.datasets.friedman(40, seed=0)
    >>> model = nb.PartialBNN(nb.FlaxMLP([4], 1)).fit(data.X, data.y, num_samples=100, sgd_epochs=10, map_sigma=1.0)
    >>> tree = nb.to_arviz(model, data.X, data.y)
    >>> sorted(tree.children)
    ['log_likelihood', 'observed_data', 'posterior', 'posterior_predictive', 'sample_stats']
    """
    try:
        import arviz_base
    except ImportError as error:
        raise missing_extra("arviz-base", "arviz", "nb.to_arviz") from error

    if y is not None and X is None:
        raise OptionError("to_arviz(model, y=...) needs X too, the inputs of the same rows.")
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": model.get_samples(chain_dim=True),
        "sample_stats": _sample_stats(model),
    }
    dims: dict[str, list[str]] = {}
    if X is not None:
        groups |= _by_row(model, X, y, seed)
        dims["y"] = ["row", "output"][: np.ndim(groups["posterior_predictive"]["y"]) - 2]
    with warnings.catch_warnings():
        # Many backbones with a few exact draws each are more chains than draws.
        warnings.filterwarnings("ignore", message="Found chain dimension to be longer than draw dimension")
        return arviz_base.from_dict(groups, dims=dims, attrs={"/": {"inference_library": "neurobayes"}})


def _sample_stats(model: PartialBNN) -> dict[str, np.ndarray]:
    stats = {_STAT_NAMES.get(name, name): values for name, values in model.posterior.stats.items()}
    if "potential_energy" in stats:
        stats["lp"] = -stats.pop("potential_energy")
    return stats


def _by_row(model: PartialBNN, X: Any, y: Any, seed: int | None) -> dict[str, dict[str, np.ndarray]]:
    """The groups that depend on rows, each variable ``(chain, draw, row, …)``."""
    fitted, x = model._inputs(X)
    lead = fitted.posterior.draws.shape[:2]
    outputs, noise = _all_draws(fitted, x, lead[1])
    generator = np.random.default_rng(seed or 0)
    single = fitted.target_ndim == 1
    if model.is_regression:
        mean = fitted.scaling.mean_to_user(outputs)
        noise_std = noise * fitted.scaling.y_std
        new = mean + noise_std * generator.standard_normal(mean.shape)
        new = new[..., 0] if single else new
        observed = None if y is None else _checks.as_targets(y, len(x), training=False, num_outputs=mean.shape[-1])
        log_likelihood = (
            None if observed is None else gaussian_log_density(observed.reshape(len(x), -1), mean, noise_std)
        )
    else:
        log_probabilities = _log_softmax(outputs)
        new = np.argmax(log_probabilities + generator.gumbel(size=outputs.shape), axis=-1)
        observed = None if y is None else _checks.as_class_labels(y, len(x), outputs.shape[-1], training=False)
        log_likelihood = None if observed is None else log_probabilities[:, np.arange(len(x)), observed]
    groups = {"posterior_predictive": {"y": new.reshape(*lead, *new.shape[1:])}}
    if observed is not None and log_likelihood is not None:
        groups["log_likelihood"] = {"y": log_likelihood.reshape(*lead, -1)}
        groups["observed_data"] = {"y": observed[:, 0] if single and observed.ndim == 2 else observed}
    return groups


def _all_draws(fitted: Fitted, x: np.ndarray, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (or logits) and noise of ``num_draws`` draws of every chain of every backbone, as their posteriors give."""
    outputs, noise = [], []
    for member in fitted.members:
        source = member.source
        kept = np.arange(len(source.theta)).reshape(member.posterior.num_chains, -1)[:, :num_draws].ravel()
        means, noise_std = predictive.observation_draws(source, x, source.theta[kept], source.noise_std[kept])
        outputs.append(means.astype(float))
        noise.append(noise_std.astype(float))
    return np.concatenate(outputs), np.concatenate(noise)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
