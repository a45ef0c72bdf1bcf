"""SciPy's bounded L-BFGS, imported when it is first needed: the import takes a tenth of a second."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def least(
    function: Callable[[np.ndarray], Any],
    start: np.ndarray | Sequence[float],
    bounds: Sequence[tuple[float, float]],
    *,
    gradient: bool = True,
) -> Any:
    """SciPy's result of minimising ``function``, which returns its value and, with ``gradient``, that of its slope."""
    import scipy.optimize

    return scipy.optimize.minimize(function, start, jac=gradient, method="L-BFGS-B", bounds=bounds)
