"""What the frozen part of a network costs: gradients of the log density, and predictions."""

import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result
from neurobayes import data, log_density, predictive, priors, selectors
from neurobayes._threads import side_by_side
from neurobayes.likelihoods import Gaussian
from neurobayes.models.base import network_info
from neurobayes.networks import as_network
from neurobayes.predictive import Source

ROWS = 500


def hoisting(repeats: int) -> Result:
    """One gradient of the log density: ours, hand-written on precomputed features, and through the whole network."""
    checks, details = [], {}
    for name, setup, num_gradients, num_whole in (
        ("Transformer", _transformer, 20_000, 3),
        ("ConvNet", _convnet, 100, 20),
    ):
        module, x, y, layers, features = setup()
        density, params, partition = _density(module, x, y, layers)
        centre = jnp.asarray(partition.split(params))
        hand, hand_terms = _hand_written(partition, params), (features(module, params, x), y, centre)
        whole, whole_terms = _whole_network(module, partition), (params, x, y, centre)
        position = np.concatenate([np.asarray(partition.split(params)), [np.log(0.5)]]).astype(np.float32)
        values = [float(density(position)), float(hand(position, hand_terms)), float(whole(position, whole_terms))]
        np.testing.assert_allclose(values, values[0], rtol=1e-4)
        times = _common.time_together(
            {
                "ours": _gradients(density.form, density.terms, position, num_gradients),
                "hand_written": _gradients(hand, hand_terms, position, num_gradients),
                "whole_network": _gradients(whole, whole_terms, position, num_whole),
            },
            repeats,
        )
        per_whole = num_gradients / num_whole
        wanted = 50 if name == "Transformer" else None
        checks += [
            Check(f"{name}: ours / hand-written", _common.ratio(times, "ours", "hand_written"), 1.15, at_least=False),
            Check(f"{name}: whole network / ours", _common.ratio(times, "whole_network", "ours") * per_whole, wanted),
            Check(f"{name}: one gradient", times["ours"]["median"] / num_gradients * 1e6, unit="us"),
        ]
        details[name] = {"times": times, "num_gradients": num_gradients, "num_whole": num_whole, "values": values,
                         "num_bayesian": partition.size}  # fmt: skip
    note = (
        "Gradients run in one compiled loop, as in a sampler, each at the place the last one led to. Ours carries the "
        "12 rows of padding and the weights of rows that a fit has; the hand-written function does not."
    )
    return Result("hoisting", checks, details, note)


def _transformer():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 100, (ROWS, 48)).astype(np.int32)
    module = nb.FlaxTransformer(vocab_size=100, max_length=48, target_dim=1, d_model=64, num_heads=4, num_layers=2)

    def features(module, params, x):
        _, state = module.apply({"params": params}, x, capture_intermediates=True)
        return nn.relu(state["intermediates"]["FinalDense1"]["__call__"][0])

    return module, x, rng.normal(size=(ROWS, 1)).astype(np.float32), ["FinalDense2"], features


def _convnet():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 28, 28, 1)).astype(np.float32)
    module = nb.FlaxConvNet(input_dim=2, conv_layers=[8, 16], fc_layers=[64], target_dim=1)

    def features(module, params, x):
        for i, channels in enumerate(module.conv_layers):
            x = nn.Conv(channels, (3, 3)).apply({"params": params[f"Conv{i}"]}, x)
            x = nn.max_pool(jnp.tanh(x), (2, 2), strides=(2, 2), padding="SAME")
        return x.reshape(len(x), -1)

    return module, x, rng.normal(size=(ROWS, 1)).astype(np.float32), ["Dense0", "Dense1"], features


def _density(module, x, y, layers):
    """Our log density as a fit builds it: rows padded to their bucket."""
    network = as_network(module)
    params, state = jax.jit(network.init)(jax.random.key(0), x[:1])
    params = jax.tree.map(np.asarray, params)
    info = network_info(network, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), params)
    partition = selectors.resolve(nb.layers(*layers), info)
    size = data.bucket_size(len(x))
    density = log_density.build(
        network, partition, params, state, data.pad_rows(x, size), data.pad_rows(y, size),
        data.row_weights(len(x), size), likelihood=Gaussian(),
        prior=priors.weight_prior(partition, params, 1.0, "map"), noise_prior=priors.default_noise_prior(np.ones(1)),
    )  # fmt: skip
    return density, params, partition


def _joint(outputs, theta, unconstrained, y, centre):
    """Gaussian likelihood, Gaussian prior about ``centre``, half-normal noise in its logarithm: plain JAX."""
    noise = jnp.exp(unconstrained)
    log_2pi = np.log(2 * np.pi)
    likelihood = -0.5 * jnp.sum(((y - outputs) / noise) ** 2) - y.size * (unconstrained + 0.5 * log_2pi)
    prior = -0.5 * jnp.sum((theta - centre) ** 2) - 0.5 * theta.size * log_2pi
    return likelihood + prior + 0.5 * np.log(2 / np.pi) - 0.5 * noise**2 + unconstrained


def _hand_written(partition, params) -> Callable[..., Any]:
    """The log density an expert would write for dense layers on features that were computed once."""
    shapes = [leaf.shape for leaf in partition.unravel(partition.split(params)).values()]
    splits = np.cumsum([int(np.prod(shape)) for shape in shapes])

    def log_joint(position, terms):
        features, y, centre = terms
        *parts, noise = jnp.split(position, splits)
        weights = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        h = features
        for i in range(0, len(weights), 2):  # bias before kernel, in the order of the position
            h = (jnp.tanh(h) if i else h) @ weights[i + 1] + weights[i]
        return _joint(h, position[:-1], noise[0], y, centre)

    return log_joint


def _whole_network(module, partition) -> Callable[..., Any]:
    """The log density that runs every layer every time."""

    def log_joint(position, terms):
        params, x, y, centre = terms
        outputs = module.apply({"params": partition.merge(position[:-1], params)}, x)
        return _joint(outputs, position[:-1], position[-1], y, centre)

    return log_joint


def _gradients(log_joint, terms, position, number: int):
    """A function that takes ``number`` gradients in one compiled loop."""

    @functools.partial(jax.jit, static_argnums=2)
    def run(position, terms, number):
        def body(_, position):
            # The barrier keeps the compiler from moving the frozen work out of the loop by itself.
            inputs, position = jax.lax.optimization_barrier((terms, position))
            return position + 1e-9 * jax.grad(log_joint)(position, inputs)

        return jax.lax.fori_loop(0, number, body, position)

    terms = jax.device_put(terms)
    return lambda: jax.block_until_ready(run(position, terms, number))


def prediction(repeats: int) -> Result:
    """10,000 rows from 1,000 draws, the last two layers of [64, 32, 16] Bayesian."""
    source, x = _source(num_rows=10_000, num_draws=1000)
    ours = functools.partial(predictive.regression_moments, source, x)
    peers = {
        "hand_written": functools.partial(_hand_written_moments, source, x),
        "loop": functools.partial(_loop_over_draws, source, x),
        "map": functools.partial(_map_over_draws, source, x),
        "vmap": functools.partial(_vmap_over_blocks, source, x),
    }
    mean, variance = ours()
    for peer in peers.values():
        np.testing.assert_allclose(peer()[0], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(peer()[1], variance, rtol=1e-2, atol=1e-5)
    times = _common.time_together({"ours": ours, **peers}, repeats)
    checks = [
        Check("against a loop over draws of the jitted network", _common.ratio(times, "loop", "ours"), 10),
        Check("  a program written by hand, the most to be had", _common.ratio(times, "loop", "hand_written")),
        Check("against one compiled map over draws", _common.ratio(times, "map", "ours"), 10),
        Check("  a program written by hand, the most to be had", _common.ratio(times, "map", "hand_written")),
        Check("ours / written by hand", _common.ratio(times, "ours", "hand_written"), at_least=False),
        Check("against vmap over blocks of draws", _common.ratio(times, "vmap", "ours")),
        Check("seconds", times["ours"]["median"], unit="s"),
    ]
    used = {name: _core_seconds(function, repeats) for name, function in {"ours": ours, **peers}.items()}
    checks += [
        Check("core-seconds", used["ours"], unit="s"),
        Check("  of the loop over draws, against ours", used["loop"] / used["ours"], 10),
        Check("  of the compiled map, against ours", used["map"] / used["ours"], 10),
        Check("  of the compiled map, against the program written by hand", used["map"] / used["hand_written"]),
    ]
    products, tanhs = _products_and_tanhs(source, len(x))
    note = (
        f"What no program can avoid is {products / 1e9:.3g} GFLOP of matrix products and {tanhs / 1e6:.3g} million "
        "tanh for the layers that every draw touches; the program written by hand does little else, for this network "
        "alone, on features computed once, with the rows last and one thread for each core. "
        "vmap already shares the layers that no draw touches, so that comparison is of block sizes and moments only."
    )
    return Result(
        "prediction", checks, {"times": times, "core_seconds": used, "matrix_flops": products, "tanhs": tanhs}, note
    )


def _source(num_rows: int, num_draws: int) -> tuple[Source, np.ndarray]:
    network = as_network(nb.FlaxMLP([64, 32, 16], 1))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, 8)).astype(np.float32)
    params, state = jax.jit(network.init)(jax.random.key(0), x[:1])
    params = jax.tree.map(np.asarray, params)
    info = network_info(network, jax.ShapeDtypeStruct((1, 8), np.float32), params)
    partition = selectors.resolve(nb.last(2), info)
    centre = np.asarray(partition.split(params))
    theta = (centre + 0.1 * rng.normal(size=(num_draws, partition.size))).astype(np.float32)
    return Source(network, partition, params, state, theta, np.ones((num_draws, 1), np.float32)), x


def _core_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least processor time of a call: what other processes on the machine hardly change."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)


def _products_and_tanhs(source: Source, num_rows: int) -> tuple[int, int]:
    """Floating point operations of the products, and tanhs, of the layers that every draw touches."""
    hidden, output = (source.params[name]["kernel"].shape for name in ("Dense2", "Dense3"))
    evaluations = num_rows * len(source.theta)
    return 2 * evaluations * (hidden[0] * hidden[1] + output[0] * output[1]), evaluations * hidden[1]


def _hand_written_moments(source: Source, x, block: int = 512):
    """The best program known for this network, its layers and sizes written out."""
    draws = source.partition.unravel(source.theta)
    hidden_bias, hidden, output_bias, output = (
        np.ascontiguousarray(leaf) if leaf.ndim == 2 else np.ascontiguousarray(leaf.transpose(0, 2, 1))
        for leaf in draws.values()
    )
    weights = jax.device_put((hidden, hidden_bias[:, :, None], output, output_bias[:, :, None]))
    first, second = source.params["Dense0"], source.params["Dense1"]

    def moments(first_row):
        mean, squares = _hand_written_block(first, second, weights, x[first_row : first_row + block])
        return np.asarray(mean), np.asarray(squares)

    parts = side_by_side(moments, ((first_row,) for first_row in range(0, len(x), block)))
    means, squares = zip(*parts, strict=True)
    return np.concatenate(means)[:, None], np.concatenate(squares)[:, None] / len(source.theta)


@jax.jit
def _hand_written_block(first, second, weights, x):
    features = jnp.tanh(jnp.tanh(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]).T

    def add(i, moments):
        mean, squares = moments
        hidden, hidden_bias, output, output_bias = (part[i] for part in weights)
        values = (output @ jnp.tanh(hidden @ features + hidden_bias) + output_bias)[0]
        change = values - mean
        mean = mean + change / (i + 1)
        return mean, squares + change * (values - mean)

    zeros = jnp.zeros(len(x))
    return jax.lax.fori_loop(0, len(weights[0]), add, (zeros, zeros))


def _loop_over_draws(source: Source, x):
    """The usual way: the whole network for every draw, from Python."""
    total = squares = 0.0
    params = jax.device_put(source.params)
    x = jax.device_put(x)
    for theta in source.theta:
        outputs = np.asarray(_apply_one(source.network, source.partition, params, theta, x), float)
        total, squares = total + outputs, squares + outputs**2
    mean = total / len(source.theta)
    return mean, squares / len(source.theta) - mean**2


@functools.partial(jax.jit, static_argnums=0)
def _apply_one(network, partition, params, theta, x):
    return network.apply(partition.merge(theta, params), {}, x)


def _map_over_draws(source: Source, x):
    """One compiled program that runs the network draw after draw, as sequential predictive functions do."""
    return jax.block_until_ready(_mapped(source.network, source.partition, source.params, source.theta, x))


@functools.partial(jax.jit, static_argnums=0)
def _mapped(network, partition, params, theta, x):
    def body(carry, theta):
        total, squares = carry
        # Without the barrier the compiler may move the frozen layers out of the loop by itself.
        inputs, _ = jax.lax.optimization_barrier((x, theta))
        outputs = network.apply(partition.merge(theta, params), {}, inputs)
        return (total + outputs, squares + outputs**2), None

    zero = jnp.zeros((len(x), 1))
    (total, squares), _ = jax.lax.scan(body, (zero, zero), theta)
    mean = total / len(theta)
    return mean, squares / len(theta) - mean**2


def _vmap_over_blocks(source: Source, x, block: int = 25):
    total = squares = 0.0
    for first in range(0, len(source.theta), block):
        theta = source.theta[first : first + block]
        outputs = np.asarray(_vmapped(source.network, source.partition, source.params, theta, x), float)
        total, squares = total + outputs.sum(0), squares + (outputs**2).sum(0)
    mean = total / len(source.theta)
    return mean, squares / len(source.theta) - mean**2


@functools.partial(jax.jit, static_argnums=0)
def _vmapped(network, partition, params, theta, x):
    return jax.vmap(lambda t: network.apply(partition.merge(t, params), {}, x))(theta)


CASES = {"hoisting": hoisting, "prediction": prediction}
