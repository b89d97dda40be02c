"""What is drawn of a tensor, against slow loops and `torch`."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest
import torch

from weightsmith.inspect import summary
from weightsmith.look import _values
from weightsmith.look._values import change, flips, histogram, picture, singular_values, spectrum_cost
from weightsmith.weights import Spec, Weights, materialize


def node(tensor):
    return Weights.of({"w": tensor}).node("w")


def drawn(tensor):
    stats = summary(Weights.of({"w": tensor}), stats=True).tensors[0].stats
    return histogram(node(tensor), stats)


def unpacked(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """So that a small tensor is read in many."""
    monkeypatch.setattr(_values, "CHUNK", 64)


def test_histogram_by_hand():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = drawn(x)
    low, high = found["low"], found["high"]
    assert (low, high) == (float(x.min()), float(x.max()))
    expected = [0] * _values.BINS
    for value in x.tolist():
        expected[min(int((value - low) / (high - low) * _values.BINS), _values.BINS - 1)] += 1
    assert found["counts"] == expected
    assert (found["below"], found["above"]) == (0, 0)


def test_histogram_of_the_largest_values():
    found = drawn(torch.tensor([-1.7e308, 1.7e308, 1.7e308, 0.0], dtype=torch.float64))
    assert (found["counts"][0], found["counts"][_values.BINS // 2], found["counts"][-1]) == (1, 1, 2)


def test_magnitudes_are_powers_of_two():
    found = drawn(torch.tensor([1.0, 1.99, 2.0, -0.5, -0.75, 0.0, 0.0, 9.0]))
    assert found["first"] == -1
    assert found["positive"] == [0, 2, 1, 0, 1]
    assert found["negative"] == [2, 0, 0, 0, 0]
    assert found["zeros"] == 2


def test_what_is_far_out_is_counted_apart():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    x[7], x[8], x[9] = 1000.0, 1001.0, -900.0
    found = drawn(x)
    assert (found["below"], found["above"]) == (1, 2)
    assert sum(found["counts"]) == 4997
    assert found["high"] < 200


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_equal_values_are_one_bar(value):
    found = drawn(torch.full((101,), value))
    assert found["counts"] == [101]
    assert found["low"] == found["high"] == pytest.approx(value)


def test_what_is_not_finite_is_left_out():
    found = drawn(torch.tensor([1.0, float("nan"), 3.0, float("inf"), -float("inf")]))
    assert sum(found["counts"]) == 2
    assert sum(found["positive"]) == 2
    assert drawn(torch.full((3,), float("nan"))) is None
    assert drawn(torch.zeros(0)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_dtypes(dtype):
    x = (torch.arange(200) % 7).to(dtype)
    found = drawn(x)
    assert sum(found["counts"]) == 200
    assert found["zeros"] == int((x == 0).sum())
    assert picture(node(x))["width"] == 160


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (200, 7), (7, 500), (150, 3, 100), (300,)])
def test_picture_by_hand(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = picture(node(x))
    matrix = x.reshape(shape[0] if len(shape) > 1 else 1, -1)
    rows, columns = matrix.shape
    height, width = min(rows, _values.DOWN), min(columns, _values.ACROSS)
    assert [found[k] for k in ("rows", "columns", "height", "width")] == [rows, columns, height, width]
    cells = [[[] for _ in range(width)] for _ in range(height)]
    for i in range(rows):
        for j in range(columns):
            cells[i * height // rows][j * width // columns].append(float(matrix[i, j]))
    flat = [np.array(cell) for row in cells for cell in row]
    np.testing.assert_allclose(unpacked(found["mean"]), [c.mean() for c in flat], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unpacked(found["rms"]), [math.sqrt((c**2).mean()) for c in flat], rtol=1e-5)


def test_picture_of_what_is_not_finite():
    found = picture(node(torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]])))
    assert found["nonfinite"] == 2
    np.testing.assert_array_equal(unpacked(found["mean"]), [1, np.nan, np.nan, -2])


def test_singular_values():
    x = torch.randn(40, 3, 10, generator=torch.Generator().manual_seed(3))
    found = singular_values(node(x))
    values = torch.linalg.svdvals(x.double().reshape(40, 30))
    np.testing.assert_allclose(found["values"], values, rtol=1e-6)
    assert found["places"] == list(range(1, 31))
    assert found["stable_rank"] == pytest.approx(float(x.double().pow(2).sum() / values[0] ** 2))
    assert singular_values(node(torch.tensor([[float("nan"), 1.0]]))) is None


def test_many_singular_values_are_thinned(monkeypatch):
    monkeypatch.setattr(_values, "POINTS", 10)
    found = singular_values(node(torch.diag(torch.arange(1.0, 51.0))))
    assert (found["places"][0], found["places"][-1], len(found["places"])) == (1, 50, 10)
    np.testing.assert_allclose(found["values"], [51 - place for place in found["places"]], rtol=1e-6)


def test_cost_of_a_spectrum():
    wide, tall = (spectrum_cost(Spec(shape, torch.bfloat16)) for shape in ((100, 5000), (5000, 100)))
    assert wide == tall == 1_000_000 + 3 * 8 * 100**2 + 2**26


@pytest.mark.parametrize(
    ("a", "b", "dtype"),
    [
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.5, -2.0]), torch.float32),
        (torch.tensor([True, False]), torch.tensor([False, False]), torch.float64),
        (torch.tensor([250, 3], dtype=torch.uint8), torch.tensor([1, 2], dtype=torch.uint8), torch.float64),
        (torch.tensor([1e-300, 3.0], dtype=torch.float64), torch.tensor([0.0, 2.0]), torch.float64),
        (torch.tensor([1j, 2.0]), torch.tensor([1.0, 2.0]), torch.complex128),
    ],
)
def test_change_is_the_second_less_the_first(a, b, dtype):
    found = materialize(change(node(a), node(b)))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert found.dtype == dtype
    assert torch.equal(found.to(wide), b.to(wide) - a.to(wide))


def test_flips_by_hand():
    a = torch.tensor([1.0, -1.0, 0.0, 2.0, float("nan"), 3.0, 0.0, -2.0])
    b = torch.tensor([-1.0, -2.0, 4.0, 0.0, 1.0, 3.0, 0.0, 5.0])
    assert flips(node(a), node(b)) == {"flipped": 2 / 8, "to_zero": 1 / 8, "from_zero": 1 / 8}


def test_flips_of_tiny_and_of_complex_values():
    tiny = torch.tensor([1e-200, 1e-200], dtype=torch.float64)
    assert flips(node(tiny), node(-tiny))["flipped"] == 1
    assert flips(node(torch.tensor([1j, 1 + 0j])), node(torch.tensor([-1j, 1j])))["flipped"] == 0.5
