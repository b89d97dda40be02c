"""BiLLM against exhaustive searches and a loop over columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import output_error
from weightsmith.quantize._billm import billm, residual, salient_columns, split
from weightsmith.quantize.grids import Integer, Residual, Sign


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int, seed: int = 5) -> Tensor:
    mixed = normal(200, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1) / inputs**0.5
    return mixed.t() @ mixed


def test_the_split_is_the_best_of_all():
    for seed in range(20):
        row = normal(11, seed=seed)
        size = row.abs()
        least, best = float("inf"), None
        for point in size.tolist():  # every way to cut
            low, high = size[size <= point], size[size > point]
            if len(high):
                error = float((low - low.mean()).square().sum() + (high - high.mean()).square().sum())
                if error < least:
                    least, best = error, (float(low.mean()), float(high.mean()))
        assert split(row.unsqueeze(0))[0].tolist() == pytest.approx(best)


def test_the_split_of_few_and_of_equal_weights():
    assert split(torch.zeros(2, 0)).tolist() == [[0, 0], [0, 0]]
    assert split(torch.tensor([[-3.0]])).tolist() == [[3, 3]]
    assert split(torch.full((1, 4), -2.0)).tolist() == [[2, 2]]


def test_the_residual_is_binarized_twice():
    weight = normal(6, 9)
    for row, pair in zip(weight, residual(weight), strict=True):
        first = row.abs().mean()
        rest = row - first * row.sign()
        second = rest.abs().mean()
        twice = first * row.sign() + second * rest.sign()
        assert sorted({round(float(value), 5) for value in twice.abs()}) == pytest.approx(pair.tolist(), abs=1e-5)


def test_salient_columns_against_a_search():
    for seed in range(10):
        weight, spread = normal(7, 12, seed=seed), normal(12, seed=seed + 50).square() + 0.1
        weight[:, seed % 12] *= 4
        score = (weight.square() / spread.square()).sum(0)
        order = score.argsort(descending=True).tolist()
        least, best = float("inf"), 0
        for count in range(1, 9):
            error = 0.0
            for columns in (order[:count], order[count:]):
                part = weight[:, columns]
                error += float((part.abs() - part.abs().mean(1, keepdim=True)).square().sum())
            if error < least:
                least, best = error, count
        assert salient_columns(weight, spread, 8).nonzero().flatten().tolist() == sorted(order[:best])
        assert not salient_columns(weight, spread, 0).any()


@pytest.mark.parametrize("group", [8, None, 7])
def test_against_a_loop_over_columns(group: int | None):
    weight, gram = normal(5, 20), gram_of(20)
    steady = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(20)
    inverse = torch.linalg.inv(steady)
    factor = torch.linalg.cholesky(inverse, upper=True)
    now, expected, salient = weight.double().clone(), torch.empty(5, 20).double(), []
    for start in range(0, 20, group or 20):
        stop = min(start + (group or 20), 20)
        piece = now[:, start:stop].clone()
        mask = salient_columns(piece, inverse.diagonal()[start:stop], 50)
        salient += mask.tolist()
        sizes = torch.stack([split(piece[:, ~mask]), residual(piece[:, mask])], 1)  # [rows, 2, 2]
        for j in range(start, stop):
            pair = sizes[:, int(mask[j - start])]
            points = torch.cat([pair, -pair], 1)
            nearest = (points - now[:, j : j + 1]).abs().argmin(1, keepdim=True)
            expected[:, j] = points.gather(1, nearest).squeeze(1)
            error = (now[:, j] - expected[:, j]) / factor[j, j]
            now[:, j + 1 :] -= error.unsqueeze(1) * factor[j, j + 1 :]
    found = billm(weight, gram, grid=Residual(group))
    assert found.shared["salient"].tolist() == [int(one) for one in salient]
    torch.testing.assert_close(found.values().double(), expected, rtol=1e-4, atol=1e-4)


def test_less_error_than_one_bit_column_by_column_and_than_signs():
    weight, gram = normal(32, 128), gram_of(128)
    weight[:, 7] *= 5
    own = billm(weight, gram).values()
    one = ws.quantize.gptq.kernel(weight, gram, grid=Sign(128)).values()
    signs = ws.quantize.rtn.kernel(weight, grid=Sign(128)).values()
    errors = [float(output_error(weight, made, gram)) for made in (own, one, signs)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize("form", ["blocks", "diagonal"])
def test_other_forms_of_the_gram_matrix(form: str):
    weight, gram = normal(4, 16), gram_of(16)
    blocks = torch.stack([gram[:8, :8], gram[8:, 8:]])
    told = blocks if form == "blocks" else gram.diagonal()
    whole = torch.block_diag(*blocks) if form == "blocks" else torch.diag(gram.diagonal())
    assert torch.equal(billm(weight, told).values(), billm(weight, whole).values())


def test_dead_inputs_zeros_and_nothing():
    weight, gram = normal(4, 16), gram_of(16)
    gram[3], gram[:, 3] = 0, 0
    assert billm(weight, gram).values().isfinite().all()
    assert billm(weight, torch.zeros(16, 16)).values().isfinite().all()
    assert not billm(torch.zeros(4, 16), gram).values().any()
    assert billm(torch.zeros(0, 16), gram).values().shape == (0, 16)
    assert billm(torch.zeros(3, 0), torch.zeros(0, 0)).values().shape == (3, 0)
    assert billm(weight[:, :1], gram[:1, :1]).values().shape == (4, 1)


def test_refusals():
    weight, gram = normal(4, 16), gram_of(16)
    with pytest.raises(Error, match="its own points alone"):
        billm(weight, gram, grid=Integer())
    with pytest.raises(Error, match="number of columns"):
        billm(weight, gram, salient=-1)
    with pytest.raises(Error, match="16 inputs"):
        billm(weight, gram[:8, :8])
    with pytest.raises(Error, match="its own points alone"):
        ws.quantize.billm({"a.weight": weight}, stats={"a.weight": gram}, grid="int")
    with pytest.raises(Error, match=r"use quantize\.billm"):
        ws.quantize.rtn({"a.weight": weight}, grid="billm")


def test_through_files_and_blocks(tmp_path: Path):
    weight, gram = normal(16, 256), gram_of(256)
    made = ws.quantize.billm({"a.weight": weight}, stats={"a.weight": gram}, scale_dtype="float16")
    values = ws.quantize.billm({"a.weight": weight}, stats={"a.weight": gram}, scale_dtype="float16", action="values")
    made.save(tmp_path / "x.safetensors")
    there = ws.open(tmp_path / "x.safetensors")
    torch.testing.assert_close(ws.quantize.dequantize(there, dtype="float32")["a.weight"], values["a.weight"])
    bits = 8 * sum(there[name].nbytes for name in there if "shape" not in name and "salient" not in name)
    assert bits / weight.numel() == 2.5
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    coded = ws.quantize.sequential(net, [normal(50, 16)], "billm", group=16)
    assert ws.quantize.dequantize(coded)["2.weight"].unique().numel() <= 4 * 8
