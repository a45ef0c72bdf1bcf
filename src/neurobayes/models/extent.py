"""The extent of a fit's training: how many backbones, how long, and with how much work."""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import backbone_runs, backbones, left_out, linearity, regularisation, selectors, trees
from .._typing import Params
from ..hoisting import hoist_network
from ..inference.auto import Auto
from ..inference.base import Engine
from ..inference.last_layer import MAX_SCALARS, LastLayer
from ..network_info import NetworkInfo
from ..networks.base import Network
from ..partition import Partition
from ..pretraining import BATCH_ROWS, PretrainingOptions, default_batch_size, default_epochs
from ..short_rows import ShortRows, with_short_rows
from .base import abstract_key
from .choosing import resolve_untrained

EXACT_BACKBONES = 16
"""Backbones by default where the posterior of each is known in closed form."""

SMALL_ROWS = 128
SMALL_BACKBONES = 32
"""With fewer rows than this twice as many: they are cheap there, and every row is then new to eight."""

SAMPLED_BACKBONES = 4
"""Backbones by default where each needs a sampler of its own."""

MANY_SAMPLED = 1000
"""With more Bayesian weights than this to sample, two backbones by default: sampling is slow, and much is random."""

MOST_WORK = 8e12
"""Floating-point operations of all training at most, where its extent is the default; some minutes on two cores."""

_SCALES = 0.5 * len(backbones.SIGMA_GRID)
"""Prior scales that are trained to the end, where they are searched: half of the runs end early."""

LEAST_EPOCHS = 30
"""Four backbones are trained for so long anyway."""

MUCH_WORK = 2e11
"""Floating-point operations of a training from which it pays to compile a network that leaves out padding."""

_FEW_EPOCHS = 100
"""Epochs that a run whose length is not given has at least, or nearly so."""


class Bayesian(NamedTuple):
    """What is known before training of the Bayesian part: how many weights, and which if their posterior is exact.

    ``from_inputs`` is whether the whole first layer is Bayesian, so that nothing learnt is below.
    """

    size: int
    exact: Partition | None = None
    from_inputs: bool = False


def foresee(
    network: Network, x: Any, template: Params, choice: selectors.Selector | None, config: Any, info: Any,
    engine: Engine | None, *, gaussian: bool,
) -> Bayesian:  # fmt: skip
    """The size of the Bayesian part, and whether its posterior will be known in closed form above each backbone.

    That takes ``gaussian`` noise of one level.
    """
    selected = 0 if config is None else len(config.layer_names or ()) * config.num_pairs_per_layer
    if choice is None or choice.stands_alone:
        return Bayesian(selected)
    partition = resolve_untrained(choice, info, template)
    from_inputs = _has_first_layer(partition, info)
    solvable = gaussian and (engine is None or isinstance(engine, Auto | LastLayer))
    if not solvable or config is not None or partition.size > MAX_SCALARS:
        return Bayesian(partition.size + selected, from_inputs=from_inputs)
    row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    params, state = jax.eval_shape(network.init, abstract_key(), row)
    hoisted = hoist_network(network, partition, params, state, row)
    affine = linearity.late_is_affine(hoisted, partition.size, hoisted.carry_avals)
    return Bayesian(partition.size, partition if affine else None, from_inputs)


def _has_first_layer(partition: Partition, info: NetworkInfo) -> bool:
    counts = partition.counts()
    return all(counts.get(leaf, 0) == math.prod(info.shapes[leaf]) for leaf in info.layers[0].leaves)


def how_many(
    network: Network, prepared: Any, wanted: int | str, bayesian: Bayesian, room_for: int | None = None
) -> int:
    """Number of backbones for each prior scale: what is wanted, or by default more where each is cheap.

    Each leaves out a row, so there are no more of them than rows. By default all fits have as many as that of
    ``room_for`` rows, the most that later ones will have, so that these compile nothing.
    """
    if wanted != "auto":
        return min(int(wanted), prepared.num_rows)
    if bayesian.exact is None:
        few = bayesian.size > MANY_SAMPLED
        return min(2 if few else SAMPLED_BACKBONES, prepared.num_rows)
    rows = max(prepared.num_rows, room_for or 0)
    steps = -(-rows // (default_batch_size(rows, None) or rows))
    network = trained_network(network, prepared, SAMPLED_BACKBONES * _FEW_EPOCHS)
    work = _row_work(network, prepared) * rows * default_epochs(steps, backbones.MOST_EPOCHS) * _SCALES
    affordable = MOST_WORK / max(1.0, work)
    step, most = backbone_runs.GROUP, SMALL_BACKBONES if rows < SMALL_ROWS else EXACT_BACKBONES
    count = np.clip(step * math.floor(affordable / step), SAMPLED_BACKBONES, most)
    return min(int(count), prepared.num_rows)


def epoch_work(network: Network, prepared: Any) -> float:
    """Floating-point operations of an epoch of one network, forwards and backwards."""
    return _row_work(network, prepared) * prepared.num_rows


def _row_work(network: Network, prepared: Any) -> float:
    """Floating-point operations of a row in an epoch: the mean of those of a batch, where not all cost the same."""
    x = prepared.rows.x
    if not isinstance(network, ShortRows):
        return 3.0 * _applying(network, (1, *x.shape[1:]), x.dtype)
    return 3.0 * sum(
        (end - begin) / BATCH_ROWS * _applying(network.network, (1, width), x.dtype)
        for begin, end, width in network.blocks(BATCH_ROWS)
    )


@functools.lru_cache(maxsize=64)
def _applying(network: Network, shape: tuple[int, ...], dtype: Any) -> float:
    row = jax.ShapeDtypeStruct(shape, dtype)
    params, state = jax.eval_shape(network.init, abstract_key(), row)
    analysis = jax.jit(network.apply).lower(params, state, row).cost_analysis()
    return float((analysis or {}).get("flops", 0.0)) or 2.0 * trees.num_scalars(params)


def longest_run(network: Network, prepared: Any, num_backbones: int, *, searched: bool = True) -> int:
    """Epochs that the default number of backbones can have: fewer where an epoch is much work, but some anyway.

    ``searched`` is whether the prior scale is.
    """
    runs = _runs(min(num_backbones, SAMPLED_BACKBONES), prepared.num_rows, _SCALES if searched else 1.0)
    return max(LEAST_EPOCHS, int(MOST_WORK / max(1.0, runs * epoch_work(network, prepared))))


def _runs(num_backbones: int, num_rows: int, scales: float) -> float:
    """Networks trained to the end with so many prior scales: of a single one, also those of the folds that choose.

    ``scales`` is zero where nothing is chosen.
    """
    if num_backbones > 1:
        return num_backbones * max(1.0, scales)
    return 1 + scales * min(left_out.MAX_FOLDS, max(1, regularisation.FOLD_ROWS // num_rows))


def trained_network(network: Network, prepared: Any, epochs: float, batch_size: int | None = None) -> Network:
    """The network as its training applies it: without most of the padding of token rows, where that saves much.

    ``epochs`` are those of all networks that are trained.
    """
    if network.input_spec.pad_token is None or epochs * epoch_work(network, prepared) < MUCH_WORK:
        return network
    rows = len(prepared.rows.real)
    return with_short_rows(network, prepared.rows.x, default_batch_size(rows, batch_size) or rows)


def of_training(plan: Any, options: PretrainingOptions) -> tuple[Network, int]:
    """The network as the training of a plan applies it, and the epochs that are affordable where none are given."""
    searched = options.sigma == "auto"
    scales = _SCALES if searched else float(options.epochs is None)
    epochs = _runs(plan.num_backbones, plan.prepared.num_rows, scales) * (options.epochs or _FEW_EPOCHS)
    network = trained_network(plan.network, plan.prepared, epochs, options.batch_size)
    return network, longest_run(network, plan.prepared, plan.num_backbones, searched=searched)
