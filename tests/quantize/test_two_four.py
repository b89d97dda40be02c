"""Two bits for most groups and four for the widest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import output_error
from weightsmith.quantize._two_four import fine_groups, two_four
from weightsmith.quantize.grids import Integer, TwoFour


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(rows: int, inputs: int, seed: int = 0) -> Tensor:
    return normal(rows, inputs, seed=seed) * (1 + 4 * (normal(rows, inputs, seed=seed + 1) > 2))


def gram_of(inputs: int) -> Tensor:
    mixed = normal(300, inputs, seed=5) @ normal(inputs, inputs, seed=6) / inputs**0.5
    return mixed.t() @ mixed


@pytest.mark.parametrize("inputs", [64, 60])
def test_the_widest_groups_by_hand(inputs: int):
    weight, gram = heavy(6, inputs), gram_of(inputs)
    for told, heed in ((None, torch.ones(inputs)), (gram, gram.diagonal()), (gram.diagonal(), gram.diagonal())):
        found = fine_groups(weight, 8, 3, told)
        for row, own in zip(weight, found, strict=True):
            scores = []
            for start in range(0, inputs, 8):
                run = row[start : start + 8]
                width = max(float(run.max()), 0) - min(float(run.min()), 0)
                scores.append(width**2 * float(heed[start : start + 8].sum()))
            best = sorted(range(len(scores)), key=lambda k: -scores[k])[:3]
            assert own.nonzero().flatten().tolist() == sorted(best)


def test_blocks_of_a_gram_matrix_count_by_their_diagonal():
    weight, gram = heavy(6, 64), gram_of(64)
    blocks = torch.stack([gram[start : start + 16, start : start + 16] for start in range(0, 64, 16)])
    assert torch.equal(fine_groups(weight, 8, 3, blocks), fine_groups(weight, 8, 3, gram))


@pytest.mark.parametrize("inputs", [64, 60])
def test_nearest_without_inputs_and_column_by_column_with_them(inputs: int):
    weight, grid = heavy(6, inputs), TwoFour(8, 0.25)
    plain = two_four(weight, grid=grid)
    alone = two_four(weight, torch.ones(inputs), grid=grid, damp=0.0)
    assert torch.equal(plain.codes, alone.codes)  # inputs that are not correlated make up for nothing
    for name, value in plain.params.items():
        assert torch.equal(value, alone.params[name])
    fine = plain.params["zero_point"] >= 16
    assert (fine.sum(1) == grid.count(inputs)).all()
    wide = fine.repeat_interleave(8, 1)[:, :inputs]
    assert plain.codes[~wide].max() <= 3 < plain.codes[wide].max()
    gram = gram_of(inputs)
    errors = [float(output_error(weight, made.values(), gram)) for made in (two_four(weight, gram, grid=grid), plain)]
    assert errors[0] < errors[1]


def test_against_a_loop_over_columns():
    weight, gram, grid = heavy(5, 24), gram_of(24), TwoFour(8, 0.34)
    steady = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(24)
    factor = torch.linalg.cholesky(torch.linalg.inv(steady), upper=True)
    found = two_four(weight, gram, grid=grid, order="given")
    zero = found.params["zero_point"].int()
    most, zero = torch.where(zero >= 16, 15, 3), zero % 16
    step = found.params["factor"].double() * found.shared["unit"].double()
    now = weight.double().clone()
    for j in range(24):
        g = j // 8
        code = torch.minimum((now[:, j] / step[:, g]).round() + zero[:, g], most[:, g]).clamp(min=0)
        assert torch.equal(found.codes[:, j].double(), code)
        error = (now[:, j] - (code - zero[:, g]) * step[:, g]) / factor[j, j]
        now[:, j + 1 :] -= error.unsqueeze(1) * factor[j, j + 1 :]


def test_options_of_the_loop_over_columns_reach_it():
    weight, gram, grid = heavy(6, 64), gram_of(64), TwoFour(8, 0.25)
    drawn = two_four(weight, gram, grid=grid, shrink=1.0)
    assert torch.equal(drawn.codes, two_four(weight, gram.diagonal(), grid=grid).codes)
    assert not torch.equal(drawn.codes, two_four(weight, gram, grid=grid).codes)
    assert not torch.equal(two_four(weight, gram, grid=grid, damp=9.0).codes, two_four(weight, gram, grid=grid).codes)
    with pytest.raises(Error, match="block=0"):
        two_four(weight, gram, grid=grid, block=0)


def test_wide_groups_are_worth_more_than_others():
    weight, gram, grid = heavy(64, 256), gram_of(256), TwoFour(16, 0.125)
    own = two_four(weight, gram, grid=grid).values()
    fine = torch.rand(64, 16, generator=torch.Generator().manual_seed(3)).argsort(1) < 2
    runs = weight.unflatten(1, (16, 16))
    params, shared = grid.ranges(runs, fine)
    other = grid.decode(grid.encode(runs, {**shared, **params}), {**shared, **params}).flatten(1)
    nearest = two_four(weight, grid=grid).values()
    errors = [float(output_error(weight, made, gram)) for made in (own, nearest, other)]
    assert errors[0] < errors[1] < 0.9 * errors[2]


def test_edges():
    gram = gram_of(16)
    for shape in ((0, 16), (3, 16)):
        assert two_four(torch.zeros(shape), gram).values().shape == shape
    assert not two_four(torch.zeros(3, 16), gram).values().any()
    assert two_four(torch.zeros(3, 0)).values().shape == (3, 0)
    assert two_four(normal(3, 16), torch.zeros(16, 16)).values().isfinite().all()
    with pytest.raises(Error, match="two and four bits alone"):
        two_four(normal(3, 16), grid=Integer())
    bad = normal(3, 16)
    bad[1, 1] = float("nan")
    with pytest.raises(Error, match="not finite"):
        two_four(bad)


def test_through_files_and_blocks(tmp_path: Path):
    weight, gram = heavy(8, 256), gram_of(256)
    grid = TwoFour(32, 0.125)
    for stats in (None, {"a.weight": gram}):
        coded = ws.quantize.two_four({"a.weight": weight}, stats=stats, grid=grid)
        values = ws.quantize.two_four({"a.weight": weight}, stats=stats, grid=grid, action="values")
        coded.save(tmp_path / "x.safetensors", overwrite=True)
        there = ws.open(tmp_path / "x.safetensors")
        assert torch.equal(ws.quantize.dequantize(there, dtype="float32")["a.weight"], values["a.weight"])
        assert there["a.weight_packed"].nbytes * 8 / weight.numel() == 2.25
    first = torch.nn.Linear(16, 16)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(16, 4))
    made = ws.quantize.sequential(net, [normal(50, 16)], "two_four", group=4)
    assert (ws.quantize.dequantize(made)["0.weight"] - first.weight).abs().max() < 0.3
