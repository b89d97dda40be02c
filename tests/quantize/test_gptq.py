"""Column by column, against a loop in numpy, all roundings there are, and simpler methods."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith import native
from weightsmith.errors import Error
from weightsmith.quantize import _gptq, _rtn
from weightsmith.quantize._coded import output_error
from weightsmith.quantize._gptq import column_by_column, factored, gptq, shared_factor
from weightsmith.quantize.grids import GRIDS, Integer, Levels
from weightsmith.solve import steadied

PLAIN = sorted(set(GRIDS) - {"billm", "two_four"})  # these two are fitted to inputs, by roundings of their own
PAPER: dict[str, Any] = {"damp": 0.01, "clip": 0, "order": "given"}


def problem(rows: int = 5, inputs: int = 16, seed: int = 0, **given: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) + torch.eye(inputs)
    data = torch.randn(4 * inputs, inputs, generator=generator) @ mixing
    return torch.randn(rows, inputs, generator=generator).to(**given), (data.T @ data).to(**given)


def by_hand(
    weight: Tensor, gram: Tensor, bits: int, group: int, damp: float, order: list[int], static: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps of an affine grid, with the inverse taken anew for the columns that are left."""
    left = weight.double().numpy().copy()
    matrix = gram.double().numpy() + damp * np.trace(gram.double().numpy()) / len(gram) * np.eye(len(gram))
    rows, inputs = left.shape
    codes, values = np.zeros((rows, inputs), int), np.zeros((rows, inputs))
    groups = -(-inputs // group)
    steps, zeros = np.zeros((rows, groups)), np.zeros((rows, groups))
    most = 2**bits - 1

    def fit(number: int) -> None:
        own = left[:, number * group : (number + 1) * group].astype(np.float32)
        low, high = np.minimum(own.min(1), 0), np.maximum(own.max(1), 0)
        steps[:, number] = (high - low) / np.float32(most)
        zeros[:, number] = np.round(-low / steps[:, number].astype(np.float32))

    if static:
        for number in range(groups):
            fit(number)
    for turn, column in enumerate(order):
        number = column // group
        if not static and column % group == 0:
            fit(number)
        step, zero = steps[:, number], zeros[:, number]
        codes[:, column] = np.clip(np.round(left[:, column] / step) + zero, 0, most)
        values[:, column] = (codes[:, column] - zero) * step
        error = left[:, column] - values[:, column]
        free = order[turn:]  # this column and those after it
        inverse = np.linalg.inv(matrix[np.ix_(free, free)])
        left[:, free] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes, values


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("inputs", "group"), [(16, 16), (16, 4), (80, 40), (15, 4), (5, 8)])
@pytest.mark.parametrize("block", [128, 8, 1])
def test_the_formula(bits: int, inputs: int, group: int, block: int):
    weight, gram = problem(inputs=inputs, seed=bits)
    grid = Integer(bits=bits, group=group, symmetric=False)
    found = gptq(weight, gram, grid=grid, damp=0.02, clip=0, block=block, order="given")
    codes, values = by_hand(weight, gram, bits, group, 0.02, list(range(inputs)))
    assert found.codes.dtype == torch.uint8
    # A value in the middle of two codes may fall to either side; the rest of its row then differs too.
    same = (found.codes.numpy() == codes).all(1)
    assert same.mean() > 0.7
    np.testing.assert_allclose(found.values().numpy()[same], values[same], rtol=1e-4, atol=1e-5)


def test_the_formula_in_the_order_of_activations():
    weight, gram = problem(inputs=12, dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    grid = Integer(bits=3, group=4, symmetric=False, scale_dtype=torch.float64)
    found = gptq(weight, gram, grid=grid, damp=0.05, clip=0)
    codes, values = by_hand(weight, gram, 3, 4, 0.05, order, static=True)
    assert (found.codes.numpy() == codes).all()  # groups are runs of neighbours, and columns are where they were
    np.testing.assert_allclose(found.values().numpy(), values, rtol=1e-6)


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("word", PLAIN)
def test_with_a_diagonal_gram_matrix_it_is_rounding_to_nearest_on_every_grid(word: str, order: Any):
    grid = GRIDS[word]()
    inputs = 2 * (grid.group or 16)
    weight = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1))
    diagonal = torch.rand(inputs, generator=torch.Generator().manual_seed(2)) + 0.1
    expected = _rtn.rtn(weight, grid=grid)
    for gram in (diagonal, torch.diag(diagonal)):
        found = gptq(weight, gram, grid=grid, order=order, clip=0)
        torch.testing.assert_close(found.values(), expected.values())


@pytest.mark.parametrize("word", PLAIN)
def test_on_every_grid_outputs_are_nearer_than_with_the_nearest_codes(word: str):
    grid = GRIDS[word]()
    weight, gram = problem(rows=24, inputs=2 * (grid.group or 24))
    nearest = output_error(weight, _rtn.rtn(weight, grid=grid).values(), gram)
    found = gptq(weight, gram, grid=grid, static=True, **PAPER)
    assert found.codes.shape == weight.shape
    assert found.values().isfinite().all()
    assert output_error(weight, found.values(), gram) < 0.95 * nearest


def test_no_rounding_of_few_weights_is_much_better():
    """All 4^5 roundings of each row, on its own grid: the best is never missed by far, and nearest is far worse."""
    weight, gram = problem(rows=20, inputs=5, seed=3)
    grid = Integer(bits=2)
    found = gptq(weight, gram, grid=grid, damp=0, clip=0)
    every = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.uint8)
    excess = {"gptq": [], "nearest": []}
    nearest = _rtn.rtn(weight, grid=grid).values()
    for row in range(len(weight)):
        params = {name: value[row].expand(len(every), 1) for name, value in found.params.items()}
        values = grid.decode(every[:, None], params)[:, 0]
        apart = values - weight[row]
        least = ((apart @ gram) * apart).sum(1).min()
        for name, own in (("gptq", found.values()[row]), ("nearest", nearest[row])):
            error = output_error(weight[row, None], own[None], gram)
            assert error >= least * (1 - 1e-4)
            excess[name].append(float(error / least))
    assert np.median(excess["gptq"]) < 1.5
    assert np.mean(np.log(excess["gptq"])) < 0.6 * np.mean(np.log(excess["nearest"]))


@pytest.mark.parametrize("grid", [
    Integer(bits=3, group=8), Integer(bits=2, span="signed"), Integer(bits=3, span="narrow"),
    Integer(bits=4, group=8, symmetric=False), Integer(bits=3, group=8, symmetric=False, zero="float"),
    Integer(bits=3, per_tensor=True), Integer(bits=1), Integer(bits=8, symmetric=False, per_tensor=True),
])  # fmt: skip
@pytest.mark.parametrize("options", [{"clip": 0}, {"order": "activation"}, {"static": True}, {"clip": 3}])
def test_the_few_large_steps_of_integers_are_the_many_small_ones(grid: Integer, options: Any, monkeypatch):
    weight, gram = problem(rows=30, inputs=48)

    class Other(Integer):  # what is no Integer itself goes the general way
        pass

    general = Other(**{name: getattr(grid, name) for name in grid.__dataclass_fields__})
    found, expected = gptq(weight, gram, grid=grid, **options), gptq(weight, gram, grid=general, **options)
    same = (found.codes == expected.codes).all(1)
    assert same.float().mean() > 0.8  # where a sum is rounded otherwise, a value in the middle may fall to either side
    torch.testing.assert_close(found.values()[same], expected.values()[same], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(native, "_library", lambda: None)
    plain = gptq(weight, gram, grid=grid, **options)
    assert torch.equal(found.codes, plain.codes)
    assert all(torch.equal(found.params[name], plain.params[name]) for name in plain.params)


def test_inputs_that_were_always_zero_reach_no_other():
    weight, gram = problem(inputs=8)
    gram[2], gram[:, 2] = 0, 0
    grid = Integer(bits=3)
    found = gptq(weight, gram, grid=grid, clip=0)
    keep = [0, 1, 3, 4, 5, 6, 7]
    own = {"shared": {}, "damp": 0.1, "order": "activation"}
    alone = column_by_column(weight[:, keep], gram[keep][:, keep], grid, found.params, **own)
    assert torch.equal(found.codes[:, keep], alone.codes)
    assert torch.equal(found.codes[:, 2], _rtn.rtn(weight, grid=grid).codes[:, 2])
    assert torch.equal(gptq(weight, torch.zeros(8, 8), grid=grid, clip=0).codes, _rtn.rtn(weight, grid=grid).codes)


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("word", ["int", "nf4", "ternary"])
def test_zeros_stay_zero_and_are_made_up_for(word: str, order: Any):
    weight, gram = problem(rows=64, inputs=64)
    grid = GRIDS[word]()
    pruned = weight.masked_fill(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5, 0)
    found = gptq(pruned, gram, grid=grid, order=order, zeros=True)
    free = gptq(pruned, gram, grid=grid, order=order)
    assert not found.values()[pruned == 0].any()
    assert free.values()[pruned == 0].any()
    cut = free.values().masked_fill(pruned == 0, 0)
    assert output_error(pruned, found.values(), gram).sum() < output_error(pruned, cut, gram).sum()
    same = gptq(weight, gram, grid=grid, order=order, zeros=True)
    torch.testing.assert_close(same.values(), gptq(weight, gram, grid=grid, order=order).values())


def test_zeros_column_by_column_by_hand():
    weight, gram = problem(rows=3, inputs=8, dtype=torch.float64)
    weight[:, ::3] = 0
    grid = Integer(3, scale_dtype=torch.float64)
    found = gptq(weight, gram, grid=grid, order="given", clip=0, damp=0.1, zeros=True)
    factor = factored(gram, damp=0.1, shrink=0.0, dtype=torch.float64)[0]
    left, step = weight.clone(), found.params["scale"][:, 0]
    for column in range(8):
        code = (left[:, column] / step).round().clamp(-4, 3) * (column % 3 > 0)
        torch.testing.assert_close(found.values()[:, column], code * step)
        left -= ((left[:, column] - code * step) / factor[column, column])[:, None] * factor[column]


def test_a_grid_without_a_zero_cannot_keep_zeros():
    weight, gram = problem(inputs=8)
    weight[0, 3] = 0
    with pytest.raises(Error, match="this grid has no code for zero"):
        gptq(weight, gram, grid=Integer(2, symmetric=False, zero="float"), zeros=True)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_a_singular_gram_matrix(damp: float):
    weight, _ = problem(inputs=24)
    data = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    gram = data.T @ data
    found = gptq(weight, gram, grid=Integer(bits=3, group=8), damp=damp, clip=0).values()
    assert found.isfinite().all()
    nearest = _rtn.rtn(weight, grid=Integer(bits=3, group=8)).values()
    assert output_error(weight, found, gram) < output_error(weight, nearest, gram)


def test_shrunk_to_its_diagonal_it_is_rounding_to_nearest():
    weight, gram = problem()
    grid = Integer(bits=3, group=4, symmetric=False)
    expected = _rtn.rtn(weight, grid=grid)
    assert torch.equal(gptq(weight, gram, grid=grid, shrink=1.0, clip=0).codes, expected.codes)
    assert torch.equal(gptq(weight, gram, grid=grid, damp=1e9, clip=0).codes, expected.codes)
    assert not torch.equal(gptq(weight, gram, grid=grid, clip=0).codes, expected.codes)


def test_blocks_are_matrices_of_their_own():
    weight, gram = problem(inputs=12)
    blocks = torch.stack([gram[:6, :6], gram[6:, 6:]])
    grid = Integer(bits=3, group=6)
    found = gptq(weight, blocks, grid=grid, damp=0, clip=4)
    for start, block in zip((0, 6), blocks, strict=True):
        alone = gptq(weight[:, start : start + 6], block, grid=grid, damp=0, clip=4)
        assert torch.equal(found.codes[:, start : start + 6], alone.codes)


def test_runs_of_rows_with_a_gram_matrix_each():
    weight, gram = problem(rows=6)
    other = problem(seed=5)[1]
    grid = Integer(bits=3, group=4)
    found = gptq(weight, torch.stack([gram, other]), grid=grid)
    for rows, own in ((slice(3), gram), (slice(3, 6), other)):
        alone = gptq(weight[rows], own, grid=grid)
        assert torch.equal(found.codes[rows], alone.codes)
        assert torch.equal(found.params["scale"][rows], alone.params["scale"])
    whole = Integer(bits=3, per_tensor=True)  # what the tensor shares is of all rows
    found = gptq(weight, torch.stack([gram, other]), grid=whole)
    assert torch.equal(found.shared["scale"], whole.shared(weight)["scale"])
    with pytest.raises(Error, match="5 rows cannot be cut into 2 runs"):
        gptq(weight[:5], torch.stack([gram, other]), grid=grid)


def test_ranges_are_narrowed_where_outputs_are_then_nearer():
    weight, gram = problem(rows=40, inputs=32)
    weight[:, 0] *= 6
    grid = Integer(bits=3, group=16, symmetric=False)
    plain, clipped = (gptq(weight, gram, grid=grid, clip=clip, static=True) for clip in (0, 8))
    assert (clipped.params["scale"] <= plain.params["scale"] * 1.0001).all()
    assert (clipped.params["scale"] < plain.params["scale"]).any()
    assert output_error(weight, clipped.values(), gram) < output_error(weight, plain.values(), gram)


@pytest.mark.parametrize("group", [4, 5, None])
@pytest.mark.parametrize("form", ["full", "blocks", "diagonal"])
def test_ranges_are_judged_by_the_diagonal_group_after_group(group: int | None, form: str):
    """The last group but one and the last (shorter) one are fitted to what their weights have become."""
    weight, gram = problem(inputs=12)
    weight[:, ::3] *= 3
    blocks = torch.stack([gram[i : i + 6, i : i + 6] for i in (0, 6)])
    given = {"full": gram, "blocks": blocks, "diagonal": gram.diagonal()}[form]
    matrix = {"full": gram, "blocks": torch.block_diag(*blocks), "diagonal": gram.diagonal().diag()}[form]
    grid = Integer(bits=3, group=group, symmetric=False)
    found = gptq(weight, given, grid=grid, damp=0.1, clip=5, order="given")
    factor = factored(matrix, damp=0.1, shrink=0.0)[0]
    size, present, errors = group or 12, weight.clone(), torch.zeros_like(weight)
    narrower = 0
    for number, start in enumerate(range(0, 12, size)):
        own = slice(start, min(start + size, 12))
        heed = matrix.diagonal()[own]
        for row in range(len(weight)):
            tried = []
            for step in range(6):
                params = grid.fit(present[row, own], shrink=1 - 0.5 * step / 5)
                apart = grid.decode(grid.encode(present[row, own], params), params) - present[row, own]
                tried.append((float(apart.square() @ heed), float(params["scale"])))
            assert float(found.params["scale"][row, number]) == pytest.approx(min(tried)[1], rel=1e-4)
            narrower += min(tried)[1] < tried[0][1]
        for column in range(start, own.stop):
            now = found.values()[:, column]
            errors[:, column] = (present[:, column] - now) / factor[column, column]
            present[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    assert narrower > 2


def test_the_defaults_hold_up_on_other_inputs():
    """More damping and narrower ranges: off the few rows that it saw, nearer than as in the paper, and than nearest."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator) * torch.logspace(0, -1, 48)
    seen, other = (torch.randn(count, 48, generator=generator) @ mixing.T for count in (64, 4000))
    weight = torch.randn(32, 48, generator=generator) ** 3  # with outliers
    grid = Integer(bits=3, group=16, symmetric=False)
    usual, paper = gptq(weight, seen.T @ seen, grid=grid), gptq(weight, seen.T @ seen, grid=grid, **PAPER)
    on_others = [float(output_error(weight, one.values(), other.T @ other)) for one in (usual, paper)]
    assert on_others[0] < 0.9 * on_others[1]
    assert torch.equal(usual.codes, gptq(weight, seen.T @ seen, grid=grid, damp=0.1, clip=8).codes)


def test_layers_that_share_a_gram_matrix_share_its_factor(monkeypatch):
    weight, gram = problem()
    made = []
    monkeypatch.setattr(_gptq, "inverse_factor", lambda matrix: made.append(1) or torch.linalg.cholesky(
        matrix.inverse(), upper=True
    ))  # fmt: skip
    alone = gptq(weight, gram)
    kept: dict[str, Any] = {}
    for _ in range(3):
        with shared_factor(kept):
            assert torch.equal(gptq(weight, gram).codes, alone.codes)
    assert len(made) == 2
    with shared_factor(kept):
        gptq(weight, gram, damp=0.5)  # other settings, another factor
        gptq(weight, gram.clone(), damp=0.5)  # another matrix
    assert len(made) == 4
    gptq(weight, gram)  # outside, nothing is kept
    gptq(weight, gram)
    assert len(made) == 6


def test_blocks_of_a_model_ask_for_one_factor_each(monkeypatch):
    made = []
    own = _gptq.inverse_factor
    monkeypatch.setattr(_gptq, "inverse_factor", lambda matrix: made.append(len(matrix)) or own(matrix))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x) * self.k(x))

    model = torch.nn.Sequential(Block(), Block())
    ws.quantize.sequential(model, [torch.randn(20, 4, generator=torch.Generator().manual_seed(0))], "gptq", bits=3)
    assert made == [2, 4, 4, 4, 4]  # the first is a try of the options


def test_the_factor():
    _, gram = problem(inputs=7)
    matrix = steadied(gram, damp=0.1, shrink=0.2)
    factor, places = factored(gram, damp=0.1, shrink=0.2, dtype=torch.float64)
    assert places is None
    torch.testing.assert_close(factor.T @ factor, matrix.inverse())
    factor, places = factored(gram, damp=0.1, shrink=0.2, order="activation", dtype=torch.float64)
    assert places is not None
    torch.testing.assert_close(factor.T @ factor, matrix[places][:, places].inverse())
    assert gram.diagonal()[places].diff().max() <= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype):
    weight, gram = problem()
    given = weight.to(dtype)
    found = gptq(given, gram, grid=Integer(bits=4, group=4))
    expected = gptq(given.float() if dtype != torch.float64 else given, gram, grid=Integer(bits=4, group=4))
    assert torch.equal(found.codes, expected.codes)
    assert found.values().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    turned = gptq(given.t().contiguous().t(), gram.t(), grid=Integer(bits=4, group=4))
    assert torch.equal(found.codes, turned.codes)
    assert torch.equal(given, weight.to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("grid", [Integer(bits=3), Integer(bits=3, group=2, symmetric=False), Levels(bits=2)])
def test_shapes_at_the_edge(shape: tuple[int, int], grid: Any):
    found = gptq(torch.ones(shape), torch.eye(shape[1]), grid=grid)
    assert found.codes.shape == shape
    assert found.values().shape == shape
    torch.testing.assert_close(found.values(), _rtn.rtn(torch.ones(shape), grid=grid, clip=8).values())


def test_refusals():
    weight, gram = problem()
    with pytest.raises(Error, match="order is 'given' or 'activation', got 'other'"):
        gptq(weight, gram, order="other")  # type: ignore[arg-type]
    with pytest.raises(Error, match=r"needs a Gram matrix \[in, in\].*got \[3, 3\]"):
        gptq(weight, torch.eye(3))
    with pytest.raises(Error, match="NaN"):
        gptq(weight, gram * torch.nan)
    with pytest.raises(Error, match="damp must be 0 or more"):
        gptq(weight, gram, damp=-1.0)
    for grid in (Integer(), Integer(group=4), Levels(bits=2)):
        with pytest.raises(Error, match="not finite"):
            gptq(weight.index_fill(1, torch.tensor([9]), torch.inf), gram, grid=grid)


def test_a_single_expert_is_the_matrix_that_it_is():
    weight, gram = problem()
    fused = gptq_of({"experts.up": weight[None]}, {"experts.up": gram[None]})
    assert torch.equal(fused["experts.up"][0], gptq_of({"up": weight}, {"up": gram})["up"])


def gptq_of(weights: dict[str, Tensor], stats: dict[str, Tensor]) -> ws.Weights:
    return ws.quantize.dequantize(ws.quantize.gptq(weights, stats=stats, bits=3, pattern="*"))
