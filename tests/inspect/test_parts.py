"""Names of layers and kinds, and drawings by both."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect._parts import by_kind, grid, in_order, kind_of, matrices, mean_of, median_of, short
from weightsmith.weights import Weights


def rows(*names):
    return [{"tensor": n, "layer": n.rpartition(".")[0], "kind": n.rpartition(".")[2], "values": 1} for n in names]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.3.attn_q.weight", "attn_q"),
        ("encoder.layer.0.attention.self.query.weight", "attention.self.query"),
        ("encoder.layer.0.attention.self.query.bias", "attention.self.query.bias"),
        ("layers.0.experts.12.w1.weight", "experts.*.w1"),
        ("0.weight", "weight"),
        ("wte.weight", "wte"),
        ("weight", "weight"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_matrices_are_floats_of_two_axes_and_counted_once():
    tied = torch.ones(3, 2)
    weights = Weights.of({"a": tied, "b": tied, "v": torch.ones(3), "i": torch.ones(2, 2, dtype=torch.int8)})
    assert matrices(weights, "*") == ["a"]
    assert matrices(weights, "b") == ["a"]
    with pytest.raises(Error, match="no float matrix fits"):
        matrices(weights, "v")


def test_a_grid_has_layers_in_their_order_and_holes_where_nothing_is():
    plot = grid("x", rows("h.0.q", "h.10.q", "h.2.q", "h.2.k", "wte"), lambda row: len(row["tensor"]))
    assert list(plot.surface.x) == ["0", "2", "10"]
    assert list(plot.surface.y) == ["q", "k"]
    assert plot.surface.z[0] == [5.0, 5.0, 6.0]
    assert math.isnan(plot.surface.z[1][0])


def test_a_grid_of_one_kind_is_bars():
    plot = grid("x", rows("h.0.q", "h.1.q"), lambda row: None)
    assert plot.surface is None
    assert plot.lines[0].style == "bars"


def test_the_kinds_that_are_drawn_are_those_of_most_values():
    many = rows(*(f"h.{i}.k{i}" for i in range(9)))
    many[0]["values"] = 0
    assert list(by_kind(many, most=8)) == [f"k{i}" for i in range(1, 9)]
    small = rows("h.0.q", "h.1.q", "h.2.q", "h.0.k")
    small[3]["values"] = 2
    assert list(by_kind(small, most=1)) == ["q"]  # three of one each, against one of two


def test_short_names_stay_apart():
    assert short(["e.layers.0", "d.layers.0"]) == ["e.layers.0", "d.layers.0"]
    assert in_order(["e.1", "d.1", "d.0", "e.0"]) == ["e.0", "e.1", "d.0", "d.1"]


def test_means_leave_out_what_is_missing():
    assert mean_of([1.0, None, math.inf, 3.0]) == 2.0
    assert median_of([None, 5.0, 1.0, 2.0, 3.0]) == 2.5
    assert mean_of([None]) is median_of([]) is None
