"""Faults that users met in an earlier library of this kind; each test quotes the one it rules out."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

TRANSFORMER = nb.FlaxTransformer(
    vocab_size=9, max_length=6, target_dim=1, d_model=4, num_heads=2, num_layers=1, mlp_dim=6, pad_token=0
)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    X = rng.integers(1, 9, (40, 6))
    X[:, 4:] *= rng.integers(0, 2, (40, 1))  # half of the rows end in padding
    return X, X.sum(1) + 0.1 * rng.normal(size=40)


def images(dims, size):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(20, *size, 2))
    return X, X.reshape(20, -1).mean(1)


def counts(model):
    return {path: number for path, number in model.partition.counts().items() if number}


# Selection


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"probabilistic_layer_names": ["Dense4"]}, r"'Dense4'.*Dense0, Dense1, Dense2.*closest: 'Dense\d'"),
     ({"probabilistic_layer_names": ["dense1"]}, r"'dense1'.*closest: 'Dense1'"),
     ({"probabilistic_neurons": {"Dens0": [(0, 1)]}}, r"'Dens0'.*closest: 'Dense0'"),
     ({"probabilistic_neurons": {"Dense0": [(0, 6)]}}, r"'Dense0'.*\(0, 6\) is out of range.*out 0\.\.5"),
     ({"probabilistic_neurons": {"Dense0": [(3, 0)]}}, r"\(3, 0\) is out of range.*in 0\.\.2"),
     ({"probabilistic_neurons": {"Dense0": [(-1, 0)]}}, r"\(-1, 0\) is out of range"),
     ({"probabilistic_neurons": {"Dense0": [(1, 0), (1, 0)]}}, r"\(1, 0\) is given twice"),
     ({"probabilistic_neurons": {"Dense0": [(1,)]}}, r"\(1,\) must hold 2 whole numbers"),
     ({"num_probabilistic_layers": 4}, r"4.*3"), ({"bayesian": nb.norms()}, r"norm")],
)  # fmt: skip
def test_a_typo_in_a_layer_name_gives_a_silently_deterministic_net(mlp, regression, quick, choice, message):
    """Also: unknown layer in probabilistic_neurons makes it fully Bayesian; out-of-range pairs accepted."""
    model = nb.PartialBNN(mlp, **choice, num_backbones=1)
    with pytest.raises(nb.errors.SelectionError, match=message):
        model.fit(*regression, **quick)
    with pytest.raises(nb.errors.NotFittedError):
        model.predict(regression[0])


@pytest.mark.parametrize(
    "choice",
    [{"num_probabilistic_layers": 0}, {"num_probabilistic_layers": -1}, {"probabilistic_layer_names": []},
     {"probabilistic_layer_names": "Dense1"}, {"probabilistic_neurons": {}}, {"probabilistic_neurons": {"Dense0": []}},
     {"bayesian": "Dense1"}],
)  # fmt: skip
def test_an_empty_or_malformed_choice_raises_at_construction(mlp, choice):
    with pytest.raises(nb.errors.SelectionError, match=next(iter(choice)).replace("_neurons", "_neurons|weights")):
        nb.PartialBNN(mlp, **choice, num_backbones=1)


def test_pairs_sharing_an_output_make_one_dead_bias_site_each(mlp, regression, quick):
    model = nb.PartialBNN(mlp, probabilistic_neurons={"Dense0": [(0, 1), (1, 1), (2, 1)]}, num_backbones=1)
    assert counts(model.fit(*regression, **quick)) == {"Dense0.kernel": 3}
    assert set(model.get_samples()) == {"Dense0.kernel", "noise_std"}


@pytest.mark.parametrize("number", [0, -3, 2.5, True])
def test_num_pairs_0_selects_all_negatives_nonsense(mlp, regression, quick, number):
    config = {"method": "magnitude", "layer_names": ["Dense0"], "num_pairs_per_layer": number}
    with pytest.raises(nb.errors.OptionError, match="num_pairs_per_layer"):
        nb.PartialBNN(mlp, num_backbones=1).fit(*regression, **quick, select_neurons_config=config)


def test_clustering_unseeded_fails_for_fewer_rows_than_clusters(mlp, regression, quick):
    """Three rows and ten clusters: ten distinct pairs, the same for a seed; and 18 where 50 are asked of 18."""

    def chosen(number, **config):
        config = {"method": "clustering", "layer_names": ["Dense0"], "num_pairs_per_layer": number, **config}
        return (
            nb.PartialBNN(mlp, num_backbones=1)
            .fit(*regression, **quick, select_neurons_config=config)
            .partition.masks()
        )

    first = chosen(10)
    assert first["Dense0.kernel"].sum() == 10
    assert sum(mask.sum() for mask in first.values()) == 10
    np.testing.assert_array_equal(first["Dense0.kernel"], chosen(10)["Dense0.kernel"])
    assert chosen(50)["Dense0.kernel"].sum() == 18


@pytest.mark.parametrize("given", [False, True])
def test_bad_config_reported_only_after_pre_training(mlp, regression, quick, monkeypatch, given):
    """The rest of it: ignored with deterministic_weights."""
    weights = None
    if given:
        weights = nb.DeterministicNN(mlp, (3,)).train(*regression, epochs=1, progress_bar=False).get_params()
    monkeypatch.setattr("neurobayes.training.train", lambda *a, **k: pytest.fail("training has started"))
    model = nb.PartialBNN(mlp, deterministic_weights=weights, num_backbones=1)
    good = {"method": "variance", "layer_names": ["Dense0"], "num_pairs_per_layer": 2}
    for change, error in (
        ({"method": "varience"}, "method.*closest: 'variance'"), ({"layer_names": ["Dense9"]}, "Dense9"),
        ({"layer_names": []}, "layer_names"), ({"layer_names": "Dense0"}, "layer_names"),
        ({"layers": ["Dense0"]}, "'layers'.*closest: 'layer_names'"),
    ):  # fmt: skip
        with pytest.raises(nb.errors.NeuroBayesError, match=error):
            model.fit(*regression, **quick, select_neurons_config=good | change)


def test_a_selection_config_works_with_deterministic_weights(mlp, regression, quick):
    det = nb.DeterministicNN(mlp, (3,)).train(*regression, epochs=10, progress_bar=False)
    config = {"method": "variance", "layer_names": ["Dense1"], "num_pairs_per_layer": 5}
    model = nb.PartialBNN(mlp, deterministic_weights=det.get_params(), num_backbones=1)
    model.fit(*regression, **quick, select_neurons_config=config)
    assert counts(model) == {"Dense1.kernel": 5}
    picked = nb.select_bayesian_components(det, ["Dense1"], "variance", 5)["Dense1"]
    mask = model.partition.masks()["Dense1.kernel"]
    assert sorted(map(tuple, np.argwhere(mask).tolist())) == sorted(picked)


# Architectures


def test_transformer_bayesian_version_computes_a_different_function(tokens, at_the_trained_weights):
    """Head before pooling: every weight Bayesian and every draw at the trained weights must change nothing."""
    X, y = tokens
    model = nb.PartialBNN(TRANSFORMER, bayesian=nb.everything(), num_backbones=1).fit(X, y, **at_the_trained_weights)
    by_flax = TRANSFORMER.apply({"params": dict(model.pretraining.params)}, jnp.asarray(X, jnp.int32))
    expected = y.mean() + y.std() * np.asarray(by_flax, float)[:, 0]
    np.testing.assert_allclose(model.predict(X)[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.deterministic_predict(X), expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_attention_out_indices_wrong(tokens, quick):
    """Each index tuple makes just the weight random that it names."""
    neurons = {
        "Block0_Attention": [("query", 0, 3), ("out", 3, 0), ("value", 2, 2)],
        "TokenEmbed": [(8, 3), (1, 0)],
        "PosEmbed": [(5, 1)],
    }
    model = nb.PartialBNN(TRANSFORMER, probabilistic_neurons=neurons, num_backbones=1).fit(*tokens, **quick)
    assert counts(model) == {
        "Block0_Attention.out.kernel": 1, "Block0_Attention.query.kernel": 1, "Block0_Attention.value.kernel": 1,
        "PosEmbed.embedding": 1, "TokenEmbed.embedding": 2,
    }  # fmt: skip
    masks = model.partition.masks()
    # Two heads of size two: the output 3 is (1, 1), and so is the input 3 of the last projection.
    assert np.argwhere(masks["Block0_Attention.query.kernel"]).tolist() == [[0, 1, 1]]
    assert np.argwhere(masks["Block0_Attention.out.kernel"]).tolist() == [[1, 1, 0]]
    assert np.argwhere(masks["TokenEmbed.embedding"]).tolist() == [[1, 0], [8, 3]]
    assert np.all(np.isfinite(model.predict(tokens[0])[0]))
    with pytest.raises(nb.errors.SelectionError, match=r"'out'.*'output'"):
        nb.PartialBNN(TRANSFORMER, probabilistic_neurons={"Block0_Attention": [("output", 0, 0)]}, num_backbones=1).fit(
            *tokens, **quick
        )


@pytest.mark.parametrize("method", ["variance", "gradient", "magnitude", "clustering"])
def test_selection_in_attention_and_embedding(tokens, quick, method):
    config = {"method": method, "layer_names": ["TokenEmbed", "Block0_Attention"], "num_pairs_per_layer": 6}
    model = nb.PartialBNN(TRANSFORMER, num_backbones=1).fit(*tokens, **quick, select_neurons_config=config)
    found = counts(model)
    assert found.pop("TokenEmbed.embedding") == 6
    assert sum(found.values()) == 6 and all(path.startswith("Block0_Attention.") for path in found)


def test_layer_norm_counted_but_never_bayesian(tokens, quick):
    model = nb.PartialBNN(TRANSFORMER, probabilistic_layer_names=["Block0_LayerNorm1"], num_backbones=1).fit(
        *tokens, **quick
    )
    assert counts(model) == {"Block0_LayerNorm1.bias": 4, "Block0_LayerNorm1.scale": 4}
    assert np.max(model.posterior_predictive(tokens[0]).epistemic_var) > 0
    model = nb.PartialBNN(TRANSFORMER, num_probabilistic_layers=3, num_backbones=1).fit(*tokens, **quick)
    # The last three layers: norms are not counted, so LayerNorm2 stands aside and MLP_dense2 is the third.
    layers = {path.rpartition(".")[0] for path in counts(model)}
    assert layers == {"FinalDense1", "FinalDense2", "Block0_MLP_dense2"}


def test_out_of_vocabulary_tokens_give_nan(tokens, quick):
    X, y = tokens
    model = nb.PartialBNN(TRANSFORMER, num_backbones=1).fit(X, y, **quick)
    for bad in (9, -1, 2**31):
        with pytest.raises(nb.errors.DataError, match=r"outside 0\.\.8"):
            model.predict(np.where(np.arange(6) == 2, bad, X))
    # Shorter sequences are fine, and padding them changes nothing.
    shorter = np.c_[X[:, :4], np.zeros((40, 2), int)]
    np.testing.assert_allclose(model.predict(X[:, :4])[0], model.predict(shorter)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dims", "size"), [(1, (7,)), (2, (5, 3)), (3, (3, 5, 2))])
def test_conv_1d_and_3d_partial_always_fail(quick, dims, size):
    """Also: odd image sizes fail."""
    X, y = images(dims, size)
    network = nb.FlaxConvNet(input_dim=dims, conv_layers=[3], fc_layers=[4], target_dim=1)
    model = nb.PartialBNN(
        network,
        probabilistic_layer_names=["Dense1"],
        probabilistic_neurons={"Conv0": [(0, 2), (1, 1)]},
        num_backbones=1,
    )
    model.fit(X, y, **quick)
    window = 3**dims
    assert counts(model) == {"Conv0.kernel": 2 * window, "Dense1.bias": 1, "Dense1.kernel": 4}
    mask = model.partition.masks()["Conv0.kernel"]
    assert mask[..., 0, 2].all() and mask[..., 1, 1].all()
    mean, variance = model.predict(X[:6])
    assert mean.shape == variance.shape == (6,)
    config = {"method": "magnitude", "layer_names": ["Conv0"], "num_pairs_per_layer": 4}
    model = nb.PartialBNN(network, num_backbones=1).fit(X, y, **quick, select_neurons_config=config)
    assert counts(model) == {"Conv0.kernel": 4 * window}


def test_images_without_a_channel_axis(quick):
    X, y = images(2, (4, 4))
    network = nb.FlaxConvNet(input_dim=2, conv_layers=[2], fc_layers=[], target_dim=1)
    model = nb.PartialBNN(network, num_backbones=1).fit(X[..., 0], y, **quick)
    np.testing.assert_array_equal(model.predict(X[..., 0])[0], model.predict(X[..., :1])[0])


class Residual(nn.Module):
    """A user's own network: submodules made in setup, one of them used twice, and a function of it jitted."""

    def setup(self):
        self.first = nn.Dense(5)
        self.shared = nn.Dense(5)
        self.head = nn.Dense(1)

    def __call__(self, x):
        h = nn.tanh(self.first(x))
        h = h + nn.tanh(self.shared(h))
        h = h + jax.jit(nn.tanh)(self.shared(h))
        return self.head(h)


class TwoHeads(nn.Module):
    """Two heads on one trunk, side by side in the output."""

    as_tuple: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(5, name="trunk")(x))
        heads = nn.Dense(1, name="left")(h), nn.Dense(1, name="right")(h)
        return heads if self.as_tuple else jnp.concatenate(heads, axis=-1)


def test_own_networks_unsupported(regression, at_the_trained_weights):
    X, y = regression
    model = nb.PartialBNN(Residual(), probabilistic_layer_names=["shared"], num_backbones=1).fit(
        X, y, **at_the_trained_weights
    )
    assert counts(model) == {"shared.bias": 5, "shared.kernel": 25}
    x = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    outputs = Residual().apply({"params": dict(model.pretraining.params)}, x)
    np.testing.assert_allclose(model.predict(X)[0], y.mean() + y.std() * outputs[:, 0], rtol=1e-4, atol=1e-5)


def test_two_head_networks_unsupported(two_outputs, quick):
    model = nb.PartialBNN(TwoHeads(), probabilistic_layer_names=["left"], num_backbones=1).fit(*two_outputs, **quick)
    assert counts(model) == {"left.bias": 1, "left.kernel": 5}
    epistemic = model.posterior_predictive(two_outputs[0]).epistemic_var
    assert epistemic[:, 0].min() > 0
    assert epistemic[:, 1].max() < 1e-8 * epistemic[:, 0].max() * 100
    with pytest.raises(nb.errors.OptionError, match=r"array of shape \(n, outputs\).*tuple"):
        nb.PartialBNN(TwoHeads(as_tuple=True), num_backbones=1).fit(*two_outputs, **quick)


# Training and inference


@pytest.mark.parametrize("activation", ["sliu", "Tanhh", "", 3])
def test_any_unknown_activation_is_silu(activation):
    with pytest.raises(nb.errors.OptionError, match=r"(?s)activation.*(tanh|silu|function)"):
        nb.FlaxMLP([4], 1, activation=activation)


def test_dropout_is_off_when_the_network_is_bayesian(regression, at_the_trained_weights):
    X, y = regression
    network = nb.FlaxMLP([8], 1, dropout_rate=0.4)
    model = nb.PartialBNN(network, num_backbones=1).fit(X, y, **at_the_trained_weights)
    assert np.max(model.posterior_predictive(X).epistemic_var) < 1e-10
    np.testing.assert_allclose(model.predict(X)[0], model.deterministic_predict(X), rtol=1e-5, atol=1e-6)


def test_divergences_without_a_word(mlp, regression, short):
    """The trap: 200 of 1000 trajectories diverged, and nothing was said."""
    few = {**short, "num_samples": 6}
    with pytest.warns(nb.errors.ConvergenceWarning, match=r"(?s)Do not trust.*To mend it"):
        model = nb.PartialBNN(mlp, num_probabilistic_layers=1, num_backbones=1).fit(*regression, **few)
    diagnostics = model.diagnostics()
    assert not diagnostics.ok
    assert diagnostics.verdict.startswith("Do not trust")


def test_good_draws_are_said_to_be_good(mlp, regression, short):
    model = nb.PartialBNN(mlp, num_probabilistic_layers=1, num_backbones=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nb.errors.ConvergenceWarning)
        model.fit(*regression, **{**short, "num_samples": 1500})
    diagnostics = model.diagnostics()
    assert diagnostics.ok and diagnostics.verdict.startswith("The draws can be trusted")
    assert diagnostics.r_hat < 1.05 and diagnostics.ess_bulk > 100


def test_predicting_before_fitting_says_so(mlp):
    for call in ("predict", "posterior_predictive", "sample_from_posterior", "deterministic_predict"):
        with pytest.raises(nb.errors.NotFittedError, match=r"fit\(X, y\)"):
            getattr(nb.PartialBNN(mlp, num_backbones=1), call)(np.ones((2, 3)))
    for call in ("get_samples", "diagnostics"):
        with pytest.raises(nb.errors.NotFittedError, match=r"fit\(X, y\)"):
            getattr(nb.PartialBNN(mlp, num_backbones=1), call)()
    with pytest.raises(nb.errors.NotFittedError, match=r"train\(X, y\)"):
        nb.DeterministicNN(mlp, (3,)).predict(np.ones((2, 3)))


def test_variance_is_never_negative_far_from_the_data(mlp, regression, quick):
    X, y = regression
    model = nb.PartialBNN(mlp, num_backbones=1).fit(X, y, **quick)
    _, variance = model.predict(1e6 * X)
    assert np.all(np.isfinite(variance)) and np.all(variance > 0)
