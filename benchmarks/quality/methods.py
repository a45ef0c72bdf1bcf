"""What is compared: our model with its one configuration, and baselines run on the same splits.

Each is a function ``(problem, options, seed) -> Prediction``. The test targets are taken out of the problem before.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.quality import configuration
from benchmarks.quality.data import Problem

DESCRIPTIONS = {
    "ours": "PartialBNN, the one configuration of this benchmark",
    "gp": "exact Gaussian process (scikit-learn): ARD squared-exponential kernel and white noise, hyperparameters by "
    "marginal likelihood on at most 1,000 rows, conditioned on at most 2,000 (random rows of larger sets)",
    "forest": "random forest of 300 trees, the training targets that share a leaf weighted as in quantile regression "
    "forests: their mean, variance, and 2.5 % and 97.5 % quantiles",
    "ensemble": "deep ensemble of 5 networks [64, 64] with a mean and a variance output each, each stopped on its own "
    "tenth of the training rows; the mixture",
    "logistic": "logistic regression (scikit-learn), inputs standardised",
    "forest_classes": "random forest of 500 trees (scikit-learn)",
}


@dataclasses.dataclass
class Prediction:
    """Mean and variance of each test row, or class probabilities; more where the method has it."""

    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    log_density: Callable[[np.ndarray], np.ndarray] | None = None  # of the test rows' targets, in their units
    interval: tuple[np.ndarray, np.ndarray] | None = None
    probabilities: np.ndarray | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def network_for(problem: Problem, options: Mapping[str, Any]) -> Any:
    """The network that suits the rows; ``options`` are those of the fully connected one."""
    import neurobayes as nb

    outputs = problem.num_classes or 1
    if problem.network == "convnet":
        input_dim = max(problem.X_train.ndim - 2, 1)
        return nb.FlaxConvNet(input_dim, target_dim=outputs, **configuration.NETWORKS["convnet"])
    if problem.network == "transformer":
        return nb.FlaxTransformer(
            problem.vocabulary, problem.X_train.shape[1], outputs, pad_token=0, **configuration.NETWORKS["transformer"]
        )
    return nb.FlaxMLP(target_dim=outputs, **options)


def fit_ours(problem: Problem, options: Mapping[str, Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """The fitted model, and what it warned of."""
    import neurobayes as nb

    network, constructor, fit = configuration.sort_options(options)
    model = nb.PartialBNN(network_for(problem, network), num_classes=problem.num_classes, **constructor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(problem.X_train, problem.y_train, progress_bar=False, seed=seed, **fit)
    said = sorted({f"{warning.category.__name__}: {warning.message}" for warning in caught})
    return model, {"warnings": said} if said else {}


def ours(problem: Problem, options: Mapping[str, Any], seed: int) -> Prediction:
    model, notes = fit_ours(problem, options, seed)
    if problem.num_classes:
        return Prediction(probabilities=np.asarray(model.predict(problem.X_test)[0]), notes=notes)
    mean, var = model.predict(problem.X_test)
    density = None
    if hasattr(model, "log_predictive_density"):
        density = lambda y: np.asarray(model.log_predictive_density(problem.X_test, y))  # noqa: E731
    return Prediction(mean, var, log_density=density, notes=notes)


def gp(problem: Problem, options: Mapping[str, Any], seed: int) -> Prediction:
    from sklearn.gaussian_process import GaussianProcessRegressor, kernels

    scaled, y_mean, y_std = _scaled(problem)
    order = np.random.default_rng(seed).permutation(len(scaled.y_train))
    kernel = kernels.ConstantKernel(1.0, (1e-3, 1e4)) * kernels.RBF(
        np.full(scaled.X_train.shape[1], 2.0),  # pyright: ignore[reportArgumentType]
        (1e-2, 1e4),
    ) + kernels.WhiteKernel(0.1, (1e-8, 10.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # length scales at their bounds: columns that do not matter
        few = order[: options["hyperparameter_rows"]]
        tuned = GaussianProcessRegressor(kernel).fit(scaled.X_train[few], scaled.y_train[few])
        many = order[: options["rows"]]
        model: Any = GaussianProcessRegressor(tuned.kernel_, optimizer=None)  # pyright: ignore[reportArgumentType]
        mean, std = model.fit(scaled.X_train[many], scaled.y_train[many]).predict(scaled.X_test, return_std=True)
    return Prediction(y_mean + y_std * mean, (y_std * std) ** 2, notes={"rows": len(many)})


def forest(problem: Problem, options: Mapping[str, Any], seed: int) -> Prediction:
    """Meinshausen's (2006) weights: how often a training row shares the leaf of a test row, over the leaf's size."""
    from scipy import sparse
    from sklearn.ensemble import RandomForestRegressor

    y = problem.y_train
    model = RandomForestRegressor(options["trees"], min_samples_leaf=options["min_leaf"], random_state=seed)
    model.fit(problem.flat_train, y)
    leaves = np.vstack([model.apply(problem.flat_train), model.apply(problem.flat_test)])
    _, leaf = np.unique(leaves + np.arange(leaves.shape[1]) * (leaves.max() + 1), return_inverse=True)
    leaf = leaf.reshape(leaves.shape)
    rows = np.repeat(np.arange(len(leaves)), leaves.shape[1])
    member = sparse.csr_matrix((np.ones(leaf.size), (rows, leaf.ravel())))
    train, test = member[: len(y)], member[len(y) :]
    share = sparse.diags(1 / np.maximum(np.asarray(train.sum(0)).ravel(), 1))
    weights = (test @ share @ train.T).toarray() / leaves.shape[1]
    mean = weights @ y
    var = np.maximum(weights @ y**2 - mean**2, 1e-6 * y.var())
    order = np.argsort(y)
    cumulative = np.cumsum(weights[:, order], 1)
    lower, upper = (y[order][np.argmax(cumulative >= level - 1e-9, 1)] for level in (0.025, 0.975))
    return Prediction(mean, var, interval=(lower, upper))


def ensemble(problem: Problem, options: Mapping[str, Any], seed: int) -> Prediction:
    """Lakshminarayanan et al. (2017) without adversarial training; see DESCRIPTIONS."""
    scaled, y_mean, y_std = _scaled(problem)
    outputs = np.stack([_member(scaled, options, 1000 * seed + i) for i in range(options["members"])])
    means, variances = outputs[..., 0], np.logaddexp(outputs[..., 1], 0) + 1e-6

    def log_density(y: np.ndarray) -> np.ndarray:
        error = (y - y_mean) / y_std - means
        members = -0.5 * (np.log(2 * np.pi * variances) + error**2 / variances)
        return np.logaddexp.reduce(members, 0) - np.log(len(outputs)) - np.log(y_std)

    mean, var = means.mean(0), variances.mean(0) + means.var(0)
    return Prediction(y_mean + y_std * mean, y_std**2 * var, log_density=log_density)


def _member(scaled: Problem, options: Mapping[str, Any], seed: int) -> np.ndarray:
    """Raw outputs ``(test rows, 2)`` of one network, trained with early stopping on rows of its own."""
    import neurobayes as nb

    order = np.random.default_rng(seed).permutation(len(scaled.y_train))
    count = max(1, round(options["held_out"] * len(order)))
    watch, train = order[:count], order[count:]
    model = nb.DeterministicNN(
        nb.FlaxMLP(options["hidden_dims"], 2),
        scaled.X_train.shape[1:],
        loss=gaussian_loss,
        standardize=False,
        seed=seed,
    )
    # The loss compares two outputs with one target; the second column of the targets only makes the shapes agree.
    y = np.repeat(scaled.y_train[:, None], 2, 1)
    model.train(
        scaled.X_train[train],
        y[train],
        epochs=options["epochs"],
        validation_data=(scaled.X_train[watch], y[watch]),
        early_stopping=options["patience"],
        track_statistics=False,
        progress_bar=False,
    )
    return model.predict(scaled.X_test)


def gaussian_loss(outputs: Any, y: Any) -> Any:
    """Negative log density of each row; the outputs are the mean and the inverse softplus of the variance."""
    import jax
    import jax.numpy as jnp

    var = jax.nn.softplus(outputs[:, 1]) + 1e-6
    return 0.5 * (jnp.log(2 * jnp.pi * var) + (y[:, 0] - outputs[:, 0]) ** 2 / var)


def _scaled(problem: Problem) -> tuple[Problem, float, float]:
    """The rows as vectors in standard deviations, and what undoes it for the targets."""
    flat = dataclasses.replace(problem, X_train=problem.flat_train, X_test=problem.flat_test, features=None)
    return flat.standardised(), float(problem.y_train.mean()), float(problem.y_train.std())


def logistic(problem: Problem, options: Mapping[str, Any], seed: int) -> Prediction:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return _classes(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), problem)


def forest_classes(problem: Problem, options: Mapping[str, Any], seed: int) -> Prediction:
    from sklearn.ensemble import RandomForestClassifier

    return _classes(RandomForestClassifier(options["trees"], random_state=seed), problem)


def _classes(model: Any, problem: Problem) -> Prediction:
    model.fit(problem.flat_train, problem.y_train)
    probabilities = np.zeros((len(problem.flat_test), problem.num_classes or 2))
    probabilities[:, model.classes_] = model.predict_proba(problem.flat_test)  # a class may have no training row
    return Prediction(probabilities=probabilities)


METHODS: dict[str, Callable[[Problem, Mapping[str, Any], int], Prediction]] = {
    "ours": ours,
    "gp": gp,
    "forest": forest,
    "ensemble": ensemble,
    "logistic": logistic,
    "forest_classes": forest_classes,
}
