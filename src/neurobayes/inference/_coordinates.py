"""Affine coordinates in which a posterior is nearly a standard normal, for engines that approximate it."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from .._typing import Array, Key
from ..log_density import Form, Terms
from .curvature import inverse_mass

MAX_ROTATED = 100
"""Largest position whose coordinates are rotated as well as scaled."""


class Coordinates(NamedTuple):
    """position = centre + scale @ latent; ``scale`` is ``(size,)``, a diagonal, or triangular ``(size, size)``."""

    centre: Any
    scale: Any

    def position(self, latent: Array) -> Array:
        """The position of one latent vector ``(size,)``, or those of many ``(draws, size)``."""
        return self.centre + (self.scale * latent if self.scale.ndim == 1 else latent @ self.scale.T)

    @property
    def log_volume(self) -> Array:
        """Log determinant of the scale."""
        return jnp.sum(jnp.log(self.scale if self.scale.ndim == 1 else jnp.diagonal(self.scale)))


def by_curvature(form: Form, key: Key, centre: Any, terms: Terms, *, rotate: bool = True) -> Coordinates:
    """Coordinates centred at a position and scaled by the curvature there; rotated where small enough."""
    rotate = rotate and len(centre) <= MAX_ROTATED
    covariance = inverse_mass(form, key, centre, terms, rotate)
    return Coordinates(centre, jnp.linalg.cholesky(covariance) if rotate else jnp.sqrt(covariance))
