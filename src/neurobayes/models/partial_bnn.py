"""The partially Bayesian network: any network, any part of it random."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from .. import _checks, selectors
from ..backbones import Backbones
from ..data import Scaling
from ..diagnostics import Diagnostics, LeafDiagnostics, by_leaf
from ..errors import ConvergenceError, ConvergenceWarning, OptionError
from ..inference.base import Engine
from ..out_of_fold import OutOfFold
from ..posterior import Posterior
from ..pretraining import Pretrained
from ..schedules import LearningRate
from ..subspaces import RandomPart
from . import deterministic_stage, fitting
from .base import as_user_network, check_standardize
from .fitting import Fitted
from .noise import check_noise
from .predicting import Predicting, check_calibration
from .progress import progress
from .sampling import Sampling


class PartialBNN(Predicting):
    """A neural network with some of its weights random and the others fixed at their trained values.

    ``fit`` trains the whole network, then samples the posterior of the chosen
    weights given the others. It does so for several backbones, each of which
    leaves out some of the rows; predictions are their mixture, with the
    variance that the left-out rows ask for. One class serves every
    architecture and every choice of weights.

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
    standardize : scale inputs and targets inside. ``"compressed"``: columns of a table with long tails (a skewness
        above 1 or an excess kurtosis above 3) are compressed as well, by an inverse hyperbolic sine. ``"auto"``: scale,
        and compress where the left-out rows of several backbones ask for it; but given weights decide by their own
        units, and plain arrays are taken to work in the user's.
    num_backbones : how many networks are trained, each without an eighth of the rows (a quarter of less than 600).
        ``"auto"``: 16 where the posterior of the Bayesian part is exact (32 for less than 128 rows, fewer for costly
        networks), 4 where it is sampled (2 with more than 1,000 weights to sample); given weights are one. With 1, one
        network is trained on all rows, and unless the first layer is Bayesian intervals are known to be too narrow.
    calibration : ``"out_of_fold"``: the predictive variance is ``a * epistemic + b`` with the factor and the noise
        that make left-out rows most likely (for classes, a temperature); None: the variance of the mixture as the
        posteriors give it. Each prediction may ask for the other. A single backbone has no left-out rows, and is
        never calibrated here.
    noise : ``"varying"``: with that calibration, the logarithm of the noise variance is linear in the columns of a
        table (of up to 100) and in the prediction, as far as errors on left-out rows show it; ``"constant"``: the same
        for all rows; ``"network"``: the network gives it. For a target of ``d`` columns it then has ``2 d`` outputs:
        first the means, then the *logarithms* of the noise *standard deviations*, in working units. Training, sampling
        and prediction take them as such, and left-out rows fit one factor on all noise variances.

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
        num_backbones: int | str = "auto",
        calibration: str | None = "out_of_fold",
        noise: str = "varying",
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
        self.num_backbones = num_backbones
        self.calibration = calibration
        self.noise = noise
        if isinstance(num_backbones, str):
            _checks.check_one_of("num_backbones", num_backbones, ("auto",))
        else:
            _checks.check_positive_int("num_backbones", num_backbones)
        check_calibration(calibration)
        if num_classes is not None:
            _checks.check_positive_int("num_classes", num_classes, minimum=2)
        check_noise(noise, num_classes, noise_prior)
        _checks.check_one_of("prior_mean", prior_mean, ("map", "zero"))
        check_standardize(standardize, (True, False, "auto", "compressed"))
        self._choice = selectors.from_keywords(
            num_probabilistic_layers, probabilistic_layer_names, probabilistic_neurons, bayesian
        )
        self._chosen = any(
            choice is not None
            for choice in (num_probabilistic_layers, probabilistic_layer_names, probabilistic_neurons, bayesian)
        )
        self._network = as_user_network(network)
        self._fitted: Fitted | None = None

    def fit(
        self,
        X: Any,
        y: Any,
        num_warmup: int = 500,
        num_samples: int | None = None,
        num_chains: int = 1,
        chain_method: str = "vectorized",
        *,
        groups: Any = None,
        sgd_epochs: int | None = None,
        sgd_lr: LearningRate | None = None,
        sgd_batch_size: int | None = None,
        swa_config: Mapping[str, Any] | None = None,
        map_sigma: float | str | None = "auto",
        priors_sigma: float | str | Mapping[str, float] = 1.0,
        select_neurons_config: Mapping[str, Any] | None = None,
        engine: str | Engine | None = None,
        until: str | None = None,
        seconds: float | None = None,
        warm_start: "bool | PartialBNN" = False,
        room_for: int | None = None,
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
            at most 50,000 with ``until`` or ``seconds``. Exact draws need no warm-up. Several backbones share exact
            draws, with at least 8 each; of sampled draws each of ``K`` makes ``num_samples / sqrt(K)``.
        num_chains : independent chains.
        chain_method : ``"vectorized"``, ``"parallel"`` (one chain per device) or ``"sequential"``.
        groups : (n,) labels, such as the batch or the sample a row is from. Rows of one group are left out together by
            backbones and folds, so that what left-out rows say holds for new groups. None: for new rows from the same
            groups, except that repeated measurements of one input stay together. With a single backbone only the
            search of prior scale and length goes by groups; its intervals are corrected by nothing.
        sgd_epochs : epochs of the deterministic stage, or the most to consider where ``map_sigma="auto"``
            chooses how many. With 0 nothing is trained: fixed weights keep their random initial values, which know
            nothing of the data, and there is one backbone; it takes ``prior_mean="zero"``.
        sgd_lr : step size or optax schedule; by default a cosine from 0.01 downwards.
        sgd_batch_size : rows per step; by default all of up to 256 rows, else 128.
        swa_config : weight averaging in the deterministic stage, as for ``DeterministicNN``.
        map_sigma : prior standard deviation of all weights in the deterministic stage; ``"auto"`` chooses it and
            the number of epochs by the loss on left-out rows; None trains without a prior.
        priors_sigma : prior standard deviation of the Bayesian weights: one number, or by layer name; ``"auto"``
            learns one for each kernel and bias by the evidence (``posterior.info["priors_sigma"]`` has them).
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
        room_for : the most rows that this and later fits will have, where rows are added a few at a time: everything
            is compiled for so many at once, and the default number of backbones is that of so many rows. Later fits
            then compile nothing, once there are as many rows as backbones (16 of 128 rows or more, else 32). Each takes
            about as long as one of so many rows.
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
        training = fitting.pretraining_options(
            sgd_epochs, sgd_lr, sgd_batch_size, swa_config, map_sigma, least_epochs=0
        )
        key = _checks.as_key(rng_key, seed)
        if warm_start and select_neurons_config is not None:
            raise OptionError("warm_start keeps the earlier fit's Bayesian weights: leave select_neurons_config out.")
        plan = fitting.make_plan(
            self._network, X, y, choice=self._choice if self._chosen or select_neurons_config is None else None,
            select_config=select_neurons_config, given=self.deterministic_weights, num_classes=self.num_classes,
            standardize=self.standardize, noise_prior=self.noise_prior, prior_mean=self.prior_mean,
            priors_sigma=priors_sigma, num_backbones=self.num_backbones, engine=sampling.engine,
            noise=self.noise, groups=groups, untrained=training.epochs == 0, previous=self._previous(warm_start),
            warm=bool(warm_start), room_for=room_for,
        )  # fmt: skip
        fitting.check_groups(plan, training)
        if self.num_backbones == 1:
            above_features = self.prior_mean == "map" and not plan.from_inputs and not plan.untrained
            deterministic_stage.warn_of_one(plan.prepared.num_rows, partial=above_features)
        with progress(progress_bar) as report:
            fitted = fitting.run(plan, key, training, sampling, report)
        if not fitted.diagnostics.ok:
            if raise_on_failure:
                raise ConvergenceError(fitted.diagnostics.verdict)
            warnings.warn(fitted.diagnostics.verdict, ConvergenceWarning, stacklevel=2)
        self._fitted = fitted
        return self

    def diagnostics(self) -> Diagnostics:
        """R-hat and effective sample sizes of predictions and noise, divergences, and a verdict."""
        return self._require_fitted().diagnostics

    def layer_diagnostics(self) -> dict[str, LeafDiagnostics]:
        """R-hat and effective sample sizes of the weights of the (first) backbone, by leaf.

        ``diagnostics`` decides about trust.
        """
        return by_leaf(
            self._samples_of(self._require_fitted().members[:1]),
            independent=self._require_fitted().members[0].posterior.info.get("independent", False),
        )

    @property
    def partition(self) -> RandomPart:
        """Which weights are Bayesian, after ``fit``; of the first backbone, where each has its own choice."""
        return self._require_fitted().members[0].source.partition

    @property
    def num_bayesian_weights(self) -> int:
        """Number of Bayesian weights, after ``fit``."""
        return self.partition.size

    @property
    def posterior(self) -> Posterior:
        """Draws of the flat position, with the sampler's reports; one backbone's chains after another's."""
        return self._require_fitted().posterior

    @property
    def fit_seconds(self) -> dict[str, float]:
        """Seconds spent on deterministic training and on sampling."""
        return self._require_fitted().seconds

    @property
    def pretraining(self) -> Pretrained | None:
        """The deterministic stage of the (first) backbone: weights, losses, the chosen regularisation.

        None if weights were given, or nothing was trained.
        """
        return self._require_fitted().pretrained

    @property
    def backbones(self) -> Backbones | None:
        """All backbones, which rows each has seen, and the loss on left-out rows; None for a single one."""
        return self._require_fitted().ensemble

    @property
    def out_of_fold(self) -> OutOfFold | None:
        """What left-out rows say: ``a``, ``b``, the error and coverage to expect; None for a single backbone."""
        return self._require_fitted().out_of_fold

    @property
    def held_out_std(self) -> np.ndarray | None:
        """Error of the deterministic stage's predictions on rows left out of training, ``(outputs,)``.

        In the user's units; None for a single network whose weights or length of training were given or that gives
        the noise itself, and for classes.
        """
        fitted = self._require_fitted()
        search = None if fitted.pretrained is None else fitted.pretrained.search
        unseen = None if search is None else search.unseen_rmse
        if fitted.ensemble is not None:
            unseen = None if fitted.ensemble.unseen_rmse is None else fitted.ensemble.unseen_rmse[0]
        return None if unseen is None else unseen * fitted.scaling.y_std

    @property
    def scaling(self) -> Scaling:
        """How inputs and targets are standardised, and which columns are compressed (``compression``)."""
        return self._require_fitted().scaling

    def layer_context(self):
        """The architecture, its input shape and its partition where known, for the table of layers."""
        if self._fitted is None:
            return self.network, None, None
        return self.network, self._fitted.row_shape, self._fitted.members[0].source.partition

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
