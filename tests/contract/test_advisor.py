"""Comparing choices of Bayesian weights on one trained network."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes._candidates import closing, equals, standard_error
from neurobayes.advisor import _OutOfTime, _WithinSeconds, compare_partitions, default_candidates
from neurobayes.errors import DataError, OptionError
from neurobayes.inference.base import Engine, RunControl
from neurobayes.posterior import Posterior

FEW = {"last": nb.last(1), "biases": nb.biases(), "three": nb.top(3, by="fisher")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scattered(Engine):
    """Draws around the start, without a look at the density; notes what was fitted and the time it was given."""

    fits: list
    limits: list = dataclasses.field(default_factory=list)
    num_kept: int | None = None

    def run(self, key, log_density, start, *, num_warmup, num_samples, num_chains=1, control=RunControl()):  # noqa: B008
        self.fits.append((log_density.form.num_theta, float(np.sum(log_density.terms.row_weights)), np.array(start)))
        for done in range(0, num_warmup, 10):
            if control.on_progress is not None:
                control.on_progress("warm-up", done, num_warmup)
        self.limits.append(control.seconds)
        shape = (num_chains, self.num_kept or num_samples)
        draws = start + 0.02 * np.asarray(jax.random.normal(key, (*shape, log_density.size)))
        return Posterior(np.asarray(draws, np.float32), {"diverging": np.zeros(shape, bool)}, {"engine": "scattered"})


@pytest.fixture
def scattered():
    return Scattered(fits=[])


@pytest.fixture(scope="module")
def short():
    return {"num_warmup": 20, "num_samples": 40, "sgd_epochs": 10, "map_sigma": 1.0}


@pytest.fixture(scope="module")
def compared(mlp, regression):
    """Three candidates with the real sampler."""
    return compare_partitions(mlp, *regression, FEW, num_warmup=50, num_samples=80, sgd_epochs=30, map_sigma=1.0)


def test_every_candidate_has_a_complete_row(compared):
    assert [row["name"] for row in compared.table] == list(FEW)
    assert [row["num_bayesian"] for row in compared.table] == [5, 11, 3]
    for row in compared.table:
        assert row["status"] == "done" and row["note"] == ""
        assert row["seconds"] > 0 and row["ess_per_second"] > 0 and isinstance(row["ok"], bool)
        assert 0 <= row["coverage"] <= 1 and row["crps"] > 0 and row["standard_error"] > 0
        assert math.isfinite(row["nlpd"])
        assert "losses" not in row
    assert compared.num_held_out == 12 and compared.is_regression


def test_best_has_the_lowest_score_of_those_to_be_trusted(compared):
    trusted = [row for row in compared.table if row["ok"]] or compared.table
    assert compared.best == min(trusted, key=lambda row: row["nlpd"])["name"]
    assert compared.best in compared.equals
    assert set(compared.equals) <= set(compared.candidates) and compared.candidates == FEW


def test_table_prints_with_every_name_and_the_best_marked(compared):
    text = str(compared)
    lines = text.splitlines()
    assert len(lines) == len(FEW) + 2
    assert all(any(name in line for line in lines) for name in (*FEW, "nlpd", "coverage", "crps", "ESS/s"))
    assert [line.split()[1] for line in lines[1:-1] if line.startswith("*")] == [compared.best]


def scored(**losses):
    """A table of candidates with these losses by row; those whose name ends in ``_no`` are not to be trusted."""
    rows = [
        {"name": name, "status": "done", "nlpd": np.mean(loss), "ok": not name.endswith("_no")}
        for name, loss in losses.items()
    ]
    return rows, {name: np.array(loss) for name, loss in losses.items()}


def test_a_better_candidate_that_is_not_to_be_trusted_is_named():
    rows, losses = scored(a=[1.2, 1.3, 1.25], b_no=[0.9, 1.0, 0.95], c=[2.2, 2.3, 2.25])
    text = closing(rows, "a", equals(losses, "a"), "nlpd", 3)
    assert "(b_no scored better and cannot be yet); the others that were scored are worse" in text
    assert closing(rows[:2], "a", ("a",), "nlpd", 3).endswith("(b_no scored better and cannot be yet).")


def test_the_cheapest_to_be_recommended_can_be_trusted():
    rows, losses = scored(a=[1.0, 1.3, 1.2], b_no=[1.1, 1.2, 1.3])
    assert equals(losses, "a") == ("a", "b_no")
    assert "the cheapest of them whose draws can be trusted" in closing(rows, "a", ("a", "b_no"), "nlpd", 3)


def test_fewer_than_three_rows_tell_nothing_apart():
    rows, losses = scored(a=[1.0], b=[3.0])
    assert equals(losses, "a") == ("a", "b") and math.isnan(standard_error(losses["a"]))
    text = closing(rows, "a", ("a", "b"), "nlpd", 1)
    assert text == (
        "* best: a, by nlpd on 1 held-out row. So few rows cannot tell candidates apart: raise held_out_fraction."
    )


def test_table_becomes_a_data_frame(compared):
    pandas = pytest.importorskip("pandas")
    assert list(pandas.DataFrame(compared.table)["name"]) == list(FEW)


def test_plot_shows_every_candidate(compared, tmp_path):
    pytest.importorskip("matplotlib")
    figure = compared.plot()
    figure.savefig(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["last (5)", "biases (11)", "three (3)"]
    assert len(figure.axes) == 4
    assert [len(ax.lines) for ax in figure.axes] == [3, 4, 3, 3]  # coverage has the line it should lie on


def test_all_candidates_start_from_the_same_training_rows_and_weights(mlp, regression, scattered, short):
    candidates = {"last": nb.last(1), "again": nb.layers("Dense2"), "all": nb.everything()}
    compare_partitions(mlp, *regression, candidates, held_out_fraction=0.25, engine=scattered, **short)
    sizes, rows, starts = zip(*scattered.fits, strict=True)
    assert sizes == (5, 5, 57) and rows == (45.0,) * 3
    np.testing.assert_array_equal(starts[0], starts[1])
    assert set(starts[0][:5]) <= set(starts[2])


def test_held_out_rows_are_never_fitted(mlp, regression, scattered, short):
    """Rows with absurd targets change nothing in the fit when they are the held-out ones."""
    X, y = regression
    order = np.random.default_rng(3).permutation(len(X))
    spoiled = y.copy()
    spoiled[order[:12]] += 1e3
    for targets in (y, spoiled):
        compare_partitions(mlp, X, targets, {"last": nb.last(1)}, seed=3, engine=scattered, **short)
    np.testing.assert_array_equal(scattered.fits[0][2], scattered.fits[1][2])


def test_same_seed_same_scores(mlp, regression, scattered, short):
    def scores(seed):
        return compare_partitions(mlp, *regression, FEW, seed=seed, engine=scattered, **short).table[0]["nlpd"]

    assert scores(1) == scores(1) != scores(2)


def test_a_failing_candidate_is_recorded_and_the_others_go_on(mlp, regression, scattered, short):
    found = compare_partitions(
        mlp, *regression, {"typo": nb.layers("Dense9"), "last": nb.last(1)}, engine=scattered, **short
    )
    failed, done = found.table
    assert failed["status"] == "failed" and "SelectionError" in failed["note"] and "Dense9" in failed["note"]
    assert math.isnan(failed["nlpd"]) and failed["ok"] is None
    assert done["status"] == "done" and found.best == "last"
    assert "failed" in str(found) and "Dense9" in str(found)


def test_nothing_fitted_has_no_best_and_says_so(mlp, regression, scattered, short):
    found = compare_partitions(mlp, *regression, [nb.layers("Dense9")], engine=scattered, **short)
    assert found.best is None and found.equals == () and "No candidate" in str(found)
    pytest.importorskip("matplotlib")
    found.plot().canvas.draw()


def test_what_finds_nothing_left_of_the_budget_is_skipped_and_said(mlp, regression, scattered, short):
    candidates = {"first": nb.last(1), "second": nb.biases()}
    found = compare_partitions(mlp, *regression, candidates, budget_seconds=1e-6, engine=scattered, **short)
    assert [row["status"] for row in found.table] == ["skipped", "skipped"] and found.best is None
    assert all("used up" in row["note"] for row in found.table) and not scattered.fits
    assert str(found).count("used up") == 2


def test_time_that_is_up_in_warm_up_ends_the_candidate(mlp, regression, scattered, short):
    model = nb.PartialBNN(mlp, bayesian=nb.last(1), num_backbones=1)
    with pytest.raises(_OutOfTime, match="of 20 iterations of warm-up") as caught:
        model.fit(*regression, engine=_WithinSeconds(engine=scattered, seconds=0.0), progress_bar=False, **short)
    assert caught.value.size == 5


@pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
def test_time_that_is_up_in_sampling_keeps_the_draws_and_says_how_many(mlp, regression, short):
    fewer = Scattered(fits=[], num_kept=30)
    (row,) = compare_partitions(mlp, *regression, [nb.last(1)], budget_seconds=1e6, engine=fewer, **short).table
    assert row["status"] == "done" and row["note"] == "time was up after 30 of 40 draws"
    assert fewer.limits[0] is not None and 0 < fewer.limits[0] < 1e6


def test_a_budget_that_suffices_changes_nothing(mlp, regression, scattered, short):
    free = compare_partitions(mlp, *regression, FEW, engine=scattered, **short)
    ample = compare_partitions(mlp, *regression, FEW, engine=scattered, budget_seconds=1e6, **short)
    assert [row["nlpd"] for row in ample.table] == [row["nlpd"] for row in free.table]


def test_classification_has_its_own_scores(three_classes, scattered, short):
    found = compare_partitions(
        nb.FlaxMLP([6], 3), *three_classes, [nb.last(1), nb.everything()], num_classes=3, engine=scattered, **short
    )
    assert not found.is_regression
    for row in found.table:
        assert row["status"] == "done", row["note"]
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["ece"] <= 1 and row["nll"] > 0 and "nlpd" not in row
    assert list(found.candidates) == ["last(1)", "everything()"]


def test_default_candidates_follow_the_network_and_its_training(regression):
    X, y = regression
    model = nb.DeterministicNN(nb.FlaxMLP([6, 4], 1), input_shape=(3,))
    named = default_candidates(model.network_info())
    assert list(named) == [
        "last 1", "last 2", "first + last", "top 33 by magnitude", "top 33 by fisher", "top 33 by laplace_variance",
        "everything",
    ]  # fmt: skip
    model.train(X, y, epochs=5, progress_bar=False)
    named = default_candidates(model.network_info(), model.training_statistics)
    assert {"top 33 by variance", "top 33 by gradient"} <= set(named) and "top 33 by swag_variance" not in named
    averaged = nb.DeterministicNN(nb.FlaxMLP([6, 4], 1), (3,), swa_config={"start_pct": 0.2})
    averaged.train(X, y, epochs=10, progress_bar=False)
    assert "top 33 by swag_variance" in default_candidates(averaged.network_info(), averaged.training_statistics)
    shallow = nb.DeterministicNN(nb.FlaxMLP([2], 1), (3,))
    assert "first + last" not in default_candidates(shallow.network_info())


def test_given_weights_are_used_as_they_are(mlp, regression, scattered, short):
    trained = nb.DeterministicNN(mlp, input_shape=(3,)).train(*regression, epochs=5, progress_bar=False)
    compare_partitions(
        mlp, *regression, {"bias": nb.layers("Dense2.bias")}, deterministic_weights=trained, engine=scattered, **short
    )
    assert scattered.fits[0][2][0] == trained.get_params()["Dense2"]["bias"][0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"candidates": {"a": "Dense0"}}, OptionError, "selectors"),
        ({"candidates": []}, OptionError, "selectors"),
        ({"held_out_fraction": 1.5}, OptionError, "held_out_fraction"),
        ({"held_out_fraction": 0.001}, DataError, "held_out_fraction"),
        ({"budget_seconds": -1}, OptionError, "budget_seconds"),
        ({"map_sigma": "none"}, OptionError, "map_sigma"),
    ],
)
def test_wrong_options_raise_before_training(mlp, regression, options, error, words):
    with pytest.raises(error, match=words):
        compare_partitions(mlp, *regression, **{"sgd_epochs": 10**9, "map_sigma": 1.0, **options})
