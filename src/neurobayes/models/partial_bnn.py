"""The partially Bayesian network: any network, any part of it random."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from .. import _checks, predictive, selectors
from ..diagnostics import Diagnostics, LeafDiagnostics, by_leaf
from ..errors import ConvergenceError, ConvergenceWarning, NotFittedError, OptionError
from ..inference.base import Engine
from ..posterior import Posterior
from ..predictive import ClassPrediction, RegressionPrediction
from ..pretraining import Pretrained
from ..schedules import LearningRate
from ..subspaces import RandomPart
from . import fitting
from .base import as_user_network, softmax, to_target_shape
from .fitting import Fitted
from .progress import progress
from .sampling import Sampling


class PartialBNN:
    """A neural network with some of its weights random and the others fixed at their trained values.

    ``fit`` trains the whole network, then samples the posterior of the chosen
    weights given the others. One class serves every architecture and every
    choice of weights.

    Parameters
    ----------
    network : a network of any supported framework (``FlaxMLP``, ``FlaxConvNet``, ``FlaxTransformer``, your own
        Flax, NNX, Equinox or PyTorch module, or a pair ``(apply_fn, params)``).
    num_classes : number of classes for classification; None for regression.
    num_probabilistic_layers : the last k layers are Bayesian, the output layer counted: 1 is the output layer only.
    probabilistic_layer_names : names of layers that are wholly Bayesian.
    probabilistic_neurons : layer name -> index tuples of single Bayesian weights: ``(in, out)`` for dense layers,
        ``(in_channel, out_channel)`` for the whole kernel window of convolutions, ``(token, feature)`` for
        embeddings, ``(projection, in, out)`` for attention.
    bayesian : a selector (``nb.last(2) | nb.layers("Dense0") - nb.biases()``). All given choices are united;
        without any, the output layer is Bayesian.
    deterministic_weights : trained weights; ``fit`` then skips the deterministic stage. Weights from
        ``DeterministicNN.get_params()`` know the units they were trained in; a ``DeterministicNN`` will also do.
    noise_prior : NumPyro distribution of the noise standard deviation, in working units (standard deviations of
        the target when standardised); half-normal of scale one by default.
    prior_mean : centre of the weights' prior: ``"map"``, their trained values, or ``"zero"``. Centring at the
        trained values uses the data twice and makes intervals narrower than the posterior of an untrained prior.
    standardize : scale inputs and targets inside. ``"auto"``: yes, except that given weights decide by their own
        units, and plain arrays are taken to work in the user's.

    Attributes
    ----------
    is_regression : whether targets are numbers.

    References
    ----------
    Sharma, Farquhar, Nalisnick & Rainforth (2023), "Do Bayesian neural networks need to be fully stochastic?",
    AISTATS. Allec & Ziatdinov (2025), "Active and transfer learning with partially Bayesian neural networks for
    materials and chemicals", Digital Discovery.

    Examples
    --------
    >>> import numpy as np, neurobayes as nb
    >>> X = np.linspace(-1, 1, 40)[:, None]; y = X[:, 0] ** 2
    >>> model = nb.PartialBNN(nb.FlaxMLP([8], 1), num_probabilistic_layers=1)
    >>> mean, variance = model.fit(X, y, num_warmup=100, num_samples=200, sgd_epochs=50).predict(X)
    >>> mean.shape, variance.shape
    ((40,), (40,))
    """

    def __init__(
        self,
        network: Any,
        num_classes: int | None = None,
        *,
        num_probabilistic_layers: int | None = None,
        probabilistic_layer_names: Sequence[str] | None = None,
        probabilistic_neurons: Mapping[str, Sequence[tuple]] | None = None,
        bayesian: selectors.Selector | None = None,
        deterministic_weights: Any = None,
        noise_prior: Any = None,
        prior_mean: str = "map",
        standardize: bool | str = "auto",
    ):
        self.network = network
        self.num_classes = num_classes
        self.num_probabilistic_layers = num_probabilistic_layers
        self.probabilistic_layer_names = probabilistic_layer_names
        self.probabilistic_neurons = probabilistic_neurons
        self.bayesian = bayesian
        self.deterministic_weights = deterministic_weights
        self.noise_prior = noise_prior
        self.prior_mean = prior_mean
        self.standardize = standardize
        if num_classes is not None:
            _checks.check_positive_int("num_classes", num_classes, minimum=2)
        _checks.check_one_of("prior_mean", prior_mean, ("map", "zero"))
        if standardize not in (True, False, "auto"):
            raise OptionError(f"standardize must be True, False or 'auto', got {standardize!r}.")
        if noise_prior is not None and num_classes is not None:
            raise OptionError("noise_prior belongs to regression; classification has no noise parameter.")
        self._choice = selectors.from_keywords(
            num_probabilistic_layers, probabilistic_layer_names, probabilistic_neurons, bayesian
        )
        self._chosen = any(
            choice is not None
            for choice in (num_probabilistic_layers, probabilistic_layer_names, probabilistic_neurons, bayesian)
        )
        self._network = as_user_network(network)
        self._fitted: Fitted | None = None

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers rather than class labels."""
        return self.num_classes is None

    def fit(
        self,
        X: Any,
        y: Any,
        num_warmup: int = 500,
        num_samples: int | None = None,
        num_chains: int = 1,
        chain_method: str = "vectorized",
        *,
        sgd_epochs: int | None = None,
        sgd_lr: LearningRate | None = None,
        sgd_batch_size: int | None = None,
        swa_config: Mapping[str, Any] | None = None,
        map_sigma: float | str | None = "auto",
        priors_sigma: float | Mapping[str, float] = 1.0,
        select_neurons_config: Mapping[str, Any] | None = None,
        engine: str | Engine | None = None,
        until: str | None = None,
        seconds: float | None = None,
        warm_start: "bool | PartialBNN" = False,
        checkpoint_dir: str | os.PathLike | None = None,
        raise_on_failure: bool = False,
        progress_bar: bool = True,
        seed: int | None = None,
        rng_key: Any = None,
    ) -> Self:
        """Train the network, then sample the posterior of its Bayesian part; replaces any earlier fit.

        Parameters
        ----------
        X : (n, …) inputs in the user's units, or integer tokens ``(n, length)``.
        y : (n,) or (n, d) targets in the user's units, or (n,) class labels ``0 … num_classes - 1``.
        num_warmup, num_samples : iterations of each chain before and after adaptation; 1,000 draws by default, or
            at most 50,000 with ``until`` or ``seconds``. Exact draws need no warm-up.
        num_chains : independent chains.
        chain_method : ``"vectorized"``, ``"parallel"`` (one chain per device) or ``"sequential"``.
        sgd_epochs : epochs of the deterministic stage, or the most to consider where ``map_sigma="auto"``
            chooses how many.
        sgd_lr : step size or optax schedule; by default a cosine from 0.01 downwards.
        sgd_batch_size : rows per step; by default all of up to 1,024 rows, else 256.
        swa_config : weight averaging in the deterministic stage, as for ``DeterministicNN``.
        map_sigma : prior standard deviation of all weights in the deterministic stage; ``"auto"`` chooses it and
            the number of epochs by the loss on left-out rows; None trains without a prior.
        priors_sigma : prior standard deviation of the Bayesian weights: one number, or by layer name.
        select_neurons_config : choose single weights after training: ``method`` (``"variance"``, ``"gradient"``,
            ``"magnitude"``, ``"clustering"``), ``layer_names``, ``num_pairs_per_layer``, optionally ``seed`` and
            ``burn_in`` (share of the epochs before variance and gradient are gathered, half by default); united
            with the choices made at construction.
        engine : ``"auto"`` (the default: exact draws where the Bayesian weights enter the output linearly, else
            NUTS), the name of an engine, or its config (``nb.inference.NUTS(target_accept=0.9)``).
        until : end sampling at a quality of the predictions: ``"ess>400"``, ``"r_hat<1.01"``, or both with
            ``" and "``.
        seconds : end sampling after this much wall-clock time. Ctrl-C also ends it and keeps the draws made.
        warm_start : True, or another fitted model of the same network: keep its deterministic weights, units and
            choice of Bayesian weights, and go on from its sampler's last state and adaptation, with new rows for
            instance. A short ``num_warmup`` is then enough.
        checkpoint_dir : folder in which the run is saved as it goes. The same call after a crash continues it, and
            ends with the draws of an uninterrupted run.
        raise_on_failure : raise instead of warning when the draws should not be trusted.
        progress_bar : show progress on a terminal.
        seed, rng_key : source of all randomness; give one. The same seed gives the same draws.

        Returns
        -------
        The model itself.

        Raises
        ------
        DataError, OptionError, SelectionError, ParameterError
            Before any training starts.
        TrainingError
            Training or sampling became non-finite. The model is left as it was.
        CheckpointError
            ``checkpoint_dir`` holds another run.
        ConvergenceError
            With ``raise_on_failure``, when the draws should not be trusted. The model is left as it was.
        """
        sampling = Sampling.from_user(
            engine, chain_method, num_warmup, num_samples, num_chains, until, seconds, checkpoint_dir
        )
        training = fitting.pretraining_options(sgd_epochs, sgd_lr, sgd_batch_size, swa_config, map_sigma)
        key = _checks.as_key(rng_key, seed)
        if warm_start and select_neurons_config is not None:
            raise OptionError("warm_start keeps the earlier fit's Bayesian weights: leave select_neurons_config out.")
        plan = fitting.make_plan(
            self._network, X, y, choice=self._choice if self._chosen or select_neurons_config is None else None,
            select_config=select_neurons_config, given=self.deterministic_weights, num_classes=self.num_classes,
            standardize=self.standardize, noise_prior=self.noise_prior, prior_mean=self.prior_mean,
            priors_sigma=priors_sigma, previous=self._previous(warm_start), warm=bool(warm_start),
        )  # fmt: skip
        with progress(progress_bar) as report:
            fitted = fitting.run(plan, key, training, sampling, report)
        if not fitted.diagnostics.ok:
            if raise_on_failure:
                raise ConvergenceError(fitted.diagnostics.verdict)
            warnings.warn(fitted.diagnostics.verdict, ConvergenceWarning, stacklevel=2)
        self._fitted = fitted
        return self

    def predict(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of a new observation, or class probabilities and their uncertainty.

        Parameters
        ----------
        X : (n, …) inputs, rows shaped as at fit.

        Returns
        -------
        Regression: mean and variance (epistemic plus noise), both shaped like the training target, in the user's
        units. Classification: probabilities ``(n, classes)`` and the entropy of each row's probabilities ``(n,)``
        in nats: the total uncertainty. ``posterior_predictive`` splits both.
        """
        prediction = self.posterior_predictive(X)
        if isinstance(prediction, RegressionPrediction):
            return prediction.mean, prediction.var
        return prediction.probabilities, prediction.total_entropy

    def predict_classes(self, X: Any) -> np.ndarray:
        """The most probable class of each row, shape ``(n,)``."""
        if self.is_regression:
            raise OptionError("predict_classes needs a model built with num_classes; this one predicts numbers.")
        return np.argmax(self.predict(X)[0], axis=-1)

    def posterior_predictive(
        self, X: Any, *, quantiles: Sequence[float] | None = None, num_draws: int = 0, seed: int | None = None
    ) -> RegressionPrediction | ClassPrediction:
        """The predictive distribution with its uncertainty split into epistemic and aleatoric.

        Parameters
        ----------
        X : (n, …) inputs, rows shaped as at fit.
        quantiles : levels in (0, 1) at which to give quantiles of the predictive mixture (regression).
        num_draws : draws to return: of new observations (regression) or of class probabilities.
        seed : chooses the draws.
        """
        num_draws = _checks.check_positive_int("num_draws", num_draws, minimum=0)
        fitted, x = self._inputs(X)
        draws = None
        if num_draws:
            draws = self._draws(fitted, x, num_draws, noise=True, key=_checks.as_key(None, seed))
        if not self.is_regression:
            if quantiles is not None:
                raise OptionError("quantiles are for regression; for classes ask for draws of the probabilities.")
            probabilities, expected = predictive.class_moments(fitted.source, x)
            return ClassPrediction.of(probabilities, expected, draws)
        mean, variance = predictive.regression_moments(fitted.source, x)
        aleatoric = np.broadcast_to(fitted.source.noise_var, mean.shape)
        levels = None if quantiles is None else [_checks.check_fraction("quantiles", q) for q in quantiles]
        solved = None
        if levels is not None:
            values = fitted.scaling.mean_to_user(predictive.mixture_quantiles(fitted.source, x, levels))
            solved = dict(zip(levels, to_target_shape(values, fitted.target_ndim), strict=True))
        return RegressionPrediction(
            mean=to_target_shape(fitted.scaling.mean_to_user(mean), fitted.target_ndim),
            epistemic_var=to_target_shape(fitted.scaling.var_to_user(variance), fitted.target_ndim),
            aleatoric_var=to_target_shape(fitted.scaling.var_to_user(aleatoric), fitted.target_ndim),
            quantiles=solved,
            draws=draws,
        )

    def sample_from_posterior(
        self, X: Any, num_draws: int = 100, *, noise: bool = True, seed: int | None = None, rng_key: Any = None
    ) -> np.ndarray:
        """Draws of new observations at X, or of the function itself with ``noise=False``.

        Returns
        -------
        ``(num_draws, n)`` or ``(num_draws, n, d)`` in the user's units; for classification the draws' class
        probabilities ``(num_draws, n, classes)``. Rows of one draw share its weights. Draws are taken without
        replacement while there are enough.
        """
        fitted, x = self._inputs(X)
        num_draws = _checks.check_positive_int("num_draws", num_draws)
        return self._draws(fitted, x, num_draws, noise=noise, key=_checks.as_key(rng_key, seed))

    def get_samples(self, chain_dim: bool = False) -> dict[str, np.ndarray]:
        """Draws of the Bayesian weights by leaf (``Dense1.kernel``), and of the noise in the user's units.

        A wholly Bayesian leaf has shape ``(draws, *leaf_shape)``, a partly Bayesian one ``(draws, k)`` in the
        order of ``partition.indices``. ``chain_dim=True`` puts a chain axis first.
        """
        fitted = self._require_fitted()
        lead = fitted.posterior.draws.shape[:2]
        theta = fitted.posterior.draws[..., : fitted.source.partition.size]
        samples = {path: np.asarray(values) for path, values in fitted.source.partition.unravel(theta).items()}
        if self.is_regression:
            noise = fitted.source.noise_std.reshape(*lead, -1) * fitted.scaling.y_std
            samples["noise_std"] = noise[..., 0] if fitted.target_ndim == 1 else noise
        if chain_dim:
            return samples
        return {path: values.reshape(lead[0] * lead[1], *values.shape[2:]) for path, values in samples.items()}

    def diagnostics(self) -> Diagnostics:
        """R-hat and effective sample sizes of predictions and noise, divergences, and a verdict."""
        return self._require_fitted().diagnostics

    def layer_diagnostics(self) -> dict[str, LeafDiagnostics]:
        """R-hat and effective sample sizes of the weights, by leaf; ``diagnostics`` decides about trust."""
        return by_leaf(self.get_samples(chain_dim=True), independent=self.posterior.info.get("independent", False))

    def deterministic_predict(self, X: Any) -> np.ndarray:
        """What the trained network predicts without any Bayesian part: values, or class probabilities."""
        fitted, x = self._inputs(X)
        source = fitted.source
        outputs = predictive.deterministic_outputs(source.network, source.params, source.state, x)
        if not self.is_regression:
            return softmax(outputs)
        return to_target_shape(fitted.scaling.mean_to_user(outputs), fitted.target_ndim)

    @property
    def partition(self) -> RandomPart:
        """Which weights are Bayesian, after ``fit``."""
        return self._require_fitted().source.partition

    @property
    def num_bayesian_weights(self) -> int:
        """Number of Bayesian weights, after ``fit``."""
        return self.partition.size

    @property
    def posterior(self) -> Posterior:
        """Draws of the flat position, with the sampler's reports."""
        return self._require_fitted().posterior

    @property
    def fit_seconds(self) -> dict[str, float]:
        """Seconds spent on deterministic training and on sampling."""
        return self._require_fitted().seconds

    @property
    def pretraining(self) -> Pretrained | None:
        """The deterministic stage: weights, losses, the chosen regularisation; None if weights were given."""
        return self._require_fitted().pretrained

    @property
    def held_out_std(self) -> np.ndarray | None:
        """Error of the network's predictions on rows left out while its regularisation was chosen, ``(outputs,)``.

        In the user's units; None where weights or the length of training were given, and for classes.
        """
        fitted = self._require_fitted()
        search = None if fitted.pretrained is None else fitted.pretrained.search
        if search is None or search.unseen_rmse is None:
            return None
        return search.unseen_rmse * fitted.scaling.y_std

    def layer_context(self):
        """The architecture, its input shape and its partition where known, for the table of layers."""
        if self._fitted is None:
            return self.network, None, None
        return self.network, self._fitted.row_shape, self._fitted.source.partition

    def _previous(self, warm_start: Any) -> Fitted | None:
        """The fit whose compiled size, and with ``warm_start`` whose state, the next one starts from."""
        if warm_start is True:
            return self._require_fitted()
        if isinstance(warm_start, PartialBNN):
            if warm_start._network != self._network:
                raise OptionError("warm_start is a model of another network. Give a fit of the same network.")
            if self._chosen and warm_start._choice != self._choice:
                raise OptionError(f"warm_start has other Bayesian weights: {warm_start._choice!r}. Choose these.")
            return warm_start._require_fitted()
        if warm_start not in (False, None):
            raise OptionError(f"warm_start must be True, False or a fitted PartialBNN, got {warm_start!r}.")
        return self._fitted

    def _require_fitted(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("this PartialBNN is not fitted yet. Call fit(X, y) first.")
        return self._fitted

    def _inputs(self, X: Any) -> tuple[Fitted, np.ndarray]:
        fitted = self._require_fitted()
        _checks.check_columns(X, fitted.columns)
        inputs = _checks.as_inputs(X, self._network.input_spec, expected_shape=fitted.row_shape)
        return fitted, fitted.scaling.inputs(inputs)

    def _draws(self, fitted: Fitted, x: np.ndarray, num_draws: int, *, noise: bool, key: Any) -> np.ndarray:
        """Draws of observations, of the function, or of class probabilities, in the user's units."""
        seeds = np.asarray(jax.random.key_data(key)).ravel()
        generator = np.random.default_rng([int(word) for word in seeds])
        available = len(fitted.source.theta)
        picked = generator.choice(available, num_draws, replace=num_draws > available)
        outputs = predictive.function_draws(fitted.source, x, fitted.source.theta[picked])
        if not self.is_regression:
            return softmax(outputs)
        outputs = outputs.astype(float)
        if noise:
            outputs += fitted.source.noise_std[picked][:, None, :] * generator.standard_normal(outputs.shape)
        return to_target_shape(fitted.scaling.mean_to_user(outputs), fitted.target_ndim)
