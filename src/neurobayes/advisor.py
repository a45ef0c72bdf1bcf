"""Which weights should be Bayesian: fits several choices on one trained network and scores them on held-out rows."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from . import _candidates, _checks, metrics, priors, selectors
from .errors import ConvergenceWarning, DataError, OptionError
from .inference.base import Engine, RunControl
from .likelihoods import Likelihood
from .models.base import TrainedParams, as_user_network, network_info, prepare
from .models.deterministic import DeterministicNN
from .models.fitting import pretraining_options
from .models.noise import check_noise, likelihood_of
from .models.partial_bnn import PartialBNN
from .models.sampling import Sampling
from .network_info import DATA_SCORES, NetworkInfo
from .networks.base import Network
from .posterior import Posterior
from .pretraining import pretrain
from .selectors import Selector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TOP_WEIGHTS = 500
LEVEL = 0.95

_REGRESSION = ("nlpd", "coverage", "crps")
_CLASSIFICATION = ("nll", "ece", "accuracy")


@dataclasses.dataclass(frozen=True)
class PartitionComparison:
    """What ``compare_partitions`` found; prints as a table.

    Attributes
    ----------
    table : one dictionary for each candidate, in the order they were given: ``name``; ``status``
        (``"done"``, ``"skipped"`` or ``"failed"``); ``num_bayesian``, the length of the random vector;
        ``seconds`` of the whole fit; ``ess_per_second``, effective draws of the slowest prediction per second of
        sampling (compilation included); ``nlpd``, ``coverage`` (of 95 % intervals) and ``crps`` on the held-out
        rows, or ``nll``, ``ece`` and ``accuracy`` for classes; ``standard_error`` of the first of these (NaN for
        one row); ``ok``, whether the draws can be trusted; and ``note``. ``pandas.DataFrame(comparison.table)`` works.
    candidates : name -> selector.
    best : the name with the lowest held-out ``nlpd`` (``nll``) among those whose draws can be trusted, or among all
        that were fitted where none can; None where nothing was fitted.
    equals : the names whose score differs from that of the best by less than two standard errors of the difference,
        row by row on the same held-out rows, the best itself among them; all that were scored, where there are fewer
        than three of these rows.
    is_regression : which of the two sets of scores the table has.
    num_held_out : rows the scores are means over.
    seconds : of everything, the training of the network included.
    """

    table: list[dict[str, Any]]
    candidates: dict[str, Selector]
    best: str | None
    equals: tuple[str, ...]
    is_regression: bool
    num_held_out: int
    seconds: float

    def plot(self) -> "Figure":
        """The table as a figure: ``comparison.plot().savefig("comparison.png")``."""
        from .partition_plots import partition_comparison

        return partition_comparison(self)

    def __str__(self) -> str:
        scores = _REGRESSION if self.is_regression else _CLASSIFICATION
        head = ("", "candidate", "weights", "seconds", "ESS/s", *scores, "ok")
        cells = [head, *(self._cells(row, scores) for row in self.table)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        notes = [row["note"] for row in self.table]
        text = [f"{line}  {shorten(note, 100)}".rstrip() for line, note in zip(lines, ["", *notes], strict=True)]
        return "\n".join([*text, self._closing()])

    def _cells(self, row: Mapping[str, Any], scores: Iterable[str]) -> tuple[str, ...]:
        mark = "*" if row["name"] == self.best else ""
        size = "" if row["num_bayesian"] is None else str(row["num_bayesian"])
        if row["status"] != "done":
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
            return (mark, row["name"], size, seconds, *[""] * (1 + len(tuple(scores))), row["status"])
        values = [f"{row[name]:.3f}" for name in scores]
        return (mark, row["name"], size, f"{row['seconds']:.1f}", f"{row['ess_per_second']:.3g}", *values,
                "yes" if row["ok"] else "no")  # fmt: skip

    def _closing(self) -> str:
        if self.best is None:
            return "No candidate could be fitted; the notes say why."
        score = (_REGRESSION if self.is_regression else _CLASSIFICATION)[0]
        return _candidates.closing(self.table, self.best, self.equals, score, self.num_held_out)


def compare_partitions(
    network: Any,
    X: Any,
    y: Any,
    candidates: Mapping[str, Selector] | Iterable[Selector] | None = None,
    *,
    num_classes: int | None = None,
    budget_seconds: float | None = None,
    held_out_fraction: float = 0.2,
    seed: int = 0,
    num_warmup: int = 300,
    num_samples: int = 500,
    num_chains: int = 1,
    engine: Engine | str | None = None,
    priors_sigma: float | Mapping[str, float] = 1.0,
    prior_mean: str = "map",
    noise_prior: Any = None,
    noise: str = "constant",
    deterministic_weights: Any = None,
    sgd_epochs: int | None = None,
    sgd_lr: Any = None,
    sgd_batch_size: int | None = None,
    swa_config: Mapping[str, Any] | None = None,
    map_sigma: float | str | None = "auto",
) -> PartitionComparison:
    """Fit several choices of Bayesian weights on one trained network, and score each on the same held-out rows.

    The network is trained once, on the rows that are not held out; every candidate
    then makes other weights of it Bayesian. A candidate that fails is recorded with its
    error, and the others go on.

    Parameters
    ----------
    network, num_classes, prior_mean, noise_prior : as for ``PartialBNN``.
    noise : ``"constant"``, or ``"network"`` as for ``PartialBNN``.
    X, y : all rows; a random share of them is held out.
    candidates : name -> selector, or selectors. By default the last layer, the last two, the first and the last, the
        ``k`` best weights by each score (as many as the last two layers have, at most 500), and everything.
    budget_seconds : time for all, the training of the network included. What is left is divided equally among the
        candidates still to come. One whose time is up in warm-up is skipped; in sampling, it keeps the draws made.
        The clock is looked at between chunks of iterations, so a candidate may overrun by its compilation and one
        chunk. The table says what was cut short or skipped. None: no limit.
    held_out_fraction : share of the rows that only the scores see, in (0, 1).
    seed : source of the split and of everything random.
    num_warmup, num_samples, num_chains, engine, priors_sigma : as for ``PartialBNN.fit``.
    deterministic_weights : weights to use in the place of training; they should not have seen the held-out rows.
    sgd_epochs, sgd_lr, sgd_batch_size, swa_config, map_sigma : the training, as for ``PartialBNN.fit``.

    Returns
    -------
    The table, its best candidate, and a plot. To go on with the best on all rows:
    ``PartialBNN(network, bayesian=comparison.candidates[comparison.best]).fit(X, y)``.

    Raises
    ------
    DataError, OptionError
        Data or options are wrong, before anything is trained.
    TrainingError
        The training of the network diverged.

    Examples
    --------
    >>> import numpy as np, neurobayes as nb
    >>> X = np.linspace(-1, 1, 50)[:, None]; y = X[:, 0] ** 2
    >>> found = nb.compare_partitions(
    ...     nb.FlaxMLP([6], 1), X, y, {"last": nb.last(1), "biases": nb.biases()},
    ...     num_warmup=100, num_samples=200, sgd_epochs=50, map_sigma=1.0,
    ... )
    >>> [row["status"] for row in found.table]
    ['done', 'done']
    """
    started = time.perf_counter()
    if budget_seconds is not None:
        budget_seconds = _checks.check_positive("budget_seconds", budget_seconds)
    sampling = Sampling.from_user(engine, "vectorized", num_warmup, num_samples, num_chains, None, None, None)
    options = pretraining_options(sgd_epochs, sgd_lr, sgd_batch_size, swa_config, map_sigma)
    check_noise(noise, num_classes, noise_prior)
    wrapped, likelihood = as_user_network(network), likelihood_of(noise, num_classes)
    fit_rows, held_out = _split(wrapped, X, y, num_classes, held_out_fraction, seed)
    named = None if candidates is None else _named(candidates)
    weights = deterministic_weights
    if weights is None and wrapped.pretrained is None:
        weights = _backbone(wrapped, *fit_rows, num_classes, likelihood, options, seed)
    if named is None:
        example = jax.ShapeDtypeStruct((1, *fit_rows[0].shape[1:]), fit_rows[0].dtype)
        statistics = weights.training_statistics if isinstance(weights, DeterministicNN) else getattr(
            weights, "statistics", None)  # fmt: skip
        named = default_candidates(network_info(wrapped, example), statistics)
    rows = []
    for place, (name, selector) in enumerate(named.items()):
        left = None if budget_seconds is None else started + budget_seconds - time.perf_counter()
        allowed = None if left is None else left / (len(named) - place)
        model = PartialBNN(
            network, num_classes, bayesian=selector, deterministic_weights=weights, noise_prior=noise_prior,
            prior_mean=prior_mean, noise=noise,
        )  # fmt: skip
        rows.append(_row(name, model, fit_rows, held_out, sampling, priors_sigma, seed, allowed))
    seconds = time.perf_counter() - started
    losses = {row["name"]: row.pop("losses", None) for row in rows}
    best = _best(rows, "nlpd" if num_classes is None else "nll")
    return PartitionComparison(
        rows, named, best, _candidates.equals(losses, best), num_classes is None, len(held_out[0]), seconds
    )


def default_candidates(info: NetworkInfo, statistics: Any = None) -> dict[str, Selector]:
    """The candidates for a network; those by training scores only where training kept ``statistics``."""
    counted = [layer.name for layer in info.layers if layer.kind != "norm"]
    found: dict[str, Selector] = {"last 1": selectors.last(1)}
    if len(counted) > 1:
        found["last 2"] = selectors.last(2)
    if len(counted) > 2:
        found["first + last"] = selectors.layers(counted[0]) | selectors.last(1)
    size = selectors.resolve(selectors.last(min(2, len(counted))), info).size
    k = min(size, MOST_TOP_WEIGHTS)
    scores = ["magnitude", *DATA_SCORES]
    if statistics is not None:
        scores[1:1] = ["variance", "gradient"]
        if statistics.averaged_variance is not None:
            scores.append("swag_variance")
    found |= {f"top {k} by {score}": selectors.top(k, by=score) for score in scores}
    found["everything"] = selectors.everything()
    return found


class _OutOfTime(Exception):
    """The share of the budget of a candidate with ``size`` random weights is used up before its first draw."""

    def __init__(self, size: int, message: str):
        super().__init__(message)
        self.size = size


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WithinSeconds(Engine):
    """Another engine that ends when its time is up."""

    engine: Engine
    seconds: float

    def run(
        self, key: Any, log_density: Any, start: np.ndarray, *, num_warmup: int, num_samples: int, num_chains: int = 1,
        control: RunControl = RunControl(),  # noqa: B008 - frozen
    ) -> Posterior:  # fmt: skip
        ends = time.perf_counter() + self.seconds

        def watch(stage: str, done: int, total: int) -> None:
            if stage != "sampling" and time.perf_counter() > ends:
                raise _OutOfTime(log_density.form.num_theta, f"{done} of {total} iterations of {stage} done")
            if control.on_progress is not None:
                control.on_progress(stage, done, total)

        limited = dataclasses.replace(control, on_progress=watch, seconds=max(self.seconds, 0.0))
        return self.engine.run(
            key, log_density, start, num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains,
            control=limited,
        )  # fmt: skip


def _row(
    name: str, model: PartialBNN, fit_rows: tuple, held_out: tuple, sampling: Sampling, priors_sigma: Any, seed: int,
    allowed: float | None,
) -> dict[str, Any]:  # fmt: skip
    """One line of the table."""
    scores = _REGRESSION if model.is_regression else _CLASSIFICATION
    row: dict[str, Any] = {"name": name, "status": "skipped", "num_bayesian": None, "seconds": None}
    row |= dict.fromkeys(("ess_per_second", *scores, "standard_error"), math.nan) | {"ok": None, "note": ""}
    if allowed is not None and allowed <= 0:
        return row | {"note": "the time budget was used up before"}
    engine = sampling.engine if allowed is None else _WithinSeconds(engine=sampling.engine, seconds=allowed)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # recorded as ``ok``
            model.fit(
                *fit_rows, num_warmup=sampling.num_warmup, num_samples=sampling.num_samples,
                num_chains=sampling.num_chains, engine=engine, priors_sigma=priors_sigma, seed=seed,
                progress_bar=False,
            )  # fmt: skip
        row |= _scores(model, *held_out)
    except _OutOfTime as error:
        row |= {"num_bayesian": error.size, "note": f"{allowed:.1f} s were not enough: {error}"}
        return row | {"seconds": time.perf_counter() - started}
    except Exception as error:  # whatever it is, the other candidates are still worth having
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        return row | {"status": "failed", "seconds": time.perf_counter() - started, "note": note}
    diagnostics, made = model.diagnostics(), model.posterior.num_draws
    if made < sampling.num_samples:
        row["note"] = f"time was up after {made} of {sampling.num_samples} draws"
    return row | {
        "status": "done",
        "num_bayesian": model.num_bayesian_weights,
        "seconds": time.perf_counter() - started,
        "ess_per_second": diagnostics.ess_bulk / model.fit_seconds["sampling"],
        "ok": diagnostics.ok,
    }


def _scores(model: PartialBNN, X: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Held-out scores, the standard error of the first, and its value for each row."""
    if not model.is_regression:
        probabilities, _ = model.predict(X)
        found = {name: getattr(metrics, name)(y, probabilities) for name in _CLASSIFICATION}
        loss = -np.log(np.maximum(probabilities[np.arange(len(y)), y], np.finfo(float).tiny))
    else:
        mean, var = model.predict(X)
        found = {"nlpd": metrics.nlpd(y, mean, var), "coverage": metrics.coverage(y, mean, var, LEVEL),
                 "crps": metrics.crps(y, mean, var)}  # fmt: skip
        each = 0.5 * (np.log(2 * np.pi * var) + (y - mean) ** 2 / var)
        loss = each.reshape(len(y), -1).mean(axis=1)
    return {**found, "standard_error": _candidates.standard_error(loss), "losses": loss}


def _best(rows: list[dict[str, Any]], score: str) -> str | None:
    done = [row for row in rows if row["status"] == "done"]
    pool = [row for row in done if row["ok"]] or done
    return min(pool, key=lambda row: row[score])["name"] if pool else None


def _split(network: Network, X: Any, y: Any, num_classes: int | None, held_out_fraction: float, seed: int):
    """Rows to fit on and rows held out, checked."""
    share = _checks.check_fraction("held_out_fraction", held_out_fraction)
    inputs = _checks.as_inputs(X, network.input_spec)
    if num_classes is None:
        targets = _checks.as_targets(y, len(inputs))
    else:
        targets = _checks.as_class_labels(y, len(inputs), _checks.check_positive_int("num_classes", num_classes, 2))
    num_held_out = round(share * len(inputs))
    if num_held_out < 1 or len(inputs) - num_held_out < 2:
        raise DataError(
            f"held_out_fraction={held_out_fraction} of {len(inputs)} rows leaves {len(inputs) - num_held_out} to fit "
            f"on and {num_held_out} to score. Give more rows or another fraction."
        )
    order = np.random.default_rng(_checks.check_positive_int("seed", seed, minimum=0)).permutation(len(inputs))
    held_out, rest = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return (inputs[rest], targets[rest]), (inputs[held_out], targets[held_out])


def _named(candidates: Mapping[str, Selector] | Iterable[Selector]) -> dict[str, Selector]:
    named: dict[str, Any]
    if isinstance(candidates, Mapping):
        named = {str(name): each for name, each in candidates.items()}
    else:
        named = {repr(each): each for each in candidates}
    wrong = [each for each in named.values() if not isinstance(each, Selector)]
    if wrong or not named:
        raise OptionError(
            "candidates must be selectors, such as {'head': nb.last(1), 'biases': nb.biases()}; "
            f"got {wrong[0] if wrong else candidates!r}."
        )
    return named


def _backbone(
    network: Network, X: np.ndarray, y: np.ndarray, num_classes: int | None, likelihood: Likelihood, options: Any,
    seed: int,
) -> Any:  # fmt: skip
    """The trained weights all candidates share, with their units and training statistics."""
    prepared = prepare(
        network, X, y, num_classes=num_classes, standardize=True, outputs_per_target=likelihood.outputs_per_target
    )
    rows = prepared.rows
    regression = num_classes is None
    noise_std = priors.target_scale(np.asarray(rows.y), np.asarray(rows.real)) if regression else np.ones(1, np.float32)
    trained = pretrain(
        network, likelihood, _checks.as_key(None, seed), rows, noise_std,
        dataclasses.replace(options, track_statistics=True), seed=seed,
    )  # fmt: skip
    return TrainedParams.of(trained.params, prepared.scaling, trained.statistics)
