"""The printed table of layers, for networks and models of every kind."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import neurobayes as nb

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

CONV = nb.FlaxConvNet(input_dim=2, conv_layers=[3, 4], fc_layers=[5], target_dim=1, kernel_size=3)
TRANSFORMER = nb.FlaxTransformer(
    vocab_size=9, max_length=5, target_dim=1, d_model=4, num_heads=2, num_layers=1, mlp_dim=6
)


def table(capsys, *args, **kwargs):
    """The printed rows by layer: (kind, weights, Bayesian), and the text."""
    nb.print_layer_configs(*args, **kwargs)
    text = capsys.readouterr().out
    header, *lines = text.splitlines()
    assert header.split() == ["layer", "kind", "shapes", "weights", "Bayesian"]
    rows = {}
    for line in lines:
        cells = re.split(r"  +", line)
        rows[cells[0]] = (cells[1] if len(cells) == 5 else None, cells[-2], cells[-1])
    return rows, text


def test_bare_mlp_without_input_shape(capsys, mlp):
    rows, text = table(capsys, mlp)
    assert rows["Dense0"] == ("dense", "?", "-")
    assert rows["Dense1"] == ("dense", "28", "-")
    assert rows["total"] == (None, "?", "-")
    assert "kernel (?, 6)" in text


def test_bare_mlp_with_input_shape(capsys, mlp):
    rows, text = table(capsys, mlp, input_shape=(3,))
    assert rows["Dense0"] == ("dense", "24", "-")
    assert rows["total"] == (None, "57", "-")
    assert "kernel (3, 6)" in text


def test_unfitted_and_fitted_partially_bayesian_model(capsys, mlp, regression, quick):
    model = nb.PartialBNN(
        mlp, num_probabilistic_layers=1, probabilistic_neurons={"Dense0": [(0, 5), (2, 1)]}, num_backbones=1
    )
    rows, _ = table(capsys, model)
    assert rows["Dense2"] == ("dense", "5", "-")
    model.fit(*regression, **quick)
    rows, _ = table(capsys, model)
    assert rows["Dense0"] == ("dense", "24", "2")
    assert rows["Dense1"] == ("dense", "28", "0")
    assert rows["Dense2"] == ("dense", "5", "5")
    assert rows["total"] == (None, "57", "7")
    assert model.num_bayesian_weights == 7


def test_deterministic_model_before_and_after_training(capsys, mlp, regression):
    model = nb.DeterministicNN(mlp, input_shape=(3,))
    before, _ = table(capsys, model)
    after, _ = table(capsys, model.train(*regression, epochs=2, progress_bar=False))
    assert before == after
    assert before["total"] == (None, "57", "-")


def test_conv(capsys):
    rows, text = table(capsys, CONV)
    assert rows["Conv0"][0] == "conv" and rows["Conv1"] == ("conv", str(3 * 3 * 3 * 4 + 4), "-")
    assert "kernel (3, 3, 3, 4)" in text
    assert rows["total"][1] == "?"
    rows, _ = table(capsys, CONV, input_shape=(7, 5, 1))
    # 7 x 5 is halved twice, rounded up: 2 x 2 cells of 4 channels.
    assert rows["Dense0"] == ("dense", str(16 * 5 + 5), "-")
    assert rows["total"][1] == str((9 * 3 + 3) + (27 * 4 + 4) + 85 + 6)


def test_transformer(capsys):
    rows, _ = table(capsys, TRANSFORMER)
    assert list(rows) == [
        "TokenEmbed", "PosEmbed", "Block0_Attention", "Block0_LayerNorm1", "Block0_MLP_dense1", "Block0_MLP_dense2",
        "Block0_LayerNorm2", "FinalDense1", "FinalDense2", "total",
    ]  # fmt: skip
    assert rows["TokenEmbed"] == ("embedding", "36", "-")
    assert rows["Block0_Attention"] == ("attention", str(4 * 20), "-")
    assert rows["Block0_LayerNorm1"] == ("norm", "8", "-")


class Backbone(nnx.Module):
    """Attributes whose names sort neither in the order of definition nor of the calls."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        self.attention = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(4))
        self.final = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.final(self.attention(x[:, None])[:, 0] * self.scale[...])


def foreign_networks():
    keys = jax.random.split(jax.random.key(0), 2)
    sequential = eqx.nn.Sequential([
        eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(4, 1, key=keys[1])
    ])  # fmt: skip
    function = (lambda params, x: jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"],
                {"b": {"w": jnp.ones((4, 1))}, "a": {"w": jnp.ones((3, 4))}})  # fmt: skip
    blocks = [f"blocks.{i}" for i in range(11)]
    return [
        pytest.param(Backbone(nnx.Rngs(0)), ["stem", *blocks, "attention", "final", "scale"], id="nnx"),
        pytest.param(sequential, ["layers.0", "layers.2"], id="equinox"),
        pytest.param(function, ["a", "b"], id="function"),
    ]


@pytest.mark.parametrize(("network", "names"), foreign_networks())
def test_a_module_that_has_its_weights_needs_no_input_shape(capsys, network, names):
    rows, _ = table(capsys, network)
    assert list(rows) == [*names, "total"]
    assert rows == table(capsys, network, input_shape=(3,))[0]  # the same but for the order
    model = nb.PartialBNN(network, bayesian=nb.everything())
    assert table(capsys, model)[0] == rows


def test_a_network_that_needs_an_input_shape_says_so(capsys):
    import flax.linen as nn

    own = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(1)])
    with pytest.raises(nb.errors.OptionError, match="input_shape"):
        nb.print_layer_configs(own)
    rows, _ = table(capsys, own, input_shape=(2,))
    assert rows["total"][1] == str(2 * 3 + 3 + 3 + 1)
