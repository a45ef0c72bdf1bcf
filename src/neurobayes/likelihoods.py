"""How targets are distributed given the network's outputs.

A likelihood is a frozen, hashable value: compiled programs are cached by it.
Noise is a standard deviation everywhere, in the units the targets are in when
the likelihood sees them (standardised by default), never a variance.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, Key
from .errors import OptionError

LOG_2PI = math.log(2.0 * math.pi)

LOG_STD_BOUNDS = (-15.0, 15.0)
"""Range of the logarithm of a noise standard deviation that a network gives, in the targets' working units. Beyond it
the bound holds, so that neither a variance nor its inverse leaves the range of float32; for standardised targets both
ends are far from any noise there is."""


def split_outputs(outputs: Any) -> tuple[Any, Any]:
    """``(means, log noise std)``, each ``(..., d)``, of a network whose ``2 d`` outputs hold both, in this order.

    The only place that says so; training, sampling and prediction all come here. For arrays of NumPy and of JAX.
    """
    num_targets = outputs.shape[-1] // 2
    return outputs[..., :num_targets], outputs[..., num_targets:].clip(*LOG_STD_BOUNDS)


class Likelihood(abc.ABC):
    """The distribution of one row's target given the network's output for that row."""

    is_regression: bool = True
    outputs_per_target: ClassVar[int] = 1
    """Outputs a network has for each number that is predicted."""

    def means(self, outputs: Any) -> Any:
        """The predicted targets among the network's outputs, ``(..., d)``."""
        return outputs

    @abc.abstractmethod
    def log_prob(self, outputs: Array, y: Array, noise_std: Array) -> Array:
        """Log density of each row's target in nats, shape ``(n,)``, summed over its outputs."""

    @abc.abstractmethod
    def sample(self, key: Key, outputs: Array, noise_std: Array) -> Array:
        """One target for each row, drawn from the likelihood."""

    @abc.abstractmethod
    def num_noise(self, num_outputs: int) -> int:
        """How many noise standard deviations are unknown for a network with ``num_outputs`` outputs."""


@dataclasses.dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent Gaussian noise, one standard deviation for each output, the same for all rows."""

    def log_prob(self, outputs: Array, y: Array, noise_std: Array) -> Array:
        scaled = (y - outputs) / noise_std
        return -jnp.sum(0.5 * scaled**2 + jnp.log(noise_std) + 0.5 * LOG_2PI, axis=-1)

    def sample(self, key: Key, outputs: Array, noise_std: Array) -> Array:
        return outputs + noise_std * jax.random.normal(key, outputs.shape, outputs.dtype)

    def num_noise(self, num_outputs: int) -> int:
        return num_outputs


@dataclasses.dataclass(frozen=True)
class HeteroskedasticGaussian(Likelihood):
    """Independent Gaussian noise whose size the network gives for each row.

    Of ``2 d`` outputs the first ``d`` are the means of the targets, and the last ``d`` the *logarithms* of their noise
    *standard deviations*, all in the targets' working units. No noise is left unknown besides the network's weights.
    """

    outputs_per_target = 2

    def means(self, outputs: Any) -> Any:
        return split_outputs(outputs)[0]

    def log_prob(self, outputs: Array, y: Array, noise_std: Array) -> Array:
        mean, log_std = split_outputs(outputs)
        scaled = (y - mean) * jnp.exp(-log_std)
        return -jnp.sum(0.5 * scaled**2 + log_std + 0.5 * LOG_2PI, axis=-1)

    def sample(self, key: Key, outputs: Array, noise_std: Array) -> Array:
        mean, log_std = split_outputs(outputs)
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)

    def num_noise(self, num_outputs: int) -> int:
        return 0

    def fisher_root(self, outputs: Array) -> Array:
        """Square root of the Fisher information about each output, which is diagonal, shaped like ``outputs``.

        It is ``1 / s**2`` for a mean and 2 for the logarithm of ``s``; 0 where a bound holds instead of the latter.
        """
        _, log_std = split_outputs(outputs)
        inside = (log_std > LOG_STD_BOUNDS[0]) & (log_std < LOG_STD_BOUNDS[1])
        return jnp.concatenate([jnp.exp(-log_std), jnp.where(inside, math.sqrt(2.0), 0.0)], axis=-1)


def mean_noise_var(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Mean noise variance where the logarithm of the noise std is normal with this mean and variance."""
    return np.exp(2.0 * np.clip(mean + var, *LOG_STD_BOUNDS))


@dataclasses.dataclass(frozen=True)
class Categorical(Likelihood):
    """One class out of ``num_outputs``; the outputs are logits and ``y`` holds integer labels ``(n,)``."""

    is_regression = False

    def log_prob(self, outputs: Array, y: Array, noise_std: Array) -> Array:
        log_probabilities = jax.nn.log_softmax(outputs, axis=-1)
        return jnp.take_along_axis(log_probabilities, y[:, None], axis=-1)[:, 0]

    def sample(self, key: Key, outputs: Array, noise_std: Array) -> Array:
        return jax.random.categorical(key, outputs, axis=-1).astype(jnp.int32)

    def num_noise(self, num_outputs: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class RowLoss(Likelihood):
    """A user's own loss, read as a negative log density: ``loss(outputs, y)`` gives one number per row."""

    loss: Callable[[Array, Array], Array]

    def log_prob(self, outputs: Array, y: Array, noise_std: Array) -> Array:
        values = self.loss(outputs, y)
        if jnp.shape(values) != outputs.shape[:1]:  # a mean would hide the row weights, a column would broadcast
            raise OptionError(
                f"loss(outputs, y) must give one number per row, shape (n,); outputs {outputs.shape} give "
                f"{jnp.shape(values)}. Reduce over the outputs only: jnp.sum(..., axis=-1)."
            )
        return -values

    def sample(self, key: Key, outputs: Array, noise_std: Array) -> Array:
        raise OptionError("a custom loss says how likely targets are, but not how to draw them.")

    def num_noise(self, num_outputs: int) -> int:
        return 0
