"""Differences against formulas on whole tensors; what counts as the same."""

from __future__ import annotations

import json
import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import diff
from weightsmith.weights import UNIT, Weights


def one(a, b):
    return diff(Weights.of({"w": a}), Weights.of({"w": b})).tensors[0]


def test_figures_equal_the_formulas():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(UNIT // 2 + 77, 3, generator=generator)
    b = a.clone()
    b[::7] += torch.randn(b[::7].shape, generator=generator)
    found = one(a, b)
    x, y = a.double().flatten(), b.double().flatten()
    assert found.status == "changed"
    assert found.sums.distance == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-12)
    assert found.sums.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-12)
    assert found.sums.largest == float((x - y).abs().max())
    assert found.sums.share == float((x != y).double().mean())


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "int64", "int8", "uint32", "bool", "complex64"],
)
def test_equal_and_unequal_bits_of_every_kind(dtype):
    values = torch.tensor([0, 1, 1, 0]).to(getattr(torch, dtype))
    other = torch.tensor([0, 1, 0, 0]).to(getattr(torch, dtype))
    assert one(values, values.clone()).status == "same"
    changed = one(values, other)
    assert (changed.status, changed.sums.changed, changed.sums.largest) == ("changed", 1, 1.0)


def test_bits_and_values_are_two_things():
    nan = torch.tensor([math.nan, 1.0])
    same = one(nan, nan.clone())
    assert (same.status, same.sums.changed, same.sums.nonfinite) == ("same", 0, 1)
    signed = one(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (signed.status, signed.sums.changed, signed.sums.bits) == ("changed", 0, 1)


def test_what_is_not_finite_counts_as_changed_and_stays_out_of_sums():
    found = one(torch.tensor([1.0, 2.0, math.inf]), torch.tensor([1.0, math.nan, math.inf])).sums
    assert (found.changed, found.nonfinite, found.distance, found.aa) == (1, 2, 0.0, 1.0)


def test_presence_shape_and_dtype():
    a = Weights.of({"x": torch.ones(2), "gone": torch.ones(1), "s": torch.ones(2, 3), "d": torch.ones(2)})
    b = Weights.of({"new": torch.ones(1), "d": torch.ones(2).bfloat16(), "s": torch.ones(3, 2), "x": torch.ones(2)})
    found = diff(a, b)
    assert {t.name: t.status for t in found.tensors} == {
        "x": "same",
        "gone": "only in a",
        "s": "shape",
        "d": "dtype",
        "new": "only in b",
    }
    assert not found.same
    assert found.counts()["shape"] == 1
    by_name = {t.name: t for t in found.tensors}
    assert by_name["s"].sums is None
    assert (by_name["s"].a, by_name["s"].b) == ("float32[2, 3]", "float32[3, 2]")
    assert by_name["d"].sums.distance == 0.0


@pytest.mark.parametrize("change", ["gone", "new"])
def test_a_name_more_or_less_is_a_difference(change):
    a, b = {"x": torch.ones(2)}, {"x": torch.ones(2)}
    (a if change == "gone" else b)["y"] = torch.ones(1)
    assert not diff(Weights.of(a), Weights.of(b)).same


def test_zeros_have_no_angle():
    assert one(torch.zeros(3), torch.ones(3)).sums.distance == math.inf
    assert one(torch.zeros(3), torch.zeros(3)).sums.distance == 0.0
    assert one(torch.zeros(3), torch.ones(3)).sums.cosine is None
    assert one(torch.empty(0), torch.empty(0)).status == "same"


def test_the_whole_and_the_layers_are_sums_of_the_parts():
    names = ["h.0.a", "h.0.b", "h.1.a", "out"]
    a = Weights.of({n: torch.randn(5) for n in names})
    b = Weights.of({n: a[n] + (n != "out") for n in names})
    found = diff(a, b)
    x, y = (torch.cat([w[n].double() for n in names]) for w in (a, b))
    assert found.overall.distance == pytest.approx(float((x - y).norm() / x.norm()))
    assert found.overall.share == 15 / 20
    layers = {layer.name: (layer.tensors, layer.different) for layer in found.layers()}
    assert layers == {"h.0": (2, 2), "h.1": (1, 1), "out": (1, 0)}


def test_tied_tensors_count_once():
    shared = torch.ones(4)
    found = diff(Weights.of({"a": shared, "b": shared}), Weights.of({"a": shared, "b": shared}))
    assert found.overall.count == 4
    assert [t.status for t in found.tensors] == ["same", "same"]


def test_a_tie_that_was_broken_on_one_side():
    shared = torch.ones(4)
    a, b = Weights.of({"x": shared, "y": shared}), Weights.of({"x": torch.ones(4), "y": torch.zeros(4)})
    for found in (diff(a, b), diff(b, a)):
        assert [t.status for t in found.tensors] == ["same", "changed"]
        assert found.overall.count == 8


def test_a_pattern_that_fits_nothing_is_an_error():
    weights = Weights.of({"a": torch.ones(1)})
    with pytest.raises(Error, match="no tensor of either side fits 'x'"):
        diff(weights, weights, "x")
    assert [t.name for t in diff(weights, weights, "a").tensors] == ["a"]


def test_packed_values_are_compared_by_bits():
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no packed floats")
    a, b = torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 0, 7, 0], dtype=torch.uint8)
    kind = torch.float4_e2m1fn_x2
    assert one(a.view(kind), a.clone().view(kind)).status == "same"
    assert one(a.view(kind), b.view(kind)).status == "changed"


def test_everything_is_plain_data():
    found = diff(Weights.of({"a": torch.zeros(2)}), Weights.of({"a": torch.ones(2), "b": torch.ones(1)}))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["same"] is False
    assert data["tensors"][0]["distance"] is None
    assert data["tensors"][1] == {"name": "b", "status": "only in b", "a": None, "b": "float32[1]"}


def test_a_report_says_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    a = Weights.of({"h.0.w": torch.tensor([3.0, 4.0]), "h.1.w": torch.ones(2), "gone": torch.ones(1)})
    b = Weights.of({"h.0.w": torch.tensor([3.0, 3.0]), "h.1.w": torch.ones(2), "new": torch.ones(1)})
    found = diff(a, b)
    report = found.report()
    assert report.figures["distance"] == found.overall.distance
    assert report.figures["tensors only in b"] == 1
    assert [(row["name"], row["status"]) for row in report.table] == [(t.name, t.status) for t in found.tensors]
    assert [row["distance"] for row in report.table] == [0.2, 0.0, None, None]
    assert list(report.plots[0].lines[0].y) == [0.2, 0.0]
    assert report.save(tmp_path / "r.html").exists()
    assert diff(Weights.of({}), Weights.of({})).report().plots == ()
