"""Engines use a random key once."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from neurobayes.inference import _microcanonical, sgmcmc


def words(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_scales_and_curvature_come_from_different_probes(monkeypatch):
    used = []
    monkeypatch.setattr(sgmcmc, "inverse_mass", lambda form, key, *_: used.append(words(key)) or jnp.ones(2))
    monkeypatch.setattr(sgmcmc, "simulated_scores", lambda form, key, *_: used.append(words(key)) or jnp.eye(2))
    sgmcmc._scale_and_curvature.__wrapped__(None, jax.random.key(0), jnp.zeros(2), None)
    assert len(set(used)) == 2


def test_the_step_size_is_checked_with_draws_the_tuner_has_not_seen(monkeypatch):
    key, used = jax.random.key(0), []

    def tuner(*, rng_key, state, params, **_):
        used.append(rng_key)
        return state, (1.0, 0.1, jnp.ones(2)), 0

    adaptation = types.SimpleNamespace(MCLMCAdaptationState=lambda *values: values)
    blackjax = types.SimpleNamespace(
        adaptation=types.SimpleNamespace(mclmc_adaptation=adaptation), mclmc_find_L_and_step_size=tuner
    )
    monkeypatch.setattr(_microcanonical._blackjax, "load", lambda engine: blackjax)
    monkeypatch.setattr(_microcanonical, "transition_of", lambda *_: None)
    monkeypatch.setattr(_microcanonical, "_calibrated", lambda kernel, key, state, terms: used.append(key) or state)
    kernel = _microcanonical.Kernel(None, False, 10, 1, 1e-3, 0.9, 1, True)  # type: ignore[arg-type]
    start = _microcanonical.ChainState(None, key, jnp.ones(2), jnp.float32(1), jnp.float32(1), jnp.ones(2), 0, False)
    _microcanonical._tune(kernel, key, start, None)
    # BlackJAX splits its own key on.
    tuning, check = used
    known = [words(each) for each in (key, tuning, *jax.random.split(tuning, 4), *jax.random.split(key, 4)[:1])]
    assert words(check) not in known and words(tuning) != words(key)
