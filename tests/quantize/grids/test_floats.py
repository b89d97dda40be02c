"""Blocks of small floats under a shared scale, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize import rtn
from weightsmith.quantize.grids import ELEMENTS, Float, Microscaling, NvFloat4, of_element, quantized, table_of

E4M3, E2M1 = ELEMENTS["e4m3"], ELEMENTS["e2m1"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(value: float, word: str) -> float:
    numbers = [number for number in table_of(ELEMENTS[word]) if abs(number) <= ELEMENTS[word].largest]
    return min(numbers, key=lambda number: abs(number - value))


@pytest.mark.parametrize("word", ELEMENTS)
def test_a_microscaled_block_by_hand(word: str):
    values = normal(20, 32) * 2.0 ** normal(20, 1, seed=1).mul(8).round()
    grid = Microscaling(word)
    params = grid.fit(values)
    made = grid.decode(grid.encode(values, params), params)
    for block, found, scale in zip(values.tolist(), made.tolist(), params["scale"].tolist(), strict=True):
        power = math.floor(math.log2(max(map(abs, block)))) - ELEMENTS[word].top
        assert scale == 2.0**power
        assert found == [rounded(value / 2.0**power, word) * 2.0**power for value in block]


def test_powers_of_two_are_not_missed_by_a_bit():
    """A logarithm in floats is off just below a power of two."""
    values = torch.tensor([[math.nextafter(8.0, 0)], [8.0]], dtype=torch.float64)
    assert Microscaling("e2m1").fit(values)["scale"].tolist() == [1.0, 2.0]
    below = torch.tensor(8.0).nextafter(torch.tensor(0.0))
    assert Microscaling("e2m1").fit(torch.stack([below, torch.tensor(8.0)]).unsqueeze(1))["scale"].tolist() == [
        1.0,
        2.0,
    ]


def test_floor_cuts_off_and_ceil_holds_all():
    values = torch.tensor([[7.9, 1.0], [6.0, 1.0], [6.1, 1.0], [12.0, 1.0]])
    floor, ceil = (Microscaling("e2m1", 2, scaling).fit(values)["scale"].tolist() for scaling in ("floor", "ceil"))
    assert floor == [1.0, 1.0, 1.0, 2.0]
    assert ceil == [2.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("word", ELEMENTS)
def test_the_smallest_and_the_largest_blocks(word: str):
    values = torch.tensor([[0.0, 0.0], [2.0**-140, 0.0], [3e38, -1e38], [2.0**-120, -(2.0**-121)]])
    grid = Microscaling(word, 2)
    params = grid.fit(values)
    assert params["scale"][:2].tolist() == [2.0**-127] * 2
    made = grid.decode(grid.encode(values, params), params)
    assert made.isfinite().all()
    assert not made[0].any()
    assert torch.equal(made[3], values[3])
    assert (made[2] / values[2] - 1).abs().max() < 0.35
    assert torch.equal(params["scale"].to(torch.float8_e8m0fnu).float(), params["scale"])


def test_eight_bits_of_microscaling_err_less_than_six_and_four():
    values = normal(64, 64)
    errors = {word: float((quantized(values, word) - values).square().mean()) for word in
              ("mxint8", "mxfp8", "mxfp6", "mxfp4")}  # fmt: skip
    assert errors["mxint8"] < errors["mxfp8"] < errors["mxfp4"]
    assert errors["mxfp6"] < errors["mxfp4"]


def test_nvfp4_by_hand():
    values = normal(4, 64, seed=3) * torch.tensor([[1.0], [0.1], [1e-3], [1e-6]])
    grid = NvFloat4()
    shared = grid.shared(values)
    over = values.abs().max().item() / (448 * 6)
    assert shared["tensor_scale"].item() == pytest.approx(over)
    over = shared["tensor_scale"].item()
    runs = values.unflatten(1, (4, 16))
    params = {**shared, **grid.fit(runs, shared)}
    made = grid.decode(grid.encode(runs, params), params).flatten(1)
    for i in range(4):
        for j in range(4):
            run = runs[i, j].tolist()
            scale = rounded(max(map(abs, run)) / (6 * over), "e4m3")
            scale = scale or 2.0**-9  # the least that there is
            assert params["scale"][i, j].item() == scale
            expected = [rounded(value / (scale * over), "e2m1") * scale * over for value in run]
            assert made[i, 16 * j : 16 * j + 16].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    largest = params["scale"].max()
    assert largest == 448


def test_what_no_power_of_two_reaches_is_refused():
    with pytest.raises(Error, match=r"too large for a scale of 2\^127"):
        Microscaling("e2m1").fit(torch.tensor([[1e200, 1.0]], dtype=torch.float64))
    largest = torch.tensor([[torch.finfo(torch.float32).max]])
    for scaling in ("floor", "ceil"):
        assert Microscaling("e2m1", scaling=scaling).fit(largest)["scale"].isfinite().all()


def test_a_search_from_above_finds_the_better_power():
    """Of the power that holds all values and the one below it; from the one below there is nothing to find."""
    weight = normal(64, 64)
    made = {
        (scaling, clip): rtn(weight, grid=Microscaling("e2m1", 32, scaling), clip=clip).values().sub_(weight)
        for scaling in ("floor", "ceil")
        for clip in (0, 1)
    }
    error = {key: away.square().unflatten(1, (2, 32)).sum(-1) for key, away in made.items()}
    assert torch.equal(error["ceil", 1], torch.minimum(error["ceil", 0], error["ceil", 1]))
    assert (error["ceil", 1] <= torch.minimum(error["floor", 0], error["ceil", 0])).all()
    assert error["ceil", 1].sum() < 0.97 * min(error["floor", 0].sum(), error["ceil", 0].sum())


def test_scaled_floats_use_the_whole_range():
    values = normal(3, 10)
    for word in ("e4m3", "e5m2", "e2m1"):
        params = Float(word).fit(values)
        assert torch.allclose(params["scale"] * ELEMENTS[word].largest, values.abs().amax(1))
        made = Float(word).decode(Float(word).encode(values, params), params)
        assert torch.allclose(made.abs().amax(1), values.abs().amax(1))
    whole = Float(per_tensor=True)
    assert whole.shared(values)["scale"].shape == ()
    assert whole.fit(values) == {}
    assert torch.equal(whole.shared(values)["scale"], values.abs().max() / 448)


def test_scales_are_those_that_are_stored():
    values = normal(3, 10)
    grid = Float("e4m3", scale_dtype=torch.bfloat16)
    scale = grid.fit(values)["scale"]
    assert torch.equal(scale.bfloat16().float(), scale)
    assert of_element(grid.encode(values, {"scale": scale}), E4M3).abs().max() <= 448
