"""Samplers of several backbones side by side against one after another."""

import functools
import warnings

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result
from neurobayes.models import members

ROWS, BACKBONES, DRAWS = 200, 4, 600


def together(repeats: int) -> Result:
    """A second fit of four backbones [16, 16] with two Bayesian layers, one chain each."""
    checks, times = [], {}
    for engine in ("nuts", "mclmc"):
        fits = {
            f"{engine}, side by side": functools.partial(_fit, engine, members.MOST_GRADIENT_WORK),
            f"{engine}, in turn": functools.partial(_fit, engine, 0.0),
        }
        found = _common.time_together(fits, repeats)
        checks.append(Check(f"{engine}: in turn / side by side", _common.ratio(found, *reversed(fits))))
        times |= found
    note = "Nothing is gained on one core; on two the first sampler is alone until it has draws."
    return Result("together", checks, {"times": times}, note)


def _fit(engine: str, most_gradient_work: float) -> None:
    data = nb.datasets.friedman(ROWS, seed=0)
    model = nb.PartialBNN(nb.FlaxMLP([16, 16], 1), num_probabilistic_layers=2, num_backbones=BACKBONES)
    usual, members.MOST_GRADIENT_WORK = members.MOST_GRADIENT_WORK, most_gradient_work
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(
                data.X, data.y, engine=engine, num_warmup=300, num_samples=DRAWS, sgd_epochs=100, map_sigma=1.0,
                progress_bar=False, seed=0,
            )  # fmt: skip
    finally:
        members.MOST_GRADIENT_WORK = usual


CASES = {"together": together}
