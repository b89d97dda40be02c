"""The loops in C give what the Python beside them gives, to the bit; without them everything goes on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from weightsmith import native
from weightsmith.merge import _drop
from weightsmith.merge._trim import elected
from weightsmith.quantize._gptq import rounded_columns
from weightsmith.solve import _top

needs_native = pytest.mark.skipif(not native.available(), reason="the native loops were not built (no C compiler?)")
ODD = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-42, -1e-42, 3e38, -3e38, 1.0, -1.0]
SIZES = (1, 15, 16, 17, 1023, 1024, 1025, 5000)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the sign of zero; any NaN is as good as another."""
    nans = one.isnan()
    return torch.equal(nans, other.isnan()) and torch.equal(
        one.view(torch.int32)[~nans], other.view(torch.int32)[~nans]
    )


def without(monkeypatch, function, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(native, "_library", lambda: None)
        return function(*arguments, **options)


def rows_of(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=generator)
    rows[torch.rand(count, size, generator=generator) < 0.4] = 0
    odd = torch.tensor(list(itertools.product(ODD, repeat=2))).T
    wide = min(size, odd.shape[1])
    rows[:2, :wide] = odd[:count, :wide] if count > 1 else odd[:1, :wide]
    return rows


@needs_native
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("lower", "upper"), [(-5, 7), (-(2**31), 2**31), (0, 1), (2**31 - 1, 2**31), (-(2**31), -100)])
def test_inside(size: int, lower: int, upper: int):
    generator = torch.Generator().manual_seed(size)
    key = torch.randint(-10, 10, (size,), generator=generator, dtype=torch.int32)
    key[torch.rand(size, generator=generator) < 0.1] = torch.iinfo(torch.int32).max
    key[torch.rand(size, generator=generator) < 0.1] = torch.iinfo(torch.int32).min
    made = native.inside(key, lower, upper)
    assert made is not None
    expected = _top._inside(key, lower, upper)
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1], expected[1])
    assert made[2] == expected[2]
    by_hand = [i for i, one in enumerate(key.tolist()) if lower <= one < upper]
    assert made[0].tolist() == by_hand


@needs_native
def test_what_inside_returns_is_its_callers_own():
    key = torch.arange(100, dtype=torch.int32)
    first = native.inside(key, 10, 20)
    native.inside(key, 50, 90)
    assert first is not None
    assert first[0].tolist() == list(range(10, 20))


@needs_native
@pytest.mark.parametrize("weights", [1.0, [0.5, 1.0, 2.0], [1.0, -0.5, 0.3], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("dialect", ["mergekit", "count", "peft", "paper"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tie", [1.0, -1.0])
def test_elected(weights, dialect, normalize, tie, monkeypatch):
    for size in SIZES:
        rows = rows_of(3, size, seed=size)
        expected = without(monkeypatch, elected, rows.clone(), weights, normalize, dialect, tie=tie)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "relu_", None)  # only the loop in C may be used
            made = elected(rows.clone(), weights, normalize, dialect, tie=tie)
        assert same_bits(made, expected)


@needs_native
def test_one_row_elects_itself():
    row = torch.tensor([[3.0, -2.0, 0.0]])
    assert elected(row, 1.0, True).tolist() == [3.0, -2.0, 0.0]


@needs_native
@pytest.mark.parametrize("chance", [0.5, 0.1, 0.9, 1 / 3, 1e-7, 1 - 1e-7])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 12345])
def test_dropped(chance: float, inverse: bool, start: int, monkeypatch):
    for size in (*SIZES, 4099):
        rows = rows_of(2, size, seed=size)
        options = {"density": chance, "inverse": inverse, "seed": 3, "key": "w", "start": start}
        expected = without(monkeypatch, _drop._drawn, rows.clone(), **options)
        with monkeypatch.context() as patch:
            patch.setattr(_drop, "below", None)
            made = _drop._drawn(rows.clone(), **options)
        assert same_bits(made, expected)


@needs_native
def test_the_generator_is_numpys():
    source = np.random.PCG64DXSM(7)
    state = source.state["state"]
    row = torch.ones(64)
    assert native.dropped(row, state["state"], state["inc"], 0, 32, 2**31, 2.0)
    expected = source.random_raw(32).view("<u4") < 2**31
    assert row.tolist() == [2.0 if one else 0.0 for one in expected]


@needs_native
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 257), (32, 1000), (32, 0)])
@pytest.mark.parametrize("each", [False, True])
def test_rounded_columns(columns: int, rows: int, each: bool, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    values = 3 * torch.randn(columns, rows, generator=generator)
    values[:, ::7] *= 1e6
    factor = torch.randn(columns, columns + 3, generator=generator)[:, :columns]  # a part of a larger one
    count = columns if each else 1
    scale = torch.rand(count, rows, generator=generator) + 0.1
    scale[:, 1::5] *= -1
    zero = torch.randint(0, 8, (count, rows), generator=generator).float()
    minimum = torch.randn(count, rows, generator=generator)
    values[0, ::3] = minimum[0, ::3] + scale[0, ::3] * 2.5  # halves go to even
    found = []
    for run in (rounded_columns, lambda *given: without(monkeypatch, rounded_columns, *given)):
        given = values.clone()
        errors, codes = torch.full_like(given, torch.nan), torch.full(given.shape, 99, dtype=torch.uint8)
        run(given, factor, scale, zero, minimum, 1, 7, errors, codes)
        found.append((errors, codes, given))
    assert torch.equal(found[0][1], found[1][1])
    assert same_bits(found[0][0], found[1][0])
    assert same_bits(found[0][2], found[1][2])
    if rows:
        assert 1 <= int(found[0][1].min()) <= int(found[0][1].max()) <= 7
    wide = (one.double() for one in (values, factor, scale, zero, minimum))
    assert not native.rounded_columns(*wide, 1, 7, found[0][0].double(), found[0][1])


def test_other_dtypes_and_strides_are_left_to_python():
    assert native.inside(torch.zeros(4, dtype=torch.int64), 0, 1) is None
    assert native.inside(torch.zeros(8, dtype=torch.int32)[::2], 0, 1) is None
    assert native.elected(torch.zeros(2, 4, dtype=torch.float64), [1, 1], "weighted", True, 1.0) is None
    assert native.elected(torch.zeros(4, 2).T, [1, 1], "weighted", True, 1.0) is None
    assert native.elected(torch.zeros(2, 4, device="meta"), [1, 1], "weighted", True, 1.0) is None
    assert not native.dropped(torch.zeros(4, dtype=torch.float64), 1, 1, 0, 16, 5, 1.0)


def test_the_same_values_with_and_without():
    program = """
import os, torch, weightsmith as ws
g = torch.Generator().manual_seed(0)
base = {"w": torch.randn(300, 700, generator=g).bfloat16(), "b": torch.randn(7, generator=g)}
runs = [{n: t + 0.1 * torch.randn(t.shape, generator=g).to(t.dtype) for n, t in base.items()} for _ in range(3)]
for name in ("ties", "dare_ties", "dare_linear", "breadcrumbs_ties"):
    out = getattr(ws.merge, name)(runs, base=base, density=0.3)
    print(name, float(out["w"].double().sum()), out["b"].double().tolist())
"""
    done = {
        value: subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"WEIGHTSMITH_NATIVE": value},
            capture_output=True,
            text=True,
        )
        for value in ("0", "1")
    }
    assert all(one.returncode == 0 for one in done.values()), done["1"].stderr
    assert "breadcrumbs_ties" in done["0"].stdout
    assert done["0"].stdout == done["1"].stdout


def test_it_can_be_switched_off():
    program = "from weightsmith import native; print(native.available())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"WEIGHTSMITH_NATIVE": "0"}, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_a_library_of_another_version_is_not_used(monkeypatch, tmp_path):
    wrong = tmp_path / "_native.so"
    wrong.write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY", wrong)
    native._library.cache_clear()
    try:
        assert not native.available()
        assert native.inside(torch.zeros(4, dtype=torch.int32), 0, 1) is None
    finally:
        monkeypatch.undo()
        native._library.cache_clear()
