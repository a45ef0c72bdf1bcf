"""The picture of a partition: a bar for every layer, a heat map for every layer that is Bayesian in part."""

import sys

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import plots, trees
from neurobayes.errors import MissingExtraError, NotFittedError, OptionError
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.partition_plots import _pooled
from neurobayes.selectors import resolve
from neurobayes.subspaces import Subspace

pytest.importorskip("matplotlib")


class Model:
    """What ``plots.partition`` asks of a fitted model."""

    def __init__(self, network, row_shape, selector, tokens=False):
        from neurobayes.models.base import network_info

        self.network, self.row_shape = network, row_shape
        example = jax.ShapeDtypeStruct((1, *row_shape), np.int32 if tokens else np.float32)
        self.partition = resolve(selector, network_info(as_network(network), example))

    def layer_context(self):
        return self.network, self.row_shape, self.partition


CASES = {
    "mlp": Model(nb.FlaxMLP([64, 32, 16], 1), (8,), nb.weights({"Dense0": [(0, 5), (7, 63)]}) | nb.last(1)),
    "conv": Model(nb.FlaxConvNet(2, [3, 4], [6], 2), (8, 8, 2), nb.weights({"Conv1": [(0, 3)]}) | nb.last(1)),
    "transformer": Model(
        nb.FlaxTransformer(11, 5, 1, d_model=8, num_heads=2, num_layers=2), (5,),
        nb.weights({"Block0_Attention": [("query", 1, 2), ("out", 7, 0)]}) | nb.norms() & nb.biases() | nb.last(1),
        tokens=True,
    ),
}  # fmt: skip


def all_axes(figure):
    own = list(figure.axes)
    return own or [ax for part in figure.subfigs for ax in all_axes(part)]


def overview(figure):
    """Layer -> text beside its bar, from top to bottom."""
    ax = figure.subfigs[0].axes[0] if figure.subfigs else figure.axes[0]
    names = [label.get_text().split(" (")[0] for label in ax.get_yticklabels()]
    return dict(zip(names, (text.get_text() for text in ax.texts), strict=True))


def panels(figure):
    """Title of a panel -> its images by the label of the strip ('' for the kernel)."""
    found = {}
    for ax in figure.axes[1:] if figure.axes else []:
        if ax.get_title():
            current = found.setdefault(ax.get_title().split("\n")[0], {})
        if ax.images:
            label = ax.get_yticklabels()[0].get_text() if not ax.get_ylabel() else ""
            current[label] = np.asarray(ax.images[0].get_array())
    return found


@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
def test_every_layer_has_a_bar_and_the_picture_is_saved(model, tmp_path):
    figure = plots.partition(model)
    figure.savefig(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []
    rows = overview(figure)
    for path in model.partition.counts():
        assert any(trees.is_under(path, name) for name in rows), path


def test_mlp_shows_the_chosen_cells_and_only_partial_layers():
    figure = plots.partition(CASES["mlp"])
    assert overview(figure) == {
        "Dense0": "2 of 576", "Dense1": "none of 2,080", "Dense2": "none of 528", "Dense3": "all 17"
    }  # fmt: skip
    shown = panels(figure)
    assert list(shown) == ["Dense0"]
    kernel, bias = shown["Dense0"][""], shown["Dense0"]["bias"]
    assert kernel.shape == (8, 64) and bias.shape == (1, 64)
    assert [tuple(map(int, at)) for at in np.argwhere(kernel > 0)] == [(0, 5), (7, 63)] and not bias.any()


def test_convolution_shows_channel_pairs():
    shown = panels(plots.partition(CASES["conv"]))
    assert list(shown) == ["Conv1"]
    assert shown["Conv1"][""].shape == (3, 4)
    assert [tuple(map(int, at)) for at in np.argwhere(shown["Conv1"][""] > 0)] == [(0, 3)]
    assert shown["Conv1"][""].max() == pytest.approx(1.0)


def test_part_of_a_window_is_lighter_than_all_of_it():
    model = CASES["conv"]
    masks = {path: np.zeros(mask.shape, bool) for path, mask in model.partition.masks().items()}
    masks["Conv1.kernel"][0, 0, 1, 2] = True
    part = plots.partition(Partition.from_masks(masks, {k: v.shape for k, v in masks.items()}))
    kernel = panels(part)["Conv1"][""]
    assert kernel[1, 2] == kernel.max() and 0.3 < kernel.max() < 0.5


def test_attention_is_split_into_projections_and_norms_into_strips():
    figure = plots.partition(CASES["transformer"])
    rows, shown = overview(figure), panels(figure)
    assert rows["Block0_Attention.query"] == "1 of 72" and rows["Block0_Attention.key"] == "none of 72"
    assert rows["Block1_Attention"] == "none of 288"
    assert shown["Block0_Attention.query"][""][1, 2] == 1 and shown["Block0_Attention.out"][""][7, 0] == 1
    assert set(shown["Block0_LayerNorm1"]) == {"bias", "scale"}
    assert shown["Block0_LayerNorm1"]["bias"].all() and not shown["Block0_LayerNorm1"]["scale"].any()


def test_whole_layers_alone_need_no_heat_map():
    figure = plots.partition(Model(nb.FlaxMLP([4], 1), (3,), nb.last(1)))
    assert overview(figure) == {"Dense0": "none of 16", "Dense1": "all 5"} and panels(figure) == {}


def test_large_kernels_are_pooled_and_single_weights_still_show():
    share = np.zeros((200, 1000))
    share[150, 999] = 1
    pooled = _pooled(share)
    assert max(pooled.shape) <= 96 and np.count_nonzero(pooled) == 1
    assert pooled[-1 - (200 - 151) // 3, -1] > 0
    model = Model(nb.FlaxMLP([200], 1), (150,), nb.weights({"Dense0": [(149, 199)]}))
    kernel = panels(plots.partition(model))["Dense0"][""]
    assert np.count_nonzero(kernel) == 1 and kernel[-1, -1] >= 0.3


def test_partition_alone_and_a_subspace_are_shown_by_their_leaves():
    model = CASES["mlp"]
    assert overview(plots.partition(model.partition)) == overview(plots.partition(model))
    params = {"a": np.zeros((2, 3)), "b": np.zeros(3)}
    plane = Subspace.of({"a": np.ones((1, 2, 3)), "b": np.zeros((1, 3))}, params)
    assert overview(plots.partition(plane)) == {"a": "all 6", "b": "none of 3"}


def test_what_has_no_partition_raises():
    with pytest.raises(NotFittedError, match="fit"):
        plots.partition(nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1))
    with pytest.raises(OptionError, match="PartialBNN or a Partition"):
        plots.partition(np.zeros(3))


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'matplotlib.*pip install ".\[plots\]"'):
        plots.partition(CASES["mlp"])
