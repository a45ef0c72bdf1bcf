"""The fully Bayesian network: the partition in which every weight is random."""

from typing import Any

from .. import selectors
from .partial_bnn import PartialBNN


class BNN(PartialBNN):
    """A network all of whose weights are Bayesian.

    Same as ``PartialBNN(network, bayesian=nb.everything(), prior_mean="zero", num_backbones=1)``: the
    prior is centred at zero, so that the trained weights are only where the
    sampler starts and the data are used once. Nothing is left deterministic, so
    one backbone is all there is.

    Parameters
    ----------
    network, num_classes, deterministic_weights, noise_prior, standardize : as for ``PartialBNN``.
    prior_mean : centre of the weights' prior, ``"zero"`` or ``"map"``.
    noise : ``"constant"``: one unknown level for each output; ``"network"``: the last ``d`` of ``2 d`` outputs are the
        logarithms of the noise standard deviations, as for ``PartialBNN``.
    """

    def __init__(
        self,
        network: Any,
        num_classes: int | None = None,
        *,
        deterministic_weights: Any = None,
        noise_prior: Any = None,
        prior_mean: str = "zero",
        standardize: bool | str = "auto",
        noise: str = "constant",
    ):
        super().__init__(
            network,
            num_classes,
            bayesian=selectors.everything(),
            deterministic_weights=deterministic_weights,
            noise_prior=noise_prior,
            prior_mean=prior_mean,
            standardize=standardize,
            num_backbones=1,
            noise=noise,
        )
