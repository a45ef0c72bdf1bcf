"""Names for the shapes of things that travel through the library."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
"""A JAX array (traced or concrete)."""

Params: TypeAlias = Any
"""A pytree of float arrays: every trainable scalar of a network."""

State: TypeAlias = Any
"""A pytree of arrays that a network needs but that are never random (running means, buffers)."""

Key: TypeAlias = jax.Array
"""A typed JAX random key (``jax.random.key``)."""

Masks: TypeAlias = Mapping[str, Any]
"""Leaf path -> boolean array of the leaf's shape: True where a scalar is selected."""
