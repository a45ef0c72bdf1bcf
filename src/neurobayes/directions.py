"""Directions of weight space worth sampling, found from data: where training wanders, or where the loss is curved.

Izmailov, Maddox, Kirichenko, Garipov, Vetrov & Wilson (2020), "Subspace inference for Bayesian deep learning",
UAI 2019, PMLR 115, arXiv:1907.07504.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from . import _checks, data, training, trees
from ._typing import Key, Params, State
from .errors import OptionError, SelectionError, TrainingError
from .likelihoods import Likelihood
from .network_info import NetworkInfo
from .networks.base import Network
from .scores import curvature_factor
from .selector_rules import LeafMasks
from .selectors import Selector
from .subspaces import Subspace
from .training import Rows

EPOCHS = 100
BATCH_ROWS = 256
LEARNING_RATE = 0.005
MIN_SNAPSHOTS = 20
BATCHES_PER_EPOCH = 4
ROWS_PER_CHUNK = 256
LANCZOS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, repr=False)
class SubspaceSelector(Selector):
    """The choice of a plane through weight space; made by ``subspace``."""

    rank: int
    source: str
    epochs: int
    num_snapshots: int
    learning_rate: float

    stands_alone = True

    def masks(self, info: NetworkInfo) -> LeafMasks:
        raise SelectionError(
            f"{self!r} chooses directions and no single weights, and finds them in the data: "
            "pass it alone, PartialBNN(network, bayesian=nb.subspace(5)), and call fit."
        )

    def __repr__(self) -> str:
        return f"subspace({self.rank}, from_={self.source!r})"


def subspace(
    rank: int,
    from_: str = "swa",
    *,
    epochs: int | None = None,
    num_snapshots: int | None = None,
    learning_rate: float | None = None,
) -> Selector:
    """All weights move, but along ``rank`` directions only, through their trained values.

    The random vector is the coordinates in these directions: ``weights = trained +
    sum_k theta_k b_k`` with orthonormal ``b_k``. Its prior is that of the weights,
    ``N(trained, priors_sigma**2)`` or ``N(0, priors_sigma**2)``, restricted to the plane:
    ``theta ~ N(0, priors_sigma**2)`` around the trained weights, in the units of the
    weights. To be used alone, as ``bayesian=``; nothing can be hoisted, because every
    layer depends on ``theta``.

    Parameters
    ----------
    rank : number of directions, below the number of weights.
    from_ : ``"swa"``: the leading principal components of weights collected while training goes on
        at a constant step size (Izmailov et al. 2020); ``"hessian"``: the leading eigenvectors of the
        generalised Gauss-Newton matrix at the trained weights, the directions that the data fix best.
    epochs : length of the extra stage of ``"swa"``, 100 by default.
    num_snapshots : weights kept from it, evenly spaced; the larger of 20 and ``2 * rank`` by default.
        They take that many times the memory of the network.
    learning_rate : its step size (Adam, four batches an epoch or more), 0.005 by default.

    Raises
    ------
    SelectionError
        ``rank`` is below 1, or the selector is combined with another one.
    OptionError
        An option is out of range, or belongs to the other ``from_``.

    References
    ----------
    Izmailov et al. (2020), "Subspace inference for Bayesian deep learning", arXiv:1907.07504.

    Examples
    --------
    >>> subspace(5)
    subspace(5, from_='swa')
    """
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise SelectionError(f"subspace(rank): rank must be a whole number, 1 or more; got {rank!r}.")
    _checks.check_one_of("from_", from_, ("swa", "hessian"))
    stage = {"epochs": epochs, "num_snapshots": num_snapshots, "learning_rate": learning_rate}
    given = [name for name, value in stage.items() if value is not None]
    if from_ == "hessian" and given:
        raise OptionError(f"from_='hessian' trains no further and takes no {' or '.join(given)}; from_='swa' does.")
    count = max(MIN_SNAPSHOTS, 2 * rank) if num_snapshots is None else num_snapshots
    _checks.check_positive_int("num_snapshots", count, minimum=rank + 1)
    epochs = max(EPOCHS, count) if epochs is None else _checks.check_positive_int("epochs", epochs, minimum=count)
    if epochs // count > training.EPOCHS_PER_CALL:
        raise OptionError(
            f"epochs={epochs} with num_snapshots={count} leaves more than {training.EPOCHS_PER_CALL} epochs between "
            "snapshots; take more snapshots."
        )
    rate = LEARNING_RATE if learning_rate is None else _checks.check_positive("learning_rate", learning_rate)
    return SubspaceSelector(int(rank), from_, int(epochs), int(count), float(rate))


def find(
    choice: SubspaceSelector,
    key: Key,
    network: Network,
    params: Params,
    state: State,
    rows: Rows,
    likelihood: Likelihood,
    noise_std: Any,
    prior_precision: float,
) -> Subspace:
    """The plane a selector stands for, through ``params``.

    Parameters
    ----------
    rows : training rows in working units, padded.
    noise_std : (d,) noise the likelihood assumes in the same units.
    prior_precision : of all weights in the extra stage of ``"swa"``; zero for none.

    Raises
    ------
    TrainingError
        The extra stage diverged.
    OptionError
        The snapshots span fewer directions than asked for.
    """
    if choice.source == "hessian":
        directions, _ = hessian_directions(key, network, params, state, rows, likelihood, noise_std, choice.rank)
    else:
        snapshots = collect_snapshots(choice, key, network, params, state, rows, likelihood, noise_std, prior_precision)
        directions = principal_directions(snapshots, choice.rank)
    return Subspace.of(directions, params)


def collect_snapshots(
    choice: SubspaceSelector, key: Key, network: Network, params: Params, state: State, rows: Rows,
    likelihood: Likelihood, noise_std: Any, prior_precision: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Weights along a run of constant step size from ``params`` on, leaf path -> ``(snapshots, *leaf_shape)``."""
    num_rows = int(np.asarray(rows.real).sum())
    batch = min(BATCH_ROWS, -(-num_rows // BATCHES_PER_EPOCH))
    program = training.Program(network, likelihood, batch_size=batch)
    settings = training.Settings(
        row_weights=np.asarray(rows.real, np.float32),
        prior_precision=np.float32(prior_precision),
        noise_std=np.asarray(noise_std, np.float32),
    )
    steps = training.num_steps_per_epoch(program, len(rows.real))
    rates = np.full((training.EPOCHS_PER_CALL, steps), choice.learning_rate, np.float32)
    progress, _ = training.initialise(program, key, rows.x, params)
    stacked = _trajectory(
        program, progress, state, rows, settings, rates, np.int32(choice.epochs // choice.num_snapshots),
        choice.num_snapshots,
    )  # fmt: skip
    snapshots = {path: np.asarray(leaf) for path, leaf in trees.flatten(stacked).items()}
    if not all(np.isfinite(leaf).all() for leaf in snapshots.values()):
        raise TrainingError(
            f"the extra training stage of {choice!r} became non-finite. Lower its learning_rate={choice.learning_rate}."
        )
    return snapshots


@functools.partial(jax.jit, static_argnums=(0, 7))
def _trajectory(program, progress, state, rows, settings, rates, epochs_each, num_snapshots):
    collect = np.zeros(training.EPOCHS_PER_CALL, np.float32)

    def advance(progress, _):
        progress, _, _ = training.run_epochs(
            program, progress, state, rows, None, settings, rates, jnp.asarray(collect), epochs_each
        )
        return progress, progress.params

    return jax.lax.scan(advance, progress, length=num_snapshots)[1]


def principal_directions(snapshots: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The leading principal components of snapshots around their mean, leaf path -> ``(rank, *leaf_shape)``.

    Raises
    ------
    OptionError
        The snapshots vary in fewer than ``rank`` directions.
    """
    deviations = {path: leaf - leaf.mean(axis=0, dtype=float).astype(leaf.dtype) for path, leaf in snapshots.items()}
    flat = [leaf.reshape(len(leaf), -1).astype(float) for leaf in deviations.values()]
    gram = np.sum([part @ part.T for part in flat], axis=0)
    values, vectors = np.linalg.eigh(gram)  # ascending
    leading = vectors[:, ::-1][:, :rank]
    found = int(np.sum(values > 1e-9 * values[-1])) if values[-1] > 0 else 0
    if found < rank:
        raise OptionError(
            f"the weights moved in only {found} directions while {rank} are asked for. "
            "Give a smaller rank, or more epochs or snapshots."
        )
    lengths = np.sqrt(values[::-1][:rank])
    return {path: np.tensordot(leading / lengths, leaf, axes=(0, 0)) for path, leaf in deviations.items()}


def hessian_directions(
    key: Key, network: Network, params: Params, state: State, rows: Rows, likelihood: Likelihood, noise_std: Any,
    rank: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip
    """The leading eigenvectors of the Gauss-Newton matrix at ``params``, and their eigenvalues in falling order.

    Lanczos iterations with products ``sum_i J_i' H_i J_i v``; the matrix itself is never formed.

    Returns
    -------
    Leaf path -> ``(rank, *leaf_shape)``, and ``(rank,)``, in nats per squared unit of the weights.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    flat, unravel = ravel_pytree(params)
    size = -(-len(rows.real) // ROWS_PER_CHUNK) * ROWS_PER_CHUNK if len(rows.real) > ROWS_PER_CHUNK else len(rows.real)
    chunk = min(ROWS_PER_CHUNK, size)
    x, y = (data.pad_rows(np.asarray(part), size).reshape(-1, chunk, *part.shape[1:]) for part in (rows.x, rows.y))
    real = np.pad(np.asarray(rows.real, np.float32), (0, size - len(rows.real))).reshape(-1, chunk)
    chunks, noise = jax.device_put((Rows(x, y, real), np.asarray(noise_std, np.float32)))

    def product(vector):
        vector = np.asarray(vector, np.float32).ravel()
        return np.asarray(_ggn_product(network, likelihood, params, state, chunks, noise, vector))

    start = np.asarray(jax.random.normal(key, flat.shape))
    operator = LinearOperator((flat.size, flat.size), matvec=product, dtype=np.float32)  # pyright: ignore
    values, vectors = eigsh(operator, k=rank, which="LA", v0=start, tol=LANCZOS_TOLERANCE)  # pyright: ignore
    order = np.argsort(-values)
    trees_of = [trees.flatten(unravel(jnp.asarray(vectors[:, k], jnp.float32))) for k in order]
    return {path: np.stack([np.asarray(tree[path]) for tree in trees_of]) for path in trees_of[0]}, values[order]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ggn_product(network, likelihood, params, state, chunks: Rows, noise_std, vector):
    _, unravel = ravel_pytree(params)
    tangent = unravel(vector)

    def add(total, rows):
        outputs, moved = jax.jvp(lambda p: network.apply(p, state, rows.x), (params,), (tangent,))
        factors = jax.vmap(lambda f, y: curvature_factor(likelihood, f, y, noise_std))(outputs, rows.y)
        pulled = jnp.einsum("nok,npk,np->no", factors, factors, moved) * rows.real[:, None]
        _, pull_back = jax.vjp(lambda p: network.apply(p, state, rows.x), params)
        return total + ravel_pytree(pull_back(pulled)[0])[0], None

    return jax.lax.scan(add, jnp.zeros_like(vector), chunks)[0]
