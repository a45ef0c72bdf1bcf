"""The pure parts of benchmarks/quality: splits, scores, resuming, aggregation, published numbers."""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.quality import active, configuration, data, published, registry, runner, scores, store  # noqa: E402
from benchmarks.quality.table import Settings, Task  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """A boston of 12 rows, two standard splits and the initial rows of an active-learning set."""
    rng = np.random.default_rng(0)
    boston = tmp_path / "data" / "uci_boston"
    boston.mkdir(parents=True)
    write_csv(boston / "data.csv", [f"c{i}" for i in range(14)], rng.normal(size=(12, 14)))
    (boston / "splits_standard_test.txt").write_text("3 1\n0 11\n")
    htem = tmp_path / "data" / "htem_conductivity"
    htem.mkdir()
    write_csv(htem / "data.csv", ["a", "b", "fpm_conductivity"], np.exp(rng.normal(size=(10, 3))))
    (htem / "al_initial_seeds1-5.txt").write_text("0 4 7\n1 2 3\n")
    return tmp_path / "data"


def write_csv(path, header, rows):
    path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n")


# --- splits ---


def test_training_rows_are_all_rows_that_are_not_listed(folder):
    table = np.loadtxt(folder / "uci_boston" / "data.csv", delimiter=",", skiprows=1)
    problem = data.PROTOCOLS["standard"](folder, "boston", 0)
    assert_array_equal(problem.X_test, table[[3, 1], :13])
    assert_array_equal(problem.y_test, table[[3, 1], 13])
    assert_array_equal(problem.y_train, table[[0, 2, *range(4, 12)], 13])


@pytest.mark.parametrize("text", ["0 0\n", "0 12\n", "-1 2\n"])
def test_row_lists_with_repeated_or_unknown_rows_are_refused(tmp_path, text):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(ValueError, match="line 1: row numbers must be distinct"):
        data.read_row_lists(tmp_path / "rows.txt", 12)


def test_missing_data_says_which_option_to_give(tmp_path):
    with pytest.raises(data.MissingData, match="--data DIR"):
        data.PROTOCOLS["standard"](tmp_path, "boston", 0)


def test_scaling_uses_training_rows_only():
    X_train, X_test = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[4.0, 6.0]])
    problem = data.Problem(X_train, np.array([10.0, 30.0]), X_test, np.array([50.0])).standardised()
    assert_allclose(problem.X_test, [[3.0, 1.0]])  # a constant column is only centred
    assert_allclose(problem.y_train, [-1.0, 1.0])
    assert_allclose(problem.y_test, [3.0])


def test_active_pool_is_standardised_on_all_rows_and_htem_in_log10(folder):
    X, y, initial = data.active_pool(folder, "htem_conductivity")
    table = np.loadtxt(folder / "htem_conductivity" / "data.csv", delimiter=",", skiprows=1)
    assert_allclose(X.mean(0), 0, atol=1e-12)
    assert_allclose(X.std(0), 1)
    assert_allclose(10**y, table[:, 2])
    assert_array_equal(initial[1], [1, 2, 3])
    problem = data.PROTOCOLS["initial"](folder, "htem_conductivity", 0)
    assert_array_equal(problem.y_train, y[[0, 4, 7]])
    assert len(problem.y_test) == 7


def test_tokens_unseen_in_training_share_one_id():
    tokens, size = data.tokenise(["CCl", "CBrC", "CN "], train=np.array([0, 1]))
    assert size == 2 + 3  # padding, unknown, C, Cl, Br
    assert tokens.shape == (3, 3)
    assert_array_equal(tokens[0, 2:], [0])
    assert tokens[2, 1] == 1
    assert len({tokens[0, 0], tokens[1, 0], tokens[1, 2], tokens[2, 0]}) == 1


# --- scores ---


def test_regression_scores_against_closed_forms():
    rng = np.random.default_rng(1)
    y, mean, var = rng.normal(size=50), rng.normal(size=50), rng.uniform(0.5, 2, size=50)
    found = scores.regression(y, mean, var, log_density=np.full(50, -1.25))
    assert found["nll"] == pytest.approx(-stats.norm.logpdf(y, mean, np.sqrt(var)).mean())
    assert found["nll_own"] == 1.25
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean((y - mean) ** 2)))
    inside = np.abs(y - mean) <= stats.norm.ppf(0.975) * np.sqrt(var)
    assert found["coverage"] == inside.mean()


def test_a_given_interval_replaces_the_gaussian_one():
    y = np.array([0.0, 1.0, 2.0, 3.0])
    found = scores.regression(y, y, np.ones(4), interval=(np.zeros(4), np.full(4, 1.5)))
    assert found["coverage"] == 0.5
    assert found["width"] == 1.5


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(ArithmeticError), np.errstate(divide="ignore", invalid="ignore"):
        scores.regression(np.zeros(2), np.zeros(2), np.zeros(2))


def test_classification_scores_against_the_library_and_by_hand():
    from neurobayes import metrics

    rng = np.random.default_rng(2)
    probabilities, labels = rng.dirichlet(np.ones(3), size=200), rng.integers(3, size=200)
    found = scores.classification(labels, probabilities)
    assert found["nll"] == pytest.approx(metrics.nll(labels, probabilities))
    assert found["ece"] == pytest.approx(metrics.ece(labels, probabilities))
    assert found["brier"] == pytest.approx(metrics.brier(labels, probabilities))
    sure = scores.classification(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert sure["accuracy"] == 0.5
    assert sure["ece"] == 0.5


def test_summary_has_mean_and_standard_error_of_what_all_have():
    records = [{"d": "a", "metrics": {"nll": v, "notes": {}}} for v in (1.0, 3.0)] + [{"d": "b", "metrics": {"nll": 5}}]
    records[0]["metrics"]["nll_own"] = 2.0  # the other record has none
    found = scores.summarise(records, lambda record: record["d"])
    assert found["a"] == {"nll": {"mean": 2.0, "error": 1.0, "median": 2.0, "num": 2}}
    assert found["b"]["nll"]["error"] == 0


# --- resuming ---


def a_task(split=0, **options):
    return Task("uci", "boston", split, "ours", {"options": options})


def a_record(task, **answer):
    return {**task.to_dict(), "digest": task.digest, **answer}


def test_only_tasks_with_a_result_of_the_same_configuration_count_as_finished(tmp_path):
    path = tmp_path / "records" / "uci.jsonl"
    done, failed, waiting = a_task(0, width=8), a_task(1, width=8), a_task(2, width=8)
    for record in [
        a_record(done, error="first try"),
        a_record(done, metrics={"nll": 1.0}),
        a_record(failed, metrics={"nll": 2.0}),
        a_record(failed, error="second try"),
        a_record(a_task(2, width=16), metrics={"nll": 3.0}),
    ]:
        store.append(path, record)
    finished, failures = store.latest(store.read(path), [done, failed, waiting])
    assert [record["metrics"] for record in finished] == [{"nll": 1.0}]
    assert [record["error"] for record in failures] == ["second try"]


def test_a_line_cut_off_by_a_crash_costs_only_itself(tmp_path):
    path = tmp_path / "uci.jsonl"
    store.append(path, a_record(a_task(0)))
    with path.open("a") as file:
        file.write('{"table": "uc')
    store.append(path, a_record(a_task(1)))
    assert [record["split"] for record in store.read(path)] == [0, 1]


def test_digest_depends_on_content_and_not_on_order():
    assert a_task(a=1, b=[2]).digest == a_task(b=[2], a=1).digest
    assert a_task(a=1).digest != a_task(a=2).digest


def test_changes_of_our_model_change_only_our_digests():
    before, after = Settings(Path("data")), Settings(Path("data"), changes={"num_samples": 5})
    tasks = registry.tables()["uci"].tasks
    changed = {task.key for task in tasks(after)} - {task.key for task in tasks(before)}
    assert {method for _, _, method, _ in changed} == {"ours"}


def test_full_mode_contains_the_fast_one_where_the_protocol_is_the_same():
    for name, table in registry.tables().items():
        fast, full = ({t.key for t in table.tasks(Settings(Path("data"), mode))} for mode in (False, True))
        assert fast, name
        assert fast <= full or name == "active"  # its fast runs have fewer steps


def test_options_go_to_whatever_takes_them_and_unknown_ones_are_refused():
    network, constructor, fit = configuration.sort_options({"hidden_dims": [4], "prior_mean": "zero", "sgd_epochs": 3})
    assert (network, constructor, fit) == ({"hidden_dims": [4]}, {"prior_mean": "zero"}, {"sgd_epochs": 3})
    with pytest.raises(ValueError, match="epoch_number"):
        configuration.sort_options({"epoch_number": 3})


def test_a_failing_task_is_answered_and_does_not_stop_the_others(tmp_path):
    answers = {}
    tasks = [Task("small", "diabetes", 0, "forest", {"protocol": p, "method": "forest",
             "options": {"trees": 5, "min_leaf": 3}}) for p in ("unheard of", "diabetes")]  # fmt: skip
    runner.run(tasks, 1, 1, tmp_path, lambda task, answer, _: answers.update({task.options["protocol"]: answer}))
    assert answers["unheard of"]["error"].startswith("KeyError")
    assert 0.5 < answers["diabetes"]["metrics"]["rmse"] < 1


# --- active learning ---


def test_each_step_scores_the_pool_and_moves_its_most_uncertain_row():
    y = np.arange(6.0)

    def fit_predict(known, pool):
        variance = 1.0 + np.abs(y[pool] - y[known].mean())
        return y[pool] + 0.5, variance, variance

    steps = active.learn(y[:, None], y, np.array([0]), 3, fit_predict)
    assert [step["chosen"] for step in steps] == [5, 1, 4]  # farthest from the mean of the known; the first of equals
    assert [step["rows"] for step in steps] == [1, 2, 3]
    assert steps[0]["rmse"] == 0.5
    assert steps[1]["nll"] == pytest.approx(-stats.norm.logpdf(0.5, 0, np.sqrt([2.5, 1.5, 1.5, 2.5])).mean())


def test_a_run_learns_with_room_for_all_rows_that_will_come(folder, monkeypatch):
    import neurobayes as nb

    fits = []

    @functools.wraps(nb.PartialBNN.fit)  # whose signature says what is an option of it
    def fit(self, X, y, **options):
        fits.append((len(y), options["room_for"], options["engine"], self.probabilistic_layer_names))

    def posterior_predictive(self, X):
        return SimpleNamespace(mean=np.zeros(len(X)), var=np.ones(len(X)), epistemic_var=np.arange(len(X)))

    monkeypatch.setattr(nb.PartialBNN, "fit", fit)
    monkeypatch.setattr(nb.PartialBNN, "posterior_predictive", posterior_predictive)
    tasks = active.tasks(Settings(folder, splits=1))
    task = next(t for t in tasks if (t.dataset, t.method) == ("htem_conductivity", "first layers"))
    found = active.run(dataclasses.replace(task, options={**task.options, "steps": 3}), folder)
    assert fits == [(3 + k, 6, "mclmc", ["Dense0", "Dense1"]) for k in range(3)]
    assert found["curves"]["chosen"] == [9, 8, 6]  # the last rows not yet known: 7 is one of the first


def test_active_report_tells_our_models_apart(tmp_path):
    def record(method, nll):
        curves = {name: [nll, nll - 0.1] for name in active.METRICS}
        metrics = {"first_nll": nll, "first_coverage": 0.95, "mean_nll": nll - 0.05, "mean_coverage": 0.95,
                   "final_rmse": nll - 0.1, "step_seconds": 1.0, "late_compilations": 0, "curves": curves}  # fmt: skip
        return {"dataset": "esol", "split": 0, "method": method, "options": {"steps": 2}, "metrics": metrics}

    found = active.report([record("ours", 1.5), record("first layers", 1.2)], Settings(tmp_path / "data"))
    assert "| **ours, default** | 1 | 1.500 |" in found.markdown
    assert "| **ours, first layers Bayesian** | 1 | 1.200 |" in found.markdown
    assert [check.met for check in found.checks if "NLPD at step 0" in check.name] == [False, True]


# --- published numbers and reports ---


def test_published_entries_are_read_with_one_sign_and_in_the_units_of_the_data(tmp_path):
    write_csv(
        tmp_path / "published_uci.csv",
        ["dataset", "split", "method", "metric", "value", "target_scale", "source"],
        [
            ["boston", "standard20x90/10", "A", "RMSE", 3.0, "raw", "paper"],
            ["boston", "standard20x90/10", "A", "NLL", 2.5, "raw", "same"],
            ["boston", "standard20x90/10", "B", "LL", -2.4, "raw", "paper"],
            ["boston", "gap", "C", "LL", -2.0, "raw", "paper"],
            ["boston", "standard20x90/10", "D", "NLL", 0.4, "standardised", "paper"],
        ],
    )
    entries = published.uci(tmp_path, "boston", "standard")
    assert [(e.method, e.rmse, e.nll, e.source) for e in entries] == [
        ("B", None, 2.4, "paper"),
        ("A", 3.0, 2.5, "paper"),
    ]
    assert published.best_nll(entries) == 2.4
    assert published.uci(tmp_path / "nowhere", "boston", "standard") == []


@pytest.mark.parametrize(("nll", "met"), [(2.3, True), (2.5, False)])
def test_a_report_computes_whether_targets_are_met(tmp_path, nll, met):
    (tmp_path / "reference").mkdir()
    write_csv(
        tmp_path / "reference" / "published_uci.csv",
        ["dataset", "split", "method", "metric", "value", "target_scale", "source"],
        [["boston", "standard20x90/10", "A", "NLL", 2.4, "raw", "paper"]],
    )
    settings = Settings(tmp_path / "data")
    table = registry.tables()["uci"]
    task = next(t for t in table.tasks(settings) if t.method == "ours")
    metrics = {"rmse": 3.0, "mae": 2.0, "nll": nll, "coverage": 0.99, "seconds": 1.0}
    report = table.report([json.loads(json.dumps(a_record(task, metrics=metrics)))], settings)
    checks = {check.name: check.met for check in report.checks}
    assert checks["boston: NLL (Gaussian), best published"] is met
    assert checks["boston: 95 % coverage, not above"] is False
    assert checks["boston: 95 % coverage, not below"] is True
    assert "| A |" in report.markdown
