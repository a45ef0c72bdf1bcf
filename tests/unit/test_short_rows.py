"""Token rows without most of their padding: the same outputs and derivatives, in fewer steps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import short_rows
from neurobayes.models import extent
from neurobayes.networks.adapters import as_network
from neurobayes.networks.base import InputSpec

WIDTH, PAD = 24, 0


def transformer(**options):
    options = {"d_model": 8, "num_heads": 2, "num_layers": 1, "mlp_dim": 12, "pad_token": PAD} | options
    return as_network(nb.FlaxTransformer(vocab_size=9, max_length=WIDTH, target_dim=2, **options))


def sequences(lengths, seed=0):
    """Random tokens of the given lengths, filled up to the common width."""
    x = np.random.default_rng(seed).integers(1, 9, (len(lengths), WIDTH)).astype(np.int32)
    x[np.arange(WIDTH) >= np.asarray(lengths)[:, None]] = PAD
    return x


@pytest.fixture(scope="module")
def rows():
    """Sixty-four rows, most of them short."""
    generator = np.random.default_rng(1)
    return sequences(np.where(generator.random(64) < 0.1, 20, generator.integers(2, 8, 64)))


@pytest.fixture(scope="module")
def short(rows):
    found = short_rows.with_short_rows(transformer(), rows, 64)
    assert isinstance(found, short_rows.ShortRows)
    return found


@pytest.fixture(scope="module")
def short_apply(short):
    return jax.jit(lambda params, state, x: short.apply(params, state, x))


@pytest.fixture(scope="module")
def weights(short, rows):
    return short.init(jax.random.key(0), rows[:1])


def test_outputs_are_those_of_the_network_in_the_order_of_the_rows(short, short_apply, weights, rows):
    assert bool(short.fits(rows))
    found = short_apply(*weights, rows)
    np.testing.assert_allclose(found, short.network.apply(*weights, rows), atol=2e-6)


@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_rows_that_are_all_long_go_at_full_width(short, short_apply, weights, num_rows):
    long = sequences([WIDTH] * num_rows, seed=2)
    assert bool(short.fits(long)) == (num_rows == 1)
    np.testing.assert_allclose(short_apply(*weights, long), short.network.apply(*weights, long), atol=2e-6)
    if num_rows == 64:  # the control: without the check their ends would be cut off
        cut = short_rows._InBlocks(**vars(short)).apply(*weights, long)
        assert np.abs(cut - short.network.apply(*weights, long)).max() > 1e-3


def test_rows_of_padding_alone_and_padding_within_a_row(short, short_apply, weights, rows):
    x = rows.copy()
    x[0] = PAD
    x[1, :5] = PAD, 3, PAD, PAD, 4
    np.testing.assert_allclose(short_apply(*weights, x), short.network.apply(*weights, x), atol=2e-6)


def test_derivatives_within_the_choice_are_those_of_the_network(short, weights, rows):
    params, state = weights

    def loss(network):
        return lambda params: jnp.sum(jnp.sin(network.apply(params, state, rows)))

    found = jax.jit(short_rows.for_batch(short, rows, lambda network: jax.grad(loss(network))))(params)
    expected = jax.jit(jax.grad(loss(short.network)))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert short_rows.for_batch(short.network, rows, loss)(params) == loss(short.network)(params)


def test_dropout_differs_between_blocks_and_is_seeded(rows):
    network = short_rows.with_short_rows(transformer(dropout_rate=0.5), rows, 64)
    params, state = network.init(jax.random.key(0), rows[:1])
    apply = jax.jit(lambda key: network.apply(params, state, rows, key=key))
    one, again, other = (apply(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    assert network.has_dropout


def test_it_says_what_the_network_says(short, rows):
    assert short.input_spec == short.network.input_spec
    assert short.layers(rows[:1]) == short.network.layers(rows[:1])
    assert short.pretrained is short.network.pretrained is None
    assert hash(short) == hash(dataclasses.replace(short)) and short == dataclasses.replace(short)


class TestChoice:
    def test_far_fewer_tokens_and_room_for_every_row(self, short, rows):
        blocks = short.blocks(64)
        assert blocks[0][0] == 0 and blocks[-1][1] == 64
        assert all(before[1] == after[0] for before, after in itertools.pairwise(blocks))
        assert list(short.widths) == sorted(set(short.widths), reverse=True) and short.widths[0] == WIDTH
        assert sum((end - begin) * width for begin, end, width in blocks) < 0.5 * rows.size

    def test_random_batches_hardly_ever_lack_room(self, rows):
        many = sequences(np.random.default_rng(3).geometric(0.2, 4000).clip(1, WIDTH))
        network = short_rows.with_short_rows(transformer(), many, 64)
        fits = jax.jit(network.fits)
        generator = np.random.default_rng(4)
        failed = sum(not bool(fits(generator.choice(many, 64, replace=False))) for _ in range(300))
        # At most one in a hundred for each of three boundaries.
        assert failed < 9 + 3 * 3

    def test_more_rows_hardly_ever_ask_for_another_program(self):
        many = sequences(np.random.default_rng(5).geometric(0.2, 200).clip(1, WIDTH))
        network = transformer()
        plans = [short_rows.with_short_rows(network, many[:n], 64) for n in range(50, 200)]
        assert isinstance(plans[-1], short_rows.ShortRows)
        assert sum(a != b for a, b in itertools.pairwise(plans)) < 15

    @pytest.mark.parametrize(
        ("lengths", "options"),
        [([WIDTH] * 16, {}), ([WIDTH - 4] * 16, {}), ([5] * 16, {"pad_token": None})],
        ids=["no padding", "little padding", "no padding token"],
    )
    def test_a_network_that_would_gain_little_stays_as_it_is(self, lengths, options):
        network = transformer(**options)
        assert short_rows.with_short_rows(network, sequences(lengths), 16) is network

    def test_rows_that_are_all_short_are_cut(self):
        network = short_rows.with_short_rows(transformer(), sequences([5] * 16), 16)
        assert network.widths == (6,) and network.shares == (1.0,)

    def test_on_an_accelerator_nothing_is_left_out(self, rows, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        network = transformer()
        assert short_rows.with_short_rows(network, rows, 64) is network


def test_a_fit_is_that_of_whole_rows_with_less_work(rows, monkeypatch):
    y = np.sum(rows == 3, axis=1) - np.mean(rows == 5, axis=1)
    options = {"sgd_epochs": 12, "map_sigma": 1.0, "seed": 0}
    net = nb.FlaxTransformer(9, WIDTH, 1, d_model=8, num_heads=2, num_layers=1, mlp_dim=12, pad_token=PAD)

    def predicted():
        return nb.PartialBNN(net, num_backbones=4).fit(rows, y, **options).predict(rows[:10])

    monkeypatch.setattr(extent, "MUCH_WORK", np.inf)
    mean, var = predicted()
    monkeypatch.setattr(extent, "MUCH_WORK", 0.0)
    used = []
    monkeypatch.setattr(extent, "with_short_rows", lambda *a: used.append(short_rows.with_short_rows(*a)) or used[-1])
    narrow_mean, narrow_var = predicted()
    assert used and all(isinstance(network, short_rows.ShortRows) for network in used)
    np.testing.assert_allclose(narrow_mean, mean, atol=0.01 * np.std(y))
    np.testing.assert_allclose(narrow_var, var, rtol=0.05)


def test_own_networks_declare_their_padding(rows):
    spec = InputSpec(tokens=True, vocab_size=9, pad_token=PAD)

    def mean_of_tokens(params, x):
        return jnp.sum(jnp.where(x == PAD, 0.0, params["value"][x]), axis=1) / jnp.maximum(jnp.sum(x != PAD, axis=1), 1)

    mean_of_tokens.input_spec = spec
    own = short_rows.with_short_rows(as_network((mean_of_tokens, {"value": jnp.arange(9.0)})), rows, 64)
    assert isinstance(own, short_rows.ShortRows)
    weights = own.init(jax.random.key(0), rows[:1])
    np.testing.assert_allclose(own.apply(*weights, rows), own.network.apply(*weights, rows), rtol=1e-6)
    assert nb.FlaxTransformer(9, WIDTH, 1, pad_token=PAD).input_spec.pad_token == spec.pad_token == PAD
    assert nb.FlaxTransformer(9, WIDTH, 1).input_spec.pad_token is None
