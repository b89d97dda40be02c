"""What holds for every grid, and the steps that grids share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error, FormatError
from weightsmith.quantize.grids import (
    GRIDS,
    SHORT,
    Float,
    Grid,
    Integer,
    Levels,
    Microscaling,
    MixedTypes,
    NormalFloat,
    NvFloat4,
    Packing,
    Power,
    Sign,
    Ternary,
    described,
    looked_up,
    named,
    nearest,
    quantized,
    restored,
)
from weightsmith.quantize.grids._grid import check_bits, check_group, held, stepped

ALONE = ("billm", "two_four")
"""Grids of one rounding, which fits them itself."""

ZOO: dict[str, Grid] = {
    "int": Integer(4, 8),
    "int affine": Integer(3, 8, symmetric=False),
    "int minimum": Integer(2, 8, symmetric=False, zero="float"),
    "int narrow": Integer(3, 8, span="narrow"),
    "int signed": Integer(3, 8, span="signed"),
    "int tensor": Integer(5, per_tensor=True),
    "int 1": Integer(1, 8),
    "levels": Levels(2, 8),
    "levels tensor": Levels(3, per_tensor=True),
    "mxfp8": Microscaling("e4m3", 8),
    "mxfp8 e5m2": Microscaling("e5m2", 8),
    "mxfp6": Microscaling("e2m3", 8, "ceil"),
    "mxfp4": Microscaling("e2m1", 8),
    "mxint8": Microscaling("int8", 8),
    "nvfp4": NvFloat4(8),
    "fp8": Float("e4m3"),
    "fp8 tensor": Float("e5m2", per_tensor=True),
    "nf4": NormalFloat(8),
    "bitmod 3": MixedTypes(3, 8),
    "bitmod 4": MixedTypes(4, 8),
    "power": Power(3, 8),
    "power group": Power(4, 8, each="group"),
    "sign": Sign(8),
    "ternary": Ternary(8),
    "ternary mean": Ternary(8, scale="mean"),
}
whole = pytest.mark.parametrize("name", ZOO)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(grid: Grid, values: Tensor, **options: Any) -> dict[str, Tensor]:
    shared = grid.shared(values)
    return {**shared, **grid.fit(values, shared, **options)}


def all_values(grid: Grid, params: dict[str, Tensor], lead: tuple[int, ...]) -> Tensor:
    """Every point of every group: ``[..., 2**bits]``, those that are no numbers left out as zeros."""
    codes = torch.arange(2**grid.bits, dtype=torch.uint8).expand(*lead, -1)
    return grid.decode(codes, params).nan_to_num(0, 0, 0)


@whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_keeps_to_the_signature(name: str, dtype: torch.dtype):
    grid, values = ZOO[name], normal(3, 2, 8).to(dtype)
    assert isinstance(grid, Grid)
    assert not isinstance(grid, Packing)
    params = fitted(grid, values)
    stored = grid.stored()
    assert set(params) == set(stored)
    for key, one in stored.items():
        assert params[key].shape == (one.tail if one.shared else (3, 2, *one.tail)), key
        there = params[key]
        assert torch.equal(there.to(one.dtype).to(there.dtype), there), f"{key} is not as it is stored"
    codes = grid.encode(values, params)
    assert codes.dtype == torch.uint8
    assert codes.shape == values.shape
    assert int(codes.max()) < 2**grid.bits
    made = grid.decode(codes, params)
    assert made.dtype == dtype
    assert made.isfinite().all()


@whole
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_steps_are_not_found_in_few_digits(name: str, dtype: torch.dtype):
    grid, values = ZOO[name], normal(2, 8).mul(9).to(dtype)
    with pytest.raises(Error, match=r"float32 or float64, got .*values\.float\(\)"):
        fitted(grid, values)


@whole
def test_codes_stand_for_the_nearest_point(name: str):
    grid, values = ZOO[name], normal(5, 8, seed=1)
    params = fitted(grid, values)
    points = all_values(grid, params, (5,))
    if name == "int narrow":
        points[:, 0] = 0.0  # its lowest code is not used
    away = (grid.decode(grid.encode(values, params), params) - values).abs()
    least = (values.unsqueeze(-1) - points.unsqueeze(-2)).abs().amin(-1)
    torch.testing.assert_close(away, least, rtol=1e-5, atol=1e-6)


@whole
def test_points_are_their_own_nearest(name: str):
    grid, values = ZOO[name], normal(4, 8, seed=2)
    params = fitted(grid, values)
    made = grid.decode(grid.encode(values, params), params)
    torch.testing.assert_close(grid.decode(grid.encode(made, params), params), made, rtol=0, atol=0)


@whole
def test_groups_do_not_know_each_other(name: str):
    grid, values = ZOO[name], normal(6, 8, seed=3)
    shared = grid.shared(values)
    both = grid.fit(values, shared)
    for row in range(6):
        for key, value in grid.fit(values[row], shared).items():
            torch.testing.assert_close(value, both[key][row], rtol=1e-6, atol=0)
    flipped = grid.fit(values.flip(0), shared)
    for key, value in both.items():
        assert torch.equal(value.flip(0), flipped[key])


@whole
def test_zeros_stay_zeros_or_one_magnitude(name: str):
    grid, values = ZOO[name], torch.zeros(2, 8)
    made = grid.decode(grid.encode(values, fitted(grid, values)), fitted(grid, values))
    assert made.isfinite().all()
    if name not in ("int", "int 1", "int signed"):
        assert not made.any()
    values = torch.cat([normal(1, 8), torch.zeros(1, 8)])
    made = grid.decode(grid.encode(values, fitted(grid, values)), fitted(grid, values))
    assert made.isfinite().all()


@whole
@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (3, 1)])
def test_nothing_and_one(name: str, shape: tuple[int, int]):
    grid, values = ZOO[name], normal(*shape)
    params = fitted(grid, values)
    codes = grid.encode(values, params)
    assert codes.shape == shape
    assert grid.decode(codes, params).shape == shape


@whole
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(name: str, bad: float):
    values = normal(2, 8)
    values[1, 3] = bad
    with pytest.raises(Error, match="not finite"):
        fitted(ZOO[name], values)


@whole
def test_inputs_are_untouched_and_strides_do_not_matter(name: str):
    grid, values = ZOO[name], normal(8, 6, seed=4)
    turned = values.t()
    before = values.clone()
    params = fitted(grid, turned)
    held_params = {key: value.clone() for key, value in params.items()}
    codes = grid.encode(turned, params)
    kept = codes.clone()
    made = grid.decode(codes, params)
    assert torch.equal(values, before)
    assert torch.equal(codes, kept)
    assert all(torch.equal(params[key], value) for key, value in held_params.items())
    straight = turned.contiguous()
    again = fitted(grid, straight)
    assert torch.equal(grid.decode(grid.encode(straight, again), again), made)


@whole
def test_a_shrunk_range_is_narrower(name: str):
    grid, values = ZOO[name], normal(4, 8, seed=5)
    if any(stored.shared and key in ("scale", "levels") for key, stored in grid.stored().items()):
        pytest.skip("one range for the whole tensor")
    span = [all_values(grid, fitted(grid, values, shrink=share), (4,)).abs().amax(-1) for share in (1.0, 0.5)]
    assert (span[1] < span[0]).all()
    each = fitted(grid, values, shrink=torch.tensor([1.0, 0.5, 1.0, 0.5]))
    mixed = all_values(grid, each, (4,)).abs().amax(-1)
    torch.testing.assert_close(mixed, torch.stack([span[0][0], span[1][1], span[0][2], span[1][3]]))


HEEDFUL = ("levels", "bitmod 3", "bitmod 4", "power group", "sign", "ternary", "ternary mean")
"""Those of the zoo whose groups are fitted by importance."""


@whole
def test_importance_is_heeded_or_changes_nothing(name: str):
    """Each group errs less by what it was told to heed; a scale of it does not matter, nor one group's to another's."""
    grid, values, heed = ZOO[name], normal(200, 8, seed=6), normal(200, 8, seed=7).pow(4)
    shared = grid.shared(values)
    plain, told = (grid.fit(values, shared, importance=one) for one in (None, heed))
    same = all(torch.equal(plain[key], told[key]) for key in plain)
    assert same == (name not in HEEDFUL)
    for key, value in grid.fit(values, shared, importance=torch.zeros(8)).items():
        assert torch.equal(value, plain[key])
    for key, value in grid.fit(values[:3], shared, importance=4 * heed[:3]).items():
        assert torch.equal(value, told[key][:3])
    if name in HEEDFUL and name != "ternary mean":  # which does not look at errors

        def error(params: Any) -> float:
            both = {**shared, **params}
            return float(((grid.decode(grid.encode(values, both), both) - values).square() * heed).sum())

        assert error(told) < error(plain)


@pytest.mark.parametrize(("grid", "name"), [(NvFloat4(8), "tensor_scale"), (MixedTypes(3, 8), "unit")])
def test_a_group_does_not_know_what_the_tensor_shares(grid: Grid, name: str):
    with pytest.raises(Error, match=f"needs the {name} of the whole tensor"):
        grid.fit(normal(2, 8))


@whole
def test_a_header_tells_of_it(name: str):
    grid = ZOO[name]
    assert restored(described(grid)) == grid


@whole
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_through_roundings_and_files(name: str, rounding: str, tmp_path: Path):
    grid = ZOO[name]
    weights = {"a.weight": normal(6, 16), "a.bias": normal(3), "b.weight": normal(4, 16, seed=1).to(torch.bfloat16)}
    inputs = normal(64, 16, seed=2)
    stats = {key: inputs.t() @ inputs for key in ("a.weight", "b.weight")} if rounding == "gptq" else None
    method: Any = getattr(ws.quantize, rounding)
    values = method(weights, stats=stats, grid=grid, action="values")
    method(weights, stats=stats, grid=grid).save(tmp_path / "x.safetensors")
    there = ws.quantize.dequantize(tmp_path / "x.safetensors", dtype="float32")
    assert torch.equal(there["a.weight"], values["a.weight"])
    assert torch.equal(there["b.weight"].to(torch.bfloat16), values["b.weight"])
    assert torch.equal(there["a.bias"], weights["a.bias"])
    if name != "int 1":  # which reaches as far as the largest value
        assert (there["a.weight"] - weights["a.weight"]).square().mean() < weights["a.weight"].square().mean()


@pytest.mark.parametrize("word", sorted({*GRIDS, *SHORT} - set(ALONE)))
def test_words(word: str):
    grid = named(word)
    assert isinstance(grid, Grid)
    assert restored(described(grid)) == grid
    assert quantized(normal(40), word).shape == (40,)


def test_words_that_there_are_not():
    with pytest.raises(Error, match="did you mean 'mxfp4'"):
        named("mxpf4")
    with pytest.raises(Error, match="has no symmetric"):
        named("nf4", symmetric=True)
    for given in ({"bits": 3}, {"scale_dtype": "float16"}):
        with pytest.raises(Error, match=f"whole as it is: say {next(iter(given))} in it"):
            named(Integer(), **given)
    assert named("mxfp8", element="e5m2") == Microscaling("e5m2")
    assert named("mxfp4", scale_dtype="bfloat16") == Microscaling("e2m1")  # its scales have one dtype


@pytest.mark.parametrize(
    "said",
    [
        {"grid": "no"},
        {"grid": "int", "bits": 99},
        {"grid": "int", "bits": "4"},
        {"grid": "int", "bits": True},
        {"grid": "int", "group": -1},
        {"grid": "int", "group": "8"},
        {"grid": "int", "group": 2.5},
        {"grid": "int", "span": "wide"},
        {"grid": "int", "zero": "none"},
        {"grid": "int", "scale_dtype": "int32"},
        {"grid": "int", "of": 3},
        {"grid": "int", "bits": [4]},
        {"grid": "mx", "element": "e9m9"},
        {"grid": "mx", "element": 3},
        {"grid": "mx", "scaling": "round"},
        {"grid": "float", "group": 0},
        {"grid": "float", "group": 4, "per_tensor": True},
        {"grid": "levels", "bits": 0},
        {"grid": "levels", "group": 4, "per_tensor": True},
        {"grid": "power", "exponent": 0.0},
        {"grid": "power", "exponent": "1"},
        {"grid": "power", "exponent": float("nan")},
        {"grid": "power", "each": "row"},
        {"grid": "power", "bits": 1},
        {"grid": "bitmod", "bits": 5},
        {"grid": "ternary", "scale": "most"},
        {"grid": "two_four", "share": 2},
        {"grid": "two_four", "share": "x"},
        {"grid": "two_four", "multiple": 0},
        {"grid": "billm", "group": 0},
        {"grid": "nvfp4", "group": 0},
        {"grid": "sign", "group": 0},
        {"grid": "nf4", "scale_dtype": "int8"},
        {"grid": "nf4", "scale_dtype": "no such"},
        {"grid": "nf4", "scale_dtype": 4},
    ],
)
def test_headers_are_not_trusted(said: dict[str, Any]):
    with pytest.raises(FormatError):
        restored(said)


def test_nearest_by_hand():
    values, levels = normal(7, 40), normal(7, 5, seed=1).sort(-1).values
    expected = []
    for row, points in zip(values.tolist(), levels.tolist(), strict=True):
        expected.append([min(range(5), key=lambda k, v=v, points=points: abs(v - points[k])) for v in row])
    assert nearest(values, levels).tolist() == expected
    assert looked_up(nearest(values, levels), levels)[2, 3] == levels[2, expected[2][3]]
    one = levels[0]
    assert torch.equal(nearest(values, one), nearest(values, one.expand(7, -1)))
    assert torch.equal(looked_up(nearest(values, one), one), looked_up(nearest(values, one), one.expand(7, -1)))


def test_steps_are_as_they_are_stored():
    steps = torch.tensor([0.1, 0.0, 3.0])
    assert stepped(steps, torch.bfloat16).tolist() == [torch.tensor(0.1).bfloat16().item(), 1.0, 3.0]
    assert held(torch.tensor([0.0]), torch.float16, "magnitudes").item() == 0
    with pytest.raises(Error, match="too large for a scale in float16"):
        stepped(torch.tensor([1e6]), torch.float16)


@pytest.mark.parametrize("bits", [0, 9, 2.0, True, "4"])
def test_bits_that_there_are_not(bits: Any):
    with pytest.raises(Error, match="from 1 to 8"):
        check_bits(bits)


@pytest.mark.parametrize("group", [0, -1, 2.0, True, "4"])
def test_groups_that_there_are_not(group: Any):
    with pytest.raises(Error, match="1 or more inputs"):
        check_group(group)


def test_experts_share_nothing_that_is_found_one_by_one():
    weights, inputs = {"mlp.experts.up": normal(2, 4, 16)}, normal(2, 40, 16)
    stats = {"mlp.experts.up": inputs.transpose(1, 2) @ inputs}
    for grid in (NvFloat4(16), MixedTypes(3, 16)):
        with pytest.raises(Error, match="for the whole tensor"):
            ws.quantize.gptq(weights, stats=stats, grid=grid, pattern="*", action="values")["mlp.experts.up"]
    made = ws.quantize.gptq(weights, stats=stats, grid=Microscaling("e2m1"), indivisible="ragged", pattern="*")
    values = ws.quantize.dequantize(made)["mlp.experts.up"]
    assert values.shape == (2, 4, 16)
    assert (values - weights["mlp.experts.up"]).abs().mean() < 0.3
    plain = ws.quantize.rtn(weights, grid=NvFloat4(16), pattern="*")
    assert ws.quantize.dequantize(plain)["mlp.experts.up"].shape == (2, 4, 16)
