"""Where a model takes the noise of its targets from: one level, left-out rows, or an output of the network."""

from typing import Any

from .. import _checks, priors
from ..errors import OptionError
from ..inference.base import Engine
from ..inference.last_layer import LastLayer
from ..likelihoods import Categorical, Gaussian, HeteroskedasticGaussian, Likelihood
from .base import Prepared
from .deterministic_stage import target_scale

NOISE = ("varying", "constant", "network")


def check_noise(noise: Any, num_classes: int | None, noise_prior: Any) -> None:
    """Raise where the options of a model say two things about its noise."""
    _checks.check_one_of("noise", noise, NOISE)
    if num_classes is not None and (noise == "network" or noise_prior is not None):
        given = "noise='network'" if noise == "network" else "noise_prior"
        raise OptionError(f"{given} belongs to regression; classification has no noise parameter.")
    if noise == "network" and noise_prior is not None:
        raise OptionError(
            "noise='network' leaves no noise level for noise_prior: the network's weights decide it, and priors_sigma "
            "is their prior. Leave noise_prior out."
        )


def likelihood_of(noise: str, num_classes: int | None) -> Likelihood:
    """The likelihood that a choice of noise stands for."""
    if num_classes is not None:
        return Categorical()
    return HeteroskedasticGaussian() if noise == "network" else Gaussian()


def check_engine(engine: Engine | None, likelihood: Likelihood) -> None:
    """Raise, before any training, where an engine needs noise that is known but for its level."""
    if not isinstance(likelihood, HeteroskedasticGaussian):
        return
    asked = "engine='last_layer'" if isinstance(engine, LastLayer) else None
    if getattr(engine, "collapse", False):
        asked = "collapse=True"
    if asked is not None:
        raise OptionError(
            f"{asked} needs Gaussian noise of one level for each output, and with noise='network' the network gives "
            "it. Use engine='auto' or engine='nuts', or noise='varying' with a network of half the outputs."
        )


def noise_prior_of(given: Any, likelihood: Likelihood, prepared: Prepared) -> Any:
    """The checked prior of the noise std, by default that of the targets' spread; None where nothing is unknown."""
    if not likelihood.num_noise(prepared.num_outputs):
        return None
    prior = priors.default_noise_prior(target_scale(prepared.rows)) if given is None else given
    return priors.check_noise_prior(prior, prepared.num_outputs)
