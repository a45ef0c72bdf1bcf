"""Gradient evaluations per second of our NUTS and of bare NumPyro and BlackJAX on the identical log density."""

import time
from typing import Any

import jax
import numpy as np

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check
from neurobayes import data, log_density, priors, selectors
from neurobayes.inference.base import RunControl
from neurobayes.inference.nuts import NUTS
from neurobayes.likelihoods import Gaussian
from neurobayes.models.base import network_info
from neurobayes.networks import as_network

WARMUP, DRAWS = 300, 500


def gradient_rates(X, y, weights, repeats: int, details: dict[str, Any]) -> list[Check]:
    """Checks of ours against each bare sampler; only the sampling phase counts, compilation never."""
    density, start = _density(X, y, weights)
    samplers = {"ours": _ours(density, start), "numpyro": _numpyro(density, start)}
    try:
        samplers["blackjax"] = _blackjax(density, start)
    except ImportError:
        details["bare"] = "BlackJAX is not installed and is left out"
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat in range(repeats + 1):
        for name, sample in samplers.items():
            steps, seconds = sample(repeat)
            if repeat:
                rates[name].append(steps / seconds)
    details["gradients_per_second"] = rates
    checks = [Check("gradients per second, ours", _common.median(rates["ours"]), unit="/s")]
    for name in samplers:
        if name != "ours":
            relative = _common.median(np.asarray(rates["ours"]) / np.asarray(rates[name]))
            checks.append(Check(f"gradients per second, ours / bare {name}", relative, 0.95))
    return checks


def _density(X, y, weights):
    """The last layer's density as a fit builds it, and the trained weights' position."""
    network = as_network(nb.FlaxMLP([64, 32, 16], 1))
    params, scaling = jax.tree.map(np.asarray, dict(weights.get_params())), weights.scaling
    x, targets = scaling.inputs(X), scaling.targets(y)
    info = network_info(network, jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype), params)
    partition = selectors.resolve(nb.last(1), info)
    size = data.bucket_size(len(x))
    density = log_density.build(
        network, partition, params, {}, data.pad_rows(x, size), data.pad_rows(targets, size),
        data.row_weights(len(x), size), likelihood=Gaussian(),
        prior=priors.weight_prior(partition, params, 1.0, "map"), noise_prior=priors.default_noise_prior(np.ones(1)),
    )  # fmt: skip
    return density, np.concatenate([np.asarray(partition.split(params)), [np.log(0.5)]]).astype(np.float32)


def _ours(density, start):
    engine = NUTS(dense_mass=False)

    def sample(seed: int) -> tuple[float, float]:
        times: dict[str, float] = {}

        def note(stage: str, done: int, total: int) -> None:
            times[stage] = time.perf_counter()

        posterior = engine.run(
            jax.random.key(seed), density, start, num_warmup=WARMUP, num_samples=DRAWS,
            control=RunControl(on_progress=note),
        )  # fmt: skip
        return float(posterior.stats["num_steps"].sum()), times["sampling"] - times["warm-up"]

    return sample


def _numpyro(density, start):
    from numpyro.infer import NUTS as BareNUTS

    form, terms = density.form, density.terms
    kernel = BareNUTS(potential_fn=lambda position: -form(position, terms), dense_mass=False)
    # The first state sets up the kernel's closures. MCMC itself would compile again in every run.
    initial = kernel.init(jax.random.key(0), WARMUP, init_params=start, model_args=(), model_kwargs={})

    @jax.jit
    def warm_up(state, key):
        state = state._replace(rng_key=key)
        return jax.lax.fori_loop(0, WARMUP, lambda _, state: kernel.sample(state, (), {}), state)

    @jax.jit
    def draw(state):
        def body(state, _):
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps)

        return jax.lax.scan(body, state, None, length=DRAWS)

    def sample(seed: int) -> tuple[float, float]:
        state = jax.block_until_ready(warm_up(initial, jax.random.key(seed)))
        started = time.perf_counter()
        _, (_, steps) = jax.block_until_ready(draw(state))
        return float(np.asarray(steps).sum()), time.perf_counter() - started

    return sample


def _blackjax(density, start):
    import blackjax

    form, terms = density.form, density.terms

    def logdensity(position):
        return form(position, terms)

    @jax.jit
    def warm_up(key):
        (state, parameters), _ = blackjax.window_adaptation(blackjax.nuts, logdensity).run(key, start, WARMUP)
        return state, parameters

    @jax.jit
    def draw(key, state, parameters):
        step = blackjax.nuts(logdensity, **parameters).step

        def body(state, key):
            state, info = step(key, state)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(body, state, jax.random.split(key, DRAWS))

    def sample(seed: int) -> tuple[float, float]:
        state, parameters = jax.block_until_ready(warm_up(jax.random.key(seed)))
        started = time.perf_counter()
        _, (_, steps) = jax.block_until_ready(draw(jax.random.key(seed + 1), state, parameters))
        return float(np.asarray(steps).sum()), time.perf_counter() - started

    return sample
