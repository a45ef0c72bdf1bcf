"""A network with one value for each weight: maximum a posteriori or maximum likelihood."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import optax

from .. import _checks, data, schedules, training
from ..data import Scaling
from ..errors import DataError, NotFittedError, OptionError, unknown_choice
from ..likelihoods import Categorical, Gaussian, HeteroskedasticGaussian, Likelihood, RowLoss
from ..network_info import NetworkInfo
from ..predictive import deterministic_outputs
from ..pretraining import default_batch_size
from ..weight_statistics import TrainingStatistics
from .base import (
    InputTemplate,
    Prepared,
    TrainedParams,
    as_user_network,
    check_rows,
    check_standardize,
    constructor_text,
    network_info,
    output_width,
    prepare,
    softmax,
    to_target_shape,
)
from .extent import trained_network
from .progress import progress

LOSSES: dict[str, Likelihood] = {"mse": Gaussian(), "gaussian": Gaussian(), "cross_entropy": Categorical()}


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stop when the validation loss has not improved by ``min_delta`` for ``patience`` epochs."""

    patience: int = 50
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        _checks.check_positive_int("early_stopping['patience']", self.patience)
        _checks.check_positive("early_stopping['min_delta']", self.min_delta, allow_zero=True)

    @classmethod
    def from_user(cls, value: Any) -> "EarlyStopping | None":
        """From True, a patience, a dict with ``patience`` and ``min_delta``, or None/False."""
        if value is None or value is False:
            return None
        if isinstance(value, cls):
            return value
        if value is True:
            return cls()
        if isinstance(value, Mapping):
            for name in value:
                if name not in ("patience", "min_delta"):
                    raise unknown_choice("early_stopping entry", name, ("patience", "min_delta"))
            return cls(**value)
        return cls(patience=_checks.check_positive_int("early_stopping", value))


@dataclasses.dataclass(frozen=True)
class _Trained:
    """Everything training leaves behind; replaced as a whole, so that a failure changes nothing."""

    result: training.TrainingResult
    network_state: Any
    scaling: Scaling
    target_ndim: int
    columns: tuple[str, ...] | None


class DeterministicNN:
    """Trains a network to a single value of its weights.

    The objective is the negative log joint density divided by the number of
    rows: Gaussian (or categorical) likelihood and, with ``map=True``, a prior
    ``N(0, sigma**2)`` on every weight.

    Parameters
    ----------
    architecture : a network of any supported framework.
    input_shape : shape of one row of X, such as ``(8,)`` or ``(28, 28, 1)``.
    learning_rate : step size or optax schedule for the named optimisers.
    map : whether the weights have a prior.
    sigma : its standard deviation.
    loss : ``"mse"`` (Gaussian noise of standard deviation ``noise_std``; the default), ``"cross_entropy"`` (class
        labels; the network outputs logits), or a function ``loss(outputs, y)`` that gives one number per row,
        read as a negative log density.
    swa_config : weight averaging: a dict with ``schedule`` (``"constant"``, ``"linear"`` or ``"cyclic"``) and
        optionally ``start_pct``, ``swa_lr``, ``cycle_length``, ``collect_freq``.
    optimizer : ``"adam"`` (default), ``"sgd"``, ``"lbfgs"`` (full batch, for small data), or any optax
        transformation, which brings its own step size: ``learning_rate`` must then be left out.
    noise_std : noise the Gaussian loss assumes, in working units (standard deviations of the target when
        ``standardize``). Against it ``sigma`` sets the strength of the regularisation.
    noise : ``"constant"``: that noise; ``"network"``: of ``2 d`` outputs for a target of ``d`` columns the last ``d``
        are the logarithms of the noise standard deviations, in working units, and ``noise_std`` has no part; the
        weights are then for ``PartialBNN(network, noise="network")``. ``predict`` gives the means.
    standardize : scale inputs and targets inside; predictions come back in the user's units. ``"compressed"``:
        columns of a table with long tails are compressed as well, see ``PartialBNN``.
    seed, rng_key : source of all randomness; give one.

    Raises
    ------
    OptionError
        An option is unknown, out of range, or contradicts another.

    Examples
    --------
    >>> import numpy as np, neurobayes as nb
    >>> X = np.linspace(-1, 1, 40)[:, None]; y = X[:, 0] ** 2
    >>> model = nb.DeterministicNN(nb.FlaxMLP([8], 1), input_shape=(1,), learning_rate=0.01)
    >>> model.train(X, y, epochs=50).predict(X).shape
    (40,)
    """

    def __init__(
        self,
        architecture: Any,
        input_shape: int | Sequence[int],
        learning_rate: schedules.LearningRate | None = None,
        map: bool = True,
        sigma: float = 1.0,
        loss: str | Callable | None = None,
        swa_config: Mapping[str, Any] | None = None,
        optimizer: str | optax.GradientTransformation | None = None,
        *,
        noise_std: float = 1.0,
        noise: str = "constant",
        standardize: bool | str = True,
        seed: int | None = None,
        rng_key: Any = None,
    ):
        self.architecture = architecture
        self.learning_rate = learning_rate
        self.map = map
        self.sigma = sigma
        self.loss = loss
        self.swa_config = swa_config
        self.optimizer = optimizer
        self.noise_std = noise_std
        self.noise = noise
        self.standardize = check_standardize(standardize, (True, False, "compressed"))
        self.seed = seed
        self.rng_key = rng_key
        shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        self.input_shape = tuple(_checks.check_positive_int("input_shape entry", size) for size in shape)
        _checks.check_positive("sigma", sigma)
        _checks.check_positive("noise_std", noise_std)
        schedules.AveragingConfig.from_user(swa_config)
        if learning_rate is not None and not callable(learning_rate):
            _checks.check_positive("learning_rate", learning_rate)
        self._network = as_user_network(architecture)
        self._likelihood = _likelihood_of(loss, noise)
        self._optimizer = _optimizer_of(optimizer, learning_rate)
        self._trained: _Trained | None = None
        template = InputTemplate(self.input_shape, self._network.input_spec.tokens)
        self._num_outputs = output_width(self._network, template.example)
        if not self.is_regression and self._num_outputs < 2:
            raise OptionError(
                f"loss='cross_entropy' needs one output for each class, and the network has {self._num_outputs}. Build "
                "it with target_dim=2 or more; for numbers leave loss out."
            )
        self._example = template.example

    def __repr__(self) -> str:
        text, trained = constructor_text(self), self._trained
        return text if trained is None else f"{text}; trained for {len(trained.result.history['loss'])} epochs"

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers rather than class labels."""
        return self._likelihood.is_regression

    def train(
        self,
        X: Any,
        y: Any,
        epochs: int = 500,
        batch_size: int | None = None,
        *,
        validation_data: tuple[Any, Any] | None = None,
        early_stopping: bool | int | Mapping[str, float] | None = None,
        warm_start: bool = False,
        track_statistics: bool = True,
        burn_in: float = 0.5,
        progress_bar: bool = True,
    ) -> Self:
        """Train, replacing whatever was trained before.

        Parameters
        ----------
        X : (n, …) inputs in the user's units, rows shaped as ``input_shape``.
        y : (n,) or (n, d) targets, or (n,) integer class labels.
        epochs : passes over the data, at most, with early stopping.
        batch_size : rows per step, reshuffled every epoch; by default all of up to 256 rows, else 128.
        validation_data : ``(X_val, y_val)``; its mean negative log likelihood is in ``history``.
        early_stopping : True, a patience in epochs, or a dict with ``patience`` and ``min_delta``; stops on the
            validation loss and restores the weights where it was least.
        warm_start : continue from the current weights (and their units) instead of fresh ones.
        track_statistics : keep per-weight variance and gradient, for ``select_bayesian_components``.
        burn_in : share of the epochs, in [0, 1), before these are gathered; with early stopping they begin after as
            many epochs as its patience, if that is sooner.
        progress_bar : show progress on a terminal.

        Returns
        -------
        The model itself.

        Raises
        ------
        DataError, OptionError
            Before training starts.
        TrainingError
            The loss became infinite or NaN. The model is left as it was.
        """
        epochs = _checks.check_positive_int("epochs", epochs)
        if batch_size is not None:
            _checks.check_positive_int("batch_size", batch_size)
        burn_in = _checks.check_fraction("burn_in", burn_in, allow_zero=True)
        stopping = EarlyStopping.from_user(early_stopping)
        averaging = schedules.AveragingConfig.from_user(self.swa_config)
        self._check_combination(stopping, averaging, validation_data, batch_size)
        before = self._require_trained() if warm_start else None
        prepared = self._prepare(X, y, before)
        validation = None if validation_data is None else self._validation_rows(validation_data, prepared)
        whole = self._optimizer == "lbfgs"
        program = training.Program(
            self._network if whole else trained_network(self._network, prepared, epochs, batch_size),
            self._likelihood, self._optimizer, None if whole else default_batch_size(prepared.num_rows, batch_size),
            "validation" if validation is not None else None, stopping is not None, track_statistics,
        )  # fmt: skip
        steps = training.num_steps_per_epoch(program, prepared.num_rows)
        rate = 0.01 if self.learning_rate is None else self.learning_rate
        rates, collect = schedules.learning_rates(rate, epochs, steps), None
        if averaging is not None:
            rates, collect = averaging.apply(rates)
        with progress(progress_bar) as report:
            result, state = training.train(
                program, _checks.as_key(self.rng_key, self.seed), prepared.rows,
                self._settings(prepared, int(burn_in * epochs), stopping), learning_rates=rates, collect=collect,
                validation=validation, params=None if before is None else before.result.params,
                on_progress=lambda done, loss: report("training", done, epochs, f"loss {loss:.4g}"),
            )  # fmt: skip
        result = dataclasses.replace(result, params=jax.tree.map(np.asarray, result.params))
        self._trained = _Trained(result, state, prepared.scaling, prepared.target_ndim, prepared.columns)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The network's output in the user's units, shaped like the training target; or class probabilities."""
        trained = self._require_trained()
        _checks.check_columns(X, trained.columns)
        inputs = _checks.as_inputs(X, self._network.input_spec, expected_shape=self.input_shape)
        outputs = deterministic_outputs(
            self._network, trained.result.params, trained.network_state, trained.scaling.inputs(inputs)
        )
        if not self.is_regression:
            return softmax(outputs)
        return to_target_shape(trained.scaling.mean_to_user(self._likelihood.means(outputs)), trained.target_ndim)

    def predict_classes(self, X: Any) -> np.ndarray:
        """The most probable class of each row, shape ``(n,)``."""
        if self.is_regression:
            raise OptionError("predict_classes needs loss='cross_entropy'; this model predicts numbers.")
        return np.argmax(self.predict(X), axis=-1)

    def get_params(self) -> Any:
        """The trained weights, a nested dict of arrays that remembers the units it was trained in."""
        trained = self._require_trained()
        return TrainedParams.of(trained.result.params, trained.scaling, trained.result.statistics)

    @property
    def history(self) -> dict[str, np.ndarray]:
        """Losses by epoch: ``loss`` and, with validation data, ``validation_loss``."""
        return self._require_trained().result.history

    @property
    def state(self) -> training.Progress:
        """The last state of training: weights, optimiser state, epoch, averages."""
        return self._require_trained().result.progress

    @property
    def training_statistics(self) -> TrainingStatistics | None:
        """Per-weight variance and mean absolute gradient over the steps after burn-in, if tracked.

        These are those of the second half of the epochs, unless ``burn_in`` or early stopping says otherwise.
        """
        return self._require_trained().result.statistics

    @property
    def scaling(self) -> Scaling:
        """How inputs and targets are standardised."""
        return self._require_trained().scaling

    def network_info(self) -> NetworkInfo:
        """Layers, shapes and, once trained, weights and scores of the network."""
        if self._trained is None:
            return network_info(self._network, self._example)
        result = self._trained.result
        return network_info(self._network, self._example, result.params, result.statistics)

    def layer_context(self):
        """The architecture and its input shape, for the table of layers."""
        return self.architecture, self.input_shape, None

    def _require_trained(self) -> _Trained:
        if self._trained is None:
            raise NotFittedError("this DeterministicNN is not trained yet. Call train(X, y) first.")
        return self._trained

    def _prepare(self, X: Any, y: Any, before: _Trained | None) -> Prepared:
        if before is not None:
            check_rows(X, self._network, before.columns, self.input_shape)
        prepared = prepare(
            self._network, X, y, num_classes=None if self.is_regression else self._num_outputs,
            outputs_per_target=self._likelihood.outputs_per_target, standardize=self.standardize,
            scaling=None if before is None else before.scaling,
        )  # fmt: skip
        if prepared.row_shape != self.input_shape:
            raise DataError(f"rows of X have shape {prepared.row_shape}, but input_shape={self.input_shape}.")
        return prepared

    def _validation_rows(self, validation_data: Any, prepared: Prepared) -> training.Rows:
        if not isinstance(validation_data, tuple | list) or len(validation_data) != 2:
            raise DataError("validation_data must be the pair (X_val, y_val).")
        X, y = validation_data
        inputs = _checks.as_inputs(X, self._network.input_spec, expected_shape=self.input_shape, name="X_val")
        if self.is_regression:
            targets = _checks.as_targets(y, len(inputs), training=False, name="y_val", num_outputs=prepared.num_outputs)
            targets = prepared.scaling.targets(targets)
        else:
            targets = _checks.as_class_labels(y, len(inputs), self._num_outputs, training=False, name="y_val")
        size = data.bucket_size(len(inputs))
        scaled = prepared.scaling.inputs(inputs)
        return training.Rows(
            data.pad_rows(scaled, size), data.pad_rows(targets, size), data.row_weights(len(inputs), size)
        )

    def _settings(self, prepared: Prepared, burn_in: int, stopping: EarlyStopping | None) -> training.Settings:
        settings = training.Settings(
            row_weights=prepared.rows.real,
            prior_precision=np.float32(1.0 / self.sigma**2 if self.map else 0.0),
            noise_std=np.full(prepared.num_outputs, self.noise_std, np.float32),
            burn_in=np.int32(burn_in),
        )
        if stopping is None:
            return settings
        return settings._replace(
            burn_in=np.int32(min(burn_in, stopping.patience)),  # no run ends before its patience has passed
            patience=np.int32(stopping.patience),
            min_delta=np.float32(stopping.min_delta),
        )

    def _check_combination(self, stopping, averaging, validation_data, batch_size) -> None:
        if stopping is not None and validation_data is None:
            raise OptionError("early_stopping needs validation_data=(X_val, y_val) to watch.")
        if stopping is not None and averaging is not None:
            raise OptionError(
                "early_stopping restores one set of weights and swa_config averages many; choose one of them."
            )
        if self._optimizer == "lbfgs" and batch_size is not None:
            raise OptionError("optimizer='lbfgs' takes all rows in every step; leave batch_size out.")


def _likelihood_of(loss: Any, noise: Any) -> Likelihood:
    if _checks.check_one_of("noise", noise, ("constant", "network")) == "network":
        if loss not in (None, "gaussian"):
            raise OptionError(f"noise='network' is for the Gaussian loss; leave loss={loss!r} out.")
        return HeteroskedasticGaussian()
    if loss is None:
        return Gaussian()
    if isinstance(loss, str):
        return LOSSES[_checks.check_one_of("loss", loss, LOSSES)]
    if not callable(loss):
        raise unknown_choice("loss", loss, LOSSES)
    function: Callable[..., Any] = loss
    return RowLoss(function)


def _optimizer_of(optimizer: Any, learning_rate: Any) -> str | optax.GradientTransformation:
    if optimizer is None:
        return "adam"
    if isinstance(optimizer, str):
        return _checks.check_one_of("optimizer", optimizer, ("adam", "sgd", "lbfgs"))
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise OptionError(
            f"optimizer={optimizer!r} is neither a name ('adam', 'sgd', 'lbfgs') nor an optax transformation "
            "such as optax.adamw(1e-3)."
        )
    if learning_rate is not None:
        raise OptionError("an optax optimizer brings its own step size: leave learning_rate out.")
    return optimizer
