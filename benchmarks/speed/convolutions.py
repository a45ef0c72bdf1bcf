"""Training of a ConvNet: ours against the same steps in a plain compiled loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result

IMAGES, SIDE, STEPS, RATE = 128, 28, 3, 1e-3


def convolutions(repeats: int) -> Result:
    """Full-batch steps on 128 images of 28 x 28 through two convolutions, by our loop and by a bare ``lax.scan``."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(IMAGES, SIDE, SIDE, 1)).astype(np.float32)
    y = rng.normal(size=IMAGES).astype(np.float32)
    times = _common.time_together({"ours": lambda: _train(X, y), "scan": _bare_scan(X, y)}, repeats)
    checks = [
        Check("a bare scan / ours", _common.ratio(times, "scan", "ours"), 4.0),
        Check("seconds a step", times["ours"]["median"] / STEPS, unit="s"),
    ]
    note = "XLA's convolutions are fast on a CPU in one order of their axes only, which it does not see to in a loop."
    return Result("convolutions", checks, {"times": times}, note)


def _network() -> nb.FlaxConvNet:
    return nb.FlaxConvNet(2, conv_layers=[16, 32], fc_layers=[64], target_dim=1)


def _train(X, y) -> None:
    model = nb.DeterministicNN(_network(), input_shape=X.shape[1:], learning_rate=RATE)
    model.train(X, y, epochs=STEPS, batch_size=IMAGES, track_statistics=False, progress_bar=False)


def _bare_scan(X, y):
    network, optimizer = _network(), optax.adam(RATE)
    params = jax.jit(network.init)(jax.random.key(0), X[:1])["params"]

    def loss_of(params, x, y):
        return 0.5 * jnp.mean((network.apply({"params": params}, x) - y[:, None]) ** 2)

    @jax.jit
    def run(params, state, x, y):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_of)(params, x, y), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=STEPS)[0]

    return lambda: jax.block_until_ready(run(params, optimizer.init(params), X, y))


CASES = {"convolutions": convolutions}
