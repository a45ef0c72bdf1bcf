"""What deterministic training promises: its objective, batches, averages, stopping, statistics and failures."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import neurobayes as nb
from neurobayes import trees
from neurobayes.networks import as_network


def make(network=None, **options):
    return nb.DeterministicNN(nb.FlaxMLP([6, 4], 1) if network is None else network, (3,), **options)


def train(model, data, epochs=10, **options):
    return model.train(*data, epochs=epochs, progress_bar=False, **options)


def flat(params):
    return {path: np.asarray(leaf, float) for path, leaf in trees.flatten(params).items()}


def forward(params, x):
    leaves = flat(params)
    h = np.tanh(x @ leaves["Dense0.kernel"] + leaves["Dense0.bias"])
    h = np.tanh(h @ leaves["Dense1.kernel"] + leaves["Dense1.bias"])
    return h @ leaves["Dense2.kernel"] + leaves["Dense2.bias"]


def assert_same_params(a, b, **tolerance):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, **tolerance), dict(a), dict(b))


@pytest.fixture(scope="module")
def trained(regression):
    """Ten epochs of the usual network."""
    return train(make(), regression)


# The objective


@pytest.mark.parametrize(("use_map", "sigma", "noise_std"), [(True, 0.5, 1.0), (True, 2.0, 0.3), (False, 1.0, 1.0)])
def test_loss_is_the_negative_log_joint_divided_by_n(regression, use_map, sigma, noise_std):
    X, y = regression
    model = train(make(map=use_map, sigma=sigma, noise_std=noise_std), regression, epochs=3)
    params = flat(model.get_params())
    # The first loss of a warm start is that of the weights it starts from.
    loss = copy.copy(model).train(X, y, epochs=1, warm_start=True, progress_bar=False).history["loss"][0]
    x, target = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    log_joint = scipy.stats.norm.logpdf(target, forward(params, x)[:, 0], noise_std).sum()
    if use_map:
        log_joint += sum(scipy.stats.norm.logpdf(leaf, 0.0, sigma).sum() for leaf in params.values())
    assert loss == pytest.approx(-log_joint / len(y), rel=1e-5)


def test_loss_of_classes_is_the_negative_log_joint_divided_by_n(three_classes):
    X, y = three_classes
    model = nb.DeterministicNN(nb.FlaxMLP([], 3), (4,), loss="cross_entropy", sigma=0.7)
    params = flat(train(model, three_classes, epochs=2).get_params())
    probabilities = model.predict(X)
    np.testing.assert_array_equal(model.predict_classes(X), probabilities.argmax(1))
    loss = train(model, three_classes, epochs=1, warm_start=True).history["loss"][0]
    log_joint = np.log(probabilities[np.arange(60), y]).sum()
    log_joint += sum(scipy.stats.norm.logpdf(leaf, 0.0, 0.7).sum() for leaf in params.values())
    assert loss == pytest.approx(-log_joint / 60, rel=1e-5)


def test_mini_batches_estimate_the_full_objective_without_bias(regression):
    """Trap: mini-batch MAP prior N/B too strong.

    With a step size of next to nothing the weights stand still, and 4 batches of 15 of the 60 rows average to
    the loss of all rows; the sum of their gradient steps is 4 steps of the whole gradient.
    """
    model = train(make(sigma=0.2, optimizer="sgd", learning_rate=1e-9), regression, epochs=1)
    batches = make(sigma=0.2, optimizer="sgd", learning_rate=1e-9)
    train(batches, regression, epochs=1, batch_size=15)
    assert batches.history["loss"][0] == pytest.approx(model.history["loss"][0], rel=1e-5)
    steps = []
    for batch_size, num_batches in ((None, 1), (15, 4)):
        before = train(make(optimizer="sgd", learning_rate=1e-9), regression, epochs=1)
        after = copy.copy(before)
        after.sigma, after.learning_rate = 0.2, 1e-3
        train(after, regression, epochs=1, batch_size=batch_size, warm_start=True)
        change = jax.tree.map(lambda a, b, n=num_batches: (a - b) / n, after.get_params(), before.get_params())
        steps.append(np.concatenate([leaf.ravel() for leaf in flat(change).values()]))
    np.testing.assert_allclose(steps[1], steps[0], atol=0.02 * np.abs(steps[0]).max())


def test_batches_that_do_not_divide_the_rows_use_every_row(regression):
    """With nearly fixed weights the loss of 60 rows in batches of 25, 25 and 10 is the mean of the three."""
    model = make(optimizer="sgd", learning_rate=1e-9, map=False)
    train(model, regression, epochs=40, batch_size=25)
    whole = train(make(optimizer="sgd", learning_rate=1e-9, map=False), regression, epochs=1).history["loss"][0]
    losses = model.history["loss"]
    # Rows of the short batch weigh more in one epoch, so the mean moves with the order and is right on average.
    assert losses.std() > 0
    assert losses.mean() == pytest.approx(whole, abs=5 * losses.std() / np.sqrt(40))


def test_rows_are_reshuffled_every_epoch():
    """Trap: never shuffled. The target of each row is its number, and the loss notes which row a step takes."""
    seen = []

    def loss(outputs, y):
        jax.debug.callback(lambda value: seen.append(int(value)), y[0, 0])
        return 0.0 * outputs[:, 0]

    model = nb.DeterministicNN(nb.FlaxMLP([], 1), (1,), loss=loss, standardize=False)
    X, y = np.zeros((8, 1)), np.arange(8.0)
    orders = []
    for epochs in (1, 3):
        seen.clear()
        model.train(X, y, epochs=epochs, batch_size=1, progress_bar=False)
        jax.effects_barrier()
        orders.append(np.reshape(seen, (epochs, 8)).tolist())
    assert all(sorted(order) == list(range(8)) for order in orders[1])
    assert len({tuple(order) for order in orders[1]}) == 3
    assert orders[0][0] == orders[1][0], "the seed decides the order"


@pytest.mark.parametrize(
    "loss", [lambda outputs, y: jnp.abs(outputs - y)[:, 0], lambda outputs, y: optax.huber_loss(outputs, y)[:, 0]]
)
def test_a_custom_loss_is_one_number_per_row(regression, loss):
    X, y = regression
    model = train(make(loss=loss, map=False), regression, epochs=60)
    assert model.history["loss"][-1] < 0.7 * model.history["loss"][0]
    target = (y - y.mean()) / y.std()
    expected = float(jnp.mean(loss(((model.predict(X) - y.mean()) / y.std())[:, None], target[:, None])))
    after = train(model, regression, epochs=1, warm_start=True).history["loss"][0]
    assert after == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "loss", [lambda outputs, y: jnp.mean((outputs - y) ** 2), lambda outputs, y: (outputs - y) ** 2],
    ids=["one number", "a column"],
)  # fmt: skip
def test_a_custom_loss_of_another_shape_raises(regression, loss):
    with pytest.raises(nb.errors.OptionError, match="one number per row"):
        train(make(loss=loss), regression)


# Averages


def snapshots(data, epochs, **options):
    """The weights after each epoch: runs of 1, 2, … epochs from the same seed, at the same constant step size."""
    return [train(make(**options), data, epochs=n).get_params() for n in range(1, epochs + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cyclic"])
@pytest.mark.parametrize("batch_size", [None, 20])
def test_averaged_weights_are_the_mean_of_the_snapshots(regression, schedule, batch_size):
    """Swept with a flat step size, the averaging stage follows the plain run, whose weights are known."""
    swa = {"schedule": schedule, "start_pct": 0.5, "swa_lr": 0.02}
    swa |= {"cycle_length": 2} if schedule == "cyclic" else {}
    model = train(make(learning_rate=0.02, swa_config=swa), regression, epochs=8, batch_size=batch_size)
    single = [
        train(make(learning_rate=0.02), regression, epochs=n, batch_size=batch_size).get_params() for n in range(5, 9)
    ]
    picked = single[1::2] if schedule == "cyclic" else single
    assert int(model.state.num_averaged) == len(picked)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *map(dict, picked))
    assert_same_params(model.get_params(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cyclic"])
@pytest.mark.parametrize("epochs", [1, 3, 10, 97])
def test_every_schedule_collects_weights_by_default(regression, schedule, epochs):
    """Trap: linear and cyclic SWA collect nothing by default."""
    model = train(make(swa_config={"schedule": schedule}), regression, epochs=epochs)
    assert int(model.state.num_averaged) >= 1
    if epochs >= 10:
        assert int(model.state.num_averaged) >= 2
    assert all(np.any(leaf != 0) for leaf in flat(model.get_params()).values())


def test_averaging_at_intervals(regression):
    model = train(make(swa_config={"start_pct": 0.5, "collect_freq": 4}), regression, epochs=40)
    assert int(model.state.num_averaged) == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [({"schedule": "cyclical"}, "cyclic"), ({"start": 0.5}, "start_pct"), ({"start_pct": 1.0}, "start_pct"),
     ({"swa_lr": 0.0}, "swa_lr"), ({"cycle_length": 0}, "cycle_length"), ({"collect_freq": 0}, "collect_freq"),
     ("constant", "dict")],
)  # fmt: skip
def test_bad_averaging_options_raise_at_construction(config, message):
    with pytest.raises(nb.errors.OptionError, match=message):
        make(swa_config=config)


def test_a_second_training_starts_afresh(regression):
    """Trap: second train() averages old snapshots."""
    X, y = regression
    options = {"swa_config": {"schedule": "constant"}}
    model = train(make(**options), (X, -3.0 * y), epochs=20)
    train(model, regression, epochs=12)
    fresh = train(make(**options), regression, epochs=12)
    assert_same_params(model.get_params(), fresh.get_params(), rtol=0)
    assert int(model.state.num_averaged) == int(fresh.state.num_averaged)
    assert len(model.history["loss"]) == 12


def test_same_seed_same_weights(regression, trained):
    assert_same_params(train(make(seed=0), regression).get_params(), trained.get_params(), rtol=0)
    assert_same_params(train(make(rng_key=jax.random.key(0)), regression).get_params(), trained.get_params(), rtol=0)
    other = train(make(seed=1), regression).get_params()
    assert not np.allclose(other["Dense0"]["kernel"], trained.get_params()["Dense0"]["kernel"])


def test_a_warm_start_continues_in_the_units_of_the_first_training(regression):
    X, y = regression
    model = train(make(learning_rate=0.001), regression, epochs=100)
    before = model.predict(X)
    train(model, (X[:30], 5.0 * y[:30]), epochs=1, warm_start=True)
    assert np.max(np.abs(model.predict(X) - before)) < 0.1
    np.testing.assert_array_equal(model.scaling.y_mean, [y.mean()])
    with pytest.raises(nb.errors.NotFittedError):
        train(make(), regression, warm_start=True)


# Validation and early stopping


def test_histories_have_one_entry_per_epoch(regression, trained):
    X, y = regression
    assert trained.history["loss"].shape == (10,)
    assert set(trained.history) == {"loss"}
    model = train(make(), (X[:40], y[:40]), epochs=150, validation_data=(X[40:], y[40:]), track_statistics=False)
    assert model.history["loss"].shape == model.history["validation_loss"].shape == (150,)
    assert np.all(np.isfinite(model.history["validation_loss"]))
    target = (y[40:] - y[:40].mean()) / y[:40].std()
    predicted = (model.predict(X[40:]) - y[:40].mean()) / y[:40].std()
    expected = -scipy.stats.norm.logpdf(target, predicted).mean()
    assert model.history["validation_loss"][-1] == pytest.approx(expected, rel=1e-5)
    assert model.training_statistics is None


@pytest.mark.parametrize("batch_size", [None, 10])
def test_early_stopping_restores_the_best_weights(regression, batch_size):
    X, _ = regression
    noise = np.random.default_rng(8).normal(size=60)  # nothing to learn: unseen rows get worse soon
    data, validation = (X[:30], noise[:30]), (X[30:], noise[30:])
    options = {"learning_rate": 0.05, "map": False}
    model = train(
        make(**options), data, epochs=1000, batch_size=batch_size, validation_data=validation, early_stopping=15
    )
    losses = model.history["validation_loss"]
    best = int(np.argmin(losses))
    assert len(losses) < 1000
    assert len(losses) - 1 - best == pytest.approx(15, abs=1)
    # The same run, cut at the best epoch.
    cut = train(make(**options), data, epochs=best + 1, batch_size=batch_size)
    assert_same_params(model.get_params(), cut.get_params(), rtol=1e-5, atol=1e-6)
    target = (noise[30:] - noise[:30].mean()) / noise[:30].std()
    predicted = (model.predict(X[30:]) - noise[:30].mean()) / noise[:30].std()
    assert -scipy.stats.norm.logpdf(target, predicted).mean() == pytest.approx(losses.min(), rel=1e-5)


def test_early_stopping_options(regression):
    X, y = regression
    with pytest.raises(nb.errors.OptionError, match="validation_data"):
        train(make(), regression, early_stopping=True)
    for bad in ({"patiense": 3}, 0, -1, 2.5, {"patience": 0}, {"min_delta": -1.0}, "yes"):
        with pytest.raises(nb.errors.OptionError, match=r"early_stopping"):
            train(make(), regression, early_stopping=bad, validation_data=(X, y))
    with pytest.raises(nb.errors.OptionError, match="swa_config"):
        model = make(swa_config={"schedule": "constant"})
        train(model, regression, early_stopping=True, validation_data=(X, y))


# Optimisers


def test_lbfgs_beats_adam_on_a_small_convex_problem(regression):
    X, y = regression
    linear = nb.FlaxMLP([], 1)
    adam = train(make(linear, sigma=3.0), regression, epochs=30)
    lbfgs = train(make(linear, sigma=3.0, optimizer="lbfgs"), regression, epochs=30)
    assert lbfgs.history["loss"][-1] < adam.history["loss"][-1] - 1e-3
    # The minimum is ridge regression: noise variance 1 over prior variance 9.
    x, target = np.c_[(X - X.mean(0)) / X.std(0), np.ones(60)], (y - y.mean()) / y.std()
    best = np.linalg.solve(x.T @ x + np.eye(4) / 9.0, x.T @ target)
    np.testing.assert_allclose(lbfgs.get_params()["Dense0"]["kernel"][:, 0], best[:3], atol=1e-3)
    with pytest.raises(nb.errors.OptionError, match="batch_size"):
        train(make(optimizer="lbfgs"), regression, batch_size=10)


def test_a_schedule_is_read_at_every_step(regression):
    steps = optax.piecewise_constant_schedule(0.01, {6: 0.0})  # 3 steps an epoch: still from the third epoch on
    model = train(make(learning_rate=steps), regression, epochs=8, batch_size=20)
    short = train(make(learning_rate=steps), regression, epochs=2, batch_size=20)
    assert_same_params(model.get_params(), short.get_params(), rtol=0)
    constant = train(make(learning_rate=optax.constant_schedule(0.01)), regression)
    assert_same_params(constant.get_params(), train(make(learning_rate=0.01), regression).get_params(), rtol=0)


def test_sgd_is_gradient_descent(regression):
    """Against optax's own loop on the same objective."""
    X, y = regression
    model = train(make(optimizer="sgd", learning_rate=0.1, sigma=0.8), regression, epochs=1)
    start, epochs = dict(model.get_params()), 6
    x, target = ((a - a.mean(0)) / a.std(0) for a in (X, y))
    params, gradients, path = descend(start, x, target, 0.1, 0.8, epochs)
    train(model, regression, epochs=epochs, warm_start=True)
    assert_same_params(model.get_params(), params, rtol=1e-4, atol=1e-6)
    # Statistics are of the second half: the last three steps.
    statistics = model.training_statistics
    assert statistics.num_steps == 3
    for path_name, values in flat(statistics.weight_variance).items():
        expected = np.var([flat(p)[path_name] for p in path[3:]], axis=0)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-9)
    for path_name, values in flat(statistics.mean_abs_gradient).items():
        expected = np.mean([np.abs(flat(g)[path_name]) for g in gradients[3:]], axis=0)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-7)


def descend(params, x, target, rate, sigma, num_steps):
    """Gradient descent on the negative log joint over n, written out: weights, and all gradients and weights."""
    module = nb.FlaxMLP([6, 4], 1)

    def loss(params):
        outputs = module.apply({"params": params}, jnp.asarray(x, jnp.float32))[:, 0]
        log_prior = -0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) / sigma**2
        return (0.5 * jnp.sum((outputs - target) ** 2) - log_prior) / len(x)

    gradients, path = [], []
    for _ in range(num_steps):
        gradients.append(jax.jit(jax.grad(loss))(params))
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients[-1])
        path.append(params)
    return params, gradients, path


def test_statistics_cover_the_second_half_of_all_steps(regression):
    """Trap: "variance" sees only 4 % of the training."""
    model = train(make(), regression, epochs=300, batch_size=20)
    assert model.training_statistics.num_steps == 150 * 3
    single = snapshots(regression, 6)
    variance = train(make(), regression, epochs=6).training_statistics.weight_variance
    expected = jax.tree.map(lambda *leaves: np.var(leaves, axis=0), *map(dict, single[3:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-9), dict(variance), expected)


def test_an_optax_optimizer_brings_its_own_step_size(regression):
    decayed = train(make(optimizer=optax.adamw(0.01, weight_decay=0.5), map=False), regression, epochs=60)
    plain = train(make(optimizer=optax.adamw(0.01, weight_decay=0.0), map=False), regression, epochs=60)
    norm = [sum(np.sum(leaf**2) for leaf in flat(m.get_params()).values()) for m in (decayed, plain)]
    assert norm[0] < 0.9 * norm[1]
    same = train(make(learning_rate=0.01, map=False), regression, epochs=60)
    assert_same_params(plain.get_params(), same.get_params(), rtol=1e-3, atol=1e-4)
    with pytest.raises(nb.errors.OptionError, match="learning_rate"):
        make(optimizer=optax.adamw(0.01), learning_rate=0.1)
    with pytest.raises(nb.errors.OptionError, match="optax"):
        make(optimizer=optax.adamw)
    with pytest.raises(nb.errors.OptionError, match="lbfgs"):
        make(optimizer="lbgfs")


# Compilation, dropout, failures


def test_a_change_of_settings_recompiles_nothing(regression, trained, count_compilations):
    """Trap: every learning-rate change recompiles (55 s against 0.7 s)."""
    X, y = regression
    trained.predict(X)
    train(make(swa_config={"schedule": "constant"}), regression, epochs=40)
    with count_compilations() as compiled:
        model = make(learning_rate=0.003, sigma=0.3, noise_std=0.5, seed=7)
        train(model, (X[:59], y[:59]), epochs=33).predict(X)
        train(make(map=False, swa_config={"schedule": "linear"}), regression, epochs=200)
    assert compiled.number == 0
    assert len(model.history["loss"]) == 33


def test_a_second_fit_with_a_schedule_recompiles_nothing(regression, count_compilations):
    """Also where the schedule is made anew."""

    def fit():
        train(make(learning_rate=optax.cosine_decay_schedule(0.02, 40)), regression, epochs=40)

    fit()
    with count_compilations() as compiled:
        fit()
    assert compiled.number == 0


def test_dropout_acts_in_training_only(regression):
    X, _ = regression
    losses = []
    for rate in (0.0, 0.5):
        model = make(nb.FlaxMLP([16], 1, dropout_rate=rate), optimizer="sgd", learning_rate=1e-9, map=False)
        losses.append(train(model, regression, epochs=30).history["loss"])
        np.testing.assert_array_equal(model.predict(X), model.predict(X))
        # With fixed weights the prediction is that of the module without dropout.
        x = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
        outputs = nb.FlaxMLP([16], 1).apply({"params": dict(model.get_params())}, x)
        np.testing.assert_allclose(model.predict(X), model.scaling.mean_to_user(outputs)[:, 0], rtol=1e-4, atol=1e-5)
    assert np.ptp(losses[0]) < 1e-6
    assert losses[1].std() > 1e-3, "a new mask in every step"


@pytest.mark.parametrize(("optimizer", "epochs"), [("sgd", 1), ("sgd", 40), ("adam", 40)])
def test_training_that_diverges_raises_and_leaves_the_model(regression, optimizer, epochs):
    """Also in the very last step, whose weights no training loss has seen."""
    X, _ = regression
    options = {"optimizer": optimizer, "noise_std": 1e-3}
    with pytest.raises(nb.errors.TrainingError, match="learning rate"):
        train(make(**options, learning_rate=1e38), regression, epochs=epochs)
    model = train(make(**options, learning_rate=1e-9), regression, epochs=2)
    before, history = model.predict(X), model.history
    model.learning_rate = 1e38
    with pytest.raises(nb.errors.TrainingError):
        train(model, regression, epochs=epochs)
    np.testing.assert_array_equal(model.predict(X), before)
    assert model.history is history


def test_two_outputs_and_classes(two_outputs, three_classes):
    model = train(make(nb.FlaxMLP([6], 2)), two_outputs)
    assert model.predict(two_outputs[0][:4]).shape == (4, 2)
    assert model.is_regression
    classifier = nb.DeterministicNN(nb.FlaxMLP([6], 3), (4,), loss="cross_entropy")
    train(classifier, three_classes, epochs=200)
    assert classifier.predict(three_classes[0]).shape == (60, 3)
    assert np.mean(classifier.predict_classes(three_classes[0]) == three_classes[1]) > 0.6
    assert not classifier.is_regression
    with pytest.raises(nb.errors.OptionError, match="cross_entropy"):
        model.predict_classes(two_outputs[0])


def test_parameters_know_their_units_and_survive_tree_maps(regression, trained):
    params = trained.get_params()
    mapped = jax.tree.map(lambda leaf: leaf + 0.0, params)
    assert mapped.scaling == params.scaling == trained.scaling
    outputs = as_network(nb.FlaxMLP([6, 4], 1)).apply(dict(params), {}, trained.scaling.inputs(regression[0]))
    np.testing.assert_allclose(
        trained.scaling.mean_to_user(outputs)[:, 0], trained.predict(regression[0]), rtol=1e-5, atol=1e-6
    )
    assert trained.state.epoch == 10


def test_selection_on_its_own(regression, trained):
    chosen = nb.select_bayesian_components(trained, ["Dense0", "Dense1"], "gradient", 4)
    assert {name: len(set(pairs)) for name, pairs in chosen.items()} == {"Dense0": 4, "Dense1": 4}
    scores = np.asarray(trained.training_statistics.mean_abs_gradient["Dense0"]["kernel"])
    top = {tuple(map(int, np.unravel_index(i, scores.shape))) for i in np.argsort(-scores, axis=None)[:4]}
    assert set(chosen["Dense0"]) == top
    with pytest.raises(nb.errors.NeuroBayesError, match=r"(?i)train"):
        nb.select_bayesian_components(make(), ["Dense0"], "variance", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sigma": 0.0}, "sigma"), ({"learning_rate": -1.0}, "learning_rate"), ({"noise_std": 0.0}, "noise_std"),
     ({"loss": "mea"}, "loss"), ({"input_shape": (0,)}, "input_shape"), ({"input_shape": (2.5,)}, "input_shape"),
     ({"learning_rate": "fast"}, "learning_rate"), ({"seed": -1}, "seed"), ({"seed": 0, "rng_key": 0}, "rng_key")],
)  # fmt: skip
def test_bad_options_raise_before_training(regression, options, message):
    with pytest.raises(nb.errors.OptionError, match=message):
        train(nb.DeterministicNN(nb.FlaxMLP([6, 4], 1), **{"input_shape": (3,), **options}), regression)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 2.5}, {"batch_size": 0}, {"batch_size": 8.0}])
def test_bad_lengths_of_training_raise(regression, options):
    with pytest.raises(nb.errors.OptionError, match=next(iter(options))):
        make().train(*regression, **options)
