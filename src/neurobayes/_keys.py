"""Random keys derived from a key."""

import jax
import numpy as np

from ._compiling import QuickJit
from ._typing import Array, Key

_AT_ONCE = 256


def children(key: Key, number: int) -> list[Key]:
    """``number`` keys out of one, those of ``jax.random.split``, by one compiled program for all usual numbers."""
    words = np.asarray(_split(max(_AT_ONCE, number), key))[:number]
    return [jax.random.wrap_key_data(each, impl=jax.random.key_impl(key)) for each in words]


@QuickJit
def _split(number: int, key: Key) -> Array:
    return jax.random.key_data(jax.random.split(key, number))


def as_seed(key: Key) -> int:
    """A number below ``2**32`` for a generator on the host."""
    words = np.asarray(jax.random.key_data(children(key, 1)[0]), np.uint32)
    return int(np.bitwise_xor.reduce(words.ravel()))
