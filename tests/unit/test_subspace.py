"""A plane through weight space: its coordinates, its directions, and its posterior."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import neurobayes as nb
from neurobayes import directions, priors
from neurobayes.errors import OptionError, ParameterError, SelectionError, TrainingError
from neurobayes.inference.nuts import NUTS
from neurobayes.likelihoods import Categorical, Gaussian
from neurobayes.log_density import build
from neurobayes.networks import as_network
from neurobayes.selectors import resolve
from neurobayes.subspaces import Subspace
from neurobayes.training import Rows

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 2)).astype(np.float32)
Y = (X[:, :1] - 0.5 * X[:, 1:] ** 2 + 0.1 * RNG.normal(size=(30, 1))).astype(np.float32)
ROWS = Rows(X, Y, np.ones(30, np.float32))
NETWORK = as_network(nb.FlaxMLP([3], 1))
PARAMS, STATE = jax.tree.map(np.asarray, NETWORK.init(jax.random.key(1), X))
FLAT, UNRAVEL = ravel_pytree(PARAMS)
NOISE = np.array([0.3], np.float32)


def random_directions(k, params=PARAMS, seed=0):
    generator = np.random.default_rng(seed)
    paths = priors.trees.shapes(params)
    return {path: generator.normal(size=(k, *shape)) for path, shape in paths.items()}


def as_matrix(plane):
    return np.concatenate([b.reshape(plane.size, -1) for b in plane.basis], axis=1)


@pytest.fixture(scope="module")
def plane():
    return Subspace.of(random_directions(4), PARAMS)


def test_split_inverts_merge_on_the_plane(plane):
    theta = np.float32([0.3, -2.0, 1.0, 0.0])
    merged = plane.merge(theta, PARAMS)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(ravel_pytree(merged)[0], FLAT + theta @ as_matrix(plane), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plane.split(merged), theta, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, plane.merge(np.zeros(4, np.float32), PARAMS), PARAMS)


def test_split_is_the_nearest_point_of_the_plane(plane):
    away = UNRAVEL(FLAT + np.random.default_rng(5).normal(size=FLAT.shape).astype(np.float32))
    residual = ravel_pytree(away)[0] - ravel_pytree(plane.merge(plane.split(away), PARAMS))[0]
    np.testing.assert_allclose(as_matrix(plane) @ residual, 0, atol=1e-5)


def test_directions_are_orthonormal_and_span_what_was_given(plane):
    matrix = as_matrix(plane)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(4), atol=1e-6)
    given = np.concatenate([v.reshape(4, -1) for v in random_directions(4).values()], axis=1)
    np.testing.assert_allclose(given @ matrix.T @ matrix, given, atol=1e-5)
    assert given[0] @ matrix[0] > 0  # the first direction keeps its sign


def test_dependent_directions_raise():
    given = random_directions(2)
    given = {path: np.concatenate([leaf, 2 * leaf[:1]]) for path, leaf in given.items()}
    with pytest.raises(ParameterError, match="linearly independent"):
        Subspace.of(given, PARAMS)


def test_interface_of_a_partition(plane):
    assert plane.size == 4 and repr(plane) == "<Subspace: 4 coordinates for 13 scalars in 4 leaves>"
    assert plane.unravel(np.zeros((5, 4)))["subspace"].shape == (5, 4)
    assert plane.counts() == {path: int(np.prod(shape)) for path, shape in plane.leaves}
    assert all(mask.all() for mask in plane.masks().values())
    for wrong in (lambda: plane.merge(np.zeros(3), PARAMS), lambda: plane.unravel(np.zeros((5, 3)))):
        with pytest.raises(ParameterError, match="3"):
            wrong()
    with pytest.raises(ParameterError, match="do not fit the subspace"):
        plane.split({"a": np.zeros(3)})
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(plane)))
    assert again.leaves == plane.leaves and hash(jax.tree.structure(plane)) == hash(jax.tree.structure(again))


def test_weights_that_no_direction_moves_are_counted_as_frozen():
    given = random_directions(2)
    given["Dense0.bias"][:] = 0
    plane = Subspace.of(given, PARAMS)
    assert plane.counts()["Dense0.bias"] == 0 and not plane.masks()["Dense0.bias"].any()


def test_prior_is_that_of_the_weights_restricted_to_the_plane(plane):
    theta = np.float32([0.5, -1.0, 2.0, 0.1])
    weights = np.asarray(ravel_pytree(plane.merge(theta, PARAMS))[0], float)
    for prior_mean, centre in (("map", np.asarray(FLAT, float)), ("zero", np.zeros(len(FLAT)))):
        prior = priors.weight_prior(plane, PARAMS, 0.7, prior_mean)

        def full(flat, centre=centre):
            return -0.5 * np.sum((flat - centre) ** 2) / 0.49

        difference = full(weights) - full(np.asarray(FLAT, float))
        got = prior.log_prob(theta) - prior.log_prob(np.zeros(4, np.float32))
        np.testing.assert_allclose(got, difference, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(prior.std, 0.7)


# Directions


def dense_ggn(likelihood, y, network=NETWORK, params=PARAMS):
    flat, unravel = ravel_pytree(params)
    total = np.zeros((len(flat), len(flat)))
    for i in range(len(X)):

        def outputs(flat, i=i):
            return network.apply(unravel(flat), {}, X[i : i + 1])[0]

        jacobian = np.asarray(jax.jacobian(outputs)(flat), float)
        curvature = jax.hessian(lambda f, i=i: -likelihood.log_prob(f[None], y[i : i + 1], NOISE)[0])(outputs(flat))
        total += jacobian.T @ np.asarray(curvature, float) @ jacobian
    return total


@pytest.mark.parametrize("rows_per_chunk", [7, 256])
@pytest.mark.parametrize("kind", ["numbers", "classes"])
def test_hessian_directions_are_the_leading_eigenvectors(kind, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(directions, "ROWS_PER_CHUNK", rows_per_chunk)
    network = NETWORK if kind == "numbers" else as_network(nb.FlaxMLP([3], 3))
    params = jax.tree.map(np.asarray, network.init(jax.random.key(2), X)[0])
    y, likelihood = (Y, Gaussian()) if kind == "numbers" else (RNG.integers(0, 3, 30).astype(np.int32), Categorical())
    found, values = directions.hessian_directions(
        jax.random.key(0), network, params, {}, Rows(X, y, ROWS.real), likelihood, NOISE, 3
    )
    exact_values, exact = np.linalg.eigh(dense_ggn(likelihood, y, network, params))
    np.testing.assert_allclose(values, exact_values[::-1][:3], rtol=1e-3)
    matrix = np.concatenate([leaf.reshape(3, -1) for leaf in found.values()], axis=1)
    overlap = np.abs(matrix @ exact[:, ::-1][:, :3])
    np.testing.assert_allclose(np.diag(overlap), 1, atol=1e-3)


def test_padded_rows_do_not_count():
    real = np.r_[np.ones(20), np.zeros(10)].astype(np.float32)
    arguments = (jax.random.key(0), NETWORK, PARAMS, STATE)
    _, padded = directions.hessian_directions(*arguments, Rows(X, Y, real), Gaussian(), NOISE, 2)
    _, short = directions.hessian_directions(*arguments, Rows(X[:20], Y[:20], real[:20]), Gaussian(), NOISE, 2)
    np.testing.assert_allclose(padded, short, rtol=1e-4)


def test_principal_directions_are_those_of_the_singular_value_decomposition():
    snapshots = {path: leaf.astype(np.float32) for path, leaf in random_directions(9).items()}
    found = directions.principal_directions(snapshots, 3)
    flat = np.concatenate([leaf.reshape(9, -1) for leaf in snapshots.values()], axis=1)
    exact = np.linalg.svd(flat - flat.mean(0))[2][:3]
    matrix = np.concatenate([leaf.reshape(3, -1) for leaf in found.values()], axis=1)
    np.testing.assert_allclose(np.abs(np.diag(matrix @ exact.T)), 1, atol=1e-5)


def test_snapshots_that_do_not_move_raise():
    still = {path: np.broadcast_to(leaf, (5, *leaf.shape)) for path, leaf in priors.trees.flatten(PARAMS).items()}
    with pytest.raises(OptionError, match="0 directions while 2"):
        directions.principal_directions(still, 2)


def collect(choice, **changed):
    arguments = {
        "network": NETWORK,
        "params": PARAMS,
        "state": STATE,
        "rows": ROWS,
        "likelihood": Gaussian(),
        "noise_std": NOISE,
        "prior_precision": 1.0,
        **changed,
    }
    return directions.collect_snapshots(choice, jax.random.key(4), **arguments)


def test_snapshots_are_kept_evenly_along_one_run():
    few = collect(nb.subspace(2, epochs=12, num_snapshots=3))
    many = collect(nb.subspace(2, epochs=12, num_snapshots=6))
    for path, leaf in few.items():
        assert leaf.shape == (3, *priors.trees.flatten(PARAMS)[path].shape)
        np.testing.assert_allclose(leaf, many[path][1::2], rtol=1e-4, atol=1e-5)
    moved = np.concatenate([(leaf[-1] - priors.trees.flatten(PARAMS)[path]).ravel() for path, leaf in few.items()])
    assert 0.005 < np.abs(moved).max() < 1.0


def test_a_stage_that_diverges_raises():
    broken = ROWS._replace(y=np.full_like(Y, np.inf))
    with pytest.raises(TrainingError, match="learning_rate"):
        collect(nb.subspace(2, epochs=3, num_snapshots=3), rows=broken)


# The selector


@pytest.mark.parametrize(
    "combine",
    [lambda s: s | nb.last(1), lambda s: nb.last(1) | s, lambda s: nb.everything() & s, lambda s: nb.everything() - s],
)
def test_combining_raises_and_says_how_to_use_it(combine):
    with pytest.raises(SelectionError, match=r"cannot be combined.*bayesian=subspace\(3"):
        combine(nb.subspace(3))


def test_wrong_options_raise():
    for wrong in (lambda: nb.subspace(0), lambda: nb.subspace(2.5), lambda: nb.subspace(True)):
        with pytest.raises(SelectionError, match="rank"):
            wrong()
    for wrong, words in (
        (lambda: nb.subspace(2, "pca"), "from_"),
        (lambda: nb.subspace(2, "hessian", epochs=3), "epochs"),
        (lambda: nb.subspace(3, num_snapshots=3), "num_snapshots"),
        (lambda: nb.subspace(3, num_snapshots=5, epochs=4), "epochs"),
        (lambda: nb.subspace(3, num_snapshots=5, epochs=5000), "more snapshots"),
    ):
        with pytest.raises(OptionError, match=words):
            wrong()


def test_what_a_fit_would_stumble_over_raises_before_training():
    quick = {"sgd_epochs": 10**9, "map_sigma": 1.0, "progress_bar": False}  # would never end
    model = nb.PartialBNN(nb.FlaxMLP([3], 1), bayesian=nb.subspace(2), num_backbones=1)
    with pytest.raises(OptionError, match="priors_sigma must be one number"):
        model.fit(X, Y, priors_sigma={"Dense0": 1.0}, **quick)
    config = {"method": "magnitude", "layer_names": ["Dense0"], "num_pairs_per_layer": 2}
    with pytest.raises(SelectionError, match="select_neurons_config"):
        model.fit(X, Y, select_neurons_config=config, **quick)
    with pytest.raises(SelectionError, match="13 weights"):
        nb.PartialBNN(nb.FlaxMLP([3], 1), bayesian=nb.subspace(13), num_backbones=1).fit(X, Y, **quick)
    with pytest.raises(SelectionError, match="cannot be combined"):
        nb.PartialBNN(nb.FlaxMLP([3], 1), bayesian=nb.subspace(2), num_probabilistic_layers=1, num_backbones=1)
    info = nb.DeterministicNN(nb.FlaxMLP([3], 1), input_shape=(2,)).network_info()
    with pytest.raises(SelectionError, match=r"pass it alone"):
        resolve(nb.subspace(2), info)


# The posterior


def test_nuts_on_a_plane_of_a_linear_model_is_the_closed_form():
    """y = X w + noise of known size: in the plane w = c + B' theta this is linear regression on X B'."""
    generator = np.random.default_rng(7)
    features = generator.normal(size=(40, 6)).astype(np.float32)
    targets = (features @ generator.normal(size=(6, 1)) + 0.5 * generator.normal(size=(40, 1))).astype(np.float32)
    params = {"w": generator.normal(size=(6, 1)).astype(np.float32)}
    network = as_network((lambda p, x: x @ p["w"], params))
    plane = Subspace.of({"w": generator.normal(size=(2, 6, 1))}, params)

    class Known(Gaussian):
        def num_noise(self, num_outputs):
            return 0

        def log_prob(self, outputs, y, noise_std):
            return super().log_prob(outputs, y, jnp.float32(0.5))

    prior = priors.weight_prior(plane, params, 0.8, "map")
    density = build(network, plane, params, {}, features, targets, np.ones(40, np.float32),
                    likelihood=Known(), prior=prior, noise_prior=None)  # fmt: skip
    draws = NUTS().run(jax.random.key(0), density, np.zeros(2, np.float32), num_warmup=300, num_samples=2000).flat_draws
    design = np.asarray(features, float) @ as_matrix(plane).T.astype(float)
    covariance = np.linalg.inv(design.T @ design / 0.25 + np.eye(2) / 0.64)
    mean = covariance @ design.T @ (targets - features @ params["w"])[:, 0] / 0.25
    # 2,000 draws of low autocorrelation: at least 500 effective ones, and four of their standard errors
    std = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * std.max() / np.sqrt(500))
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=4 * covariance.max() * np.sqrt(2 / 500))


@pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
@pytest.mark.parametrize("source", [pytest.param("swa", marks=pytest.mark.slow), "hessian"])
def test_fit_end_to_end(source):
    options = {"num_warmup": 60, "num_samples": 60, "sgd_epochs": 60, "map_sigma": 1.0, "progress_bar": False}

    def fit(seed):
        return nb.PartialBNN(nb.FlaxMLP([3], 1), bayesian=nb.subspace(3, source), num_backbones=1).fit(
            X, Y, seed=seed, **options
        )

    model = fit(0)
    assert isinstance(model.partition, Subspace) and model.num_bayesian_weights == 3
    assert model.get_samples()["subspace"].shape == (60, 3)
    mean, var = model.predict(X)
    assert mean.shape == Y.shape and (var > 0).all()
    assert np.sqrt(np.mean((mean - Y) ** 2)) < Y.std()
    np.testing.assert_array_equal(fit(0).predict(X)[0], mean)
    assert not np.array_equal(fit(1).predict(X)[0], mean)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X)[0], mean)
    at_centre = NETWORK.apply(model.pretraining.params, {}, ((X - X.mean(0)) / X.std(0)).astype(np.float32))
    np.testing.assert_allclose(model.deterministic_predict(X), at_centre * Y.std() + Y.mean(), atol=1e-4)
