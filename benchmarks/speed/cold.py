"""A fresh process from its start to predictions: one network, exact last layer, 500 rows."""

import warnings

import neurobayes as nb
from benchmarks import _common


def run(epochs: int | None = None, programs: str | None = None) -> dict[str, float]:
    """Fit and predict once, with everything else at its default.

    With ``epochs`` the prior scale is given too, and nothing is searched; with ``programs``, a folder, the compiled
    programs of an earlier process are found there.
    """
    if programs is not None:
        nb.cache_programs(programs)
    X, y = _common.friedman(500)
    warnings.simplefilter("ignore", nb.errors.CalibrationWarning)  # one network, as in what it is compared with
    model = nb.PartialBNN(nb.FlaxMLP([64, 32, 16], 1), num_probabilistic_layers=1, num_backbones=1)
    given = {} if epochs is None else {"sgd_epochs": epochs, "map_sigma": 1.0}
    model.fit(X, y, num_samples=1000, progress_bar=False, seed=0, **given)
    mean, _ = model.predict(X)
    return {"rmse": float(((mean - y) ** 2).mean() ** 0.5)}
