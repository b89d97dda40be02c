"""Codes one at a time and parameters in closed form: neither ever makes the error larger."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize._coded import Coded, coded, fitted, output_error
from weightsmith.quantize._descent import coordinate_descent, lnq, refitted, row_errors, swept
from weightsmith.quantize._gptq import gptq
from weightsmith.quantize.grids import GRIDS, Grid, Integer, Levels
from weightsmith.solve import steadied

PLAIN = sorted(set(GRIDS) - {"billm", "two_four"})  # these two are fitted to inputs, by roundings of their own
WIDE = torch.float64


def problem(rows: int = 6, inputs: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) + torch.eye(inputs)
    data = torch.randn(4 * inputs, inputs, generator=generator) @ mixing
    return torch.randn(rows, inputs, generator=generator), data.T @ data


def start(weight: Tensor, grid: Grid) -> Coded:
    return coded(weight, grid, fitted(weight, grid))


def by_hand(weight: Tensor, gram: Tensor, found: Coded) -> Tensor:
    """One sweep over all points of each weight, the error computed anew for each."""
    grid, codes = found.grid, found.codes.clone()
    size = grid.group or weight.shape[1]
    points = 2**grid.bits
    for row, column in itertools.product(range(len(weight)), range(weight.shape[1])):
        tried = []
        for code in (int(codes[row, column]), *range(points)):
            codes[row, column] = code
            params = {name: value[row : row + 1] for name, value in found.params.items()}
            values = Coded(codes[row : row + 1], params, grid).values().to(gram.dtype)
            tried.append((round(float(output_error(weight[row : row + 1], values, gram)), 9), code))
        least = min(error for error, _ in tried)
        codes[row, column] = next(code for error, code in tried if error == least)
    assert size
    return codes


@pytest.mark.parametrize("grid", [Integer(bits=2, group=4), Integer(bits=2, symmetric=False), Levels(bits=2)])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_a_sweep_is_the_best_code_of_each_weight_in_turn(grid: Grid, block: int):
    weight, gram = (one.to(WIDE) for one in problem(rows=4, inputs=8))
    found = start(weight, grid)
    made = swept(weight, gram, found, block=block)
    assert torch.equal(made.codes, by_hand(weight, gram, found))
    assert not torch.equal(made.codes, found.codes)


@pytest.mark.parametrize("word", PLAIN)
def test_the_error_never_rises_on_any_grid(word: str):
    grid = GRIDS[word]()
    weight, gram = problem(inputs=2 * (grid.group or 24))
    found = start(weight, grid)
    errors = [row_errors(weight, gram, found.values())]
    for turn in range(6):
        found = swept(weight, gram, found) if turn % 2 == 0 else refitted(weight, gram, found)
        errors.append(row_errors(weight, gram, found.values()))
    for one, other in itertools.pairwise(errors):
        assert (other <= one * (1 + 1e-5)).all()
    assert errors[-1].sum() < 0.8 * errors[0].sum()


def test_where_no_code_can_be_changed_nothing_is():
    weight, gram = problem()
    found = start(weight, Integer(bits=3))
    for _ in range(50):
        before, found = found, swept(weight, gram, found)
        if torch.equal(before.codes, found.codes):
            break
    else:
        raise AssertionError("it goes on forever")
    again = coordinate_descent(weight, gram, grid=Integer(bits=3), codes_from="nearest", sweeps=50, damp=0, clip=0)
    assert torch.equal(again.codes, found.codes)


def least_squares(weight: Tensor, gram: Tensor, found: Coded, basis: Tensor) -> Tensor:
    """The best values of a row, of those that a basis ``[in, k]`` makes."""
    solved = torch.linalg.lstsq(basis.T @ gram @ basis, basis.T @ gram @ weight, driver="gelsd").solution
    return basis @ solved


@pytest.mark.parametrize("grid", [
    Integer(bits=3, group=5, scale_dtype=WIDE), Integer(bits=3, symmetric=False, scale_dtype=WIDE),
    Integer(bits=3, group=4, symmetric=False, zero="float", scale_dtype=WIDE), Levels(bits=2, scale_dtype=WIDE),
    Levels(bits=2, group=8, scale_dtype=WIDE),
])  # fmt: skip
def test_parameters_are_the_least_squares_solution(grid: Any):
    weight, gram = (one.to(WIDE) for one in problem(rows=5, inputs=16))
    found = start(weight, grid)
    made = refitted(weight, gram, found)
    size = grid.group or 16
    for row in range(5):
        columns = []
        for begin in range(0, 16, size):
            inside = torch.zeros(16, dtype=WIDE)
            inside[begin : begin + size] = 1
            codes = found.codes[row].to(WIDE)
            if "levels" in found.params:
                columns += [inside * (codes == level) for level in range(2**grid.bits)]
            else:
                zero = found.params["zero_point"][row, begin // size] if "zero_point" in found.params else grid.middle
                columns.append(inside * (codes - (0 if "minimum" in found.params else zero)))
                columns += [inside] if "minimum" in found.params else []
        expected = least_squares(weight[row], gram, found, torch.stack(columns, 1))
        torch.testing.assert_close(made.values()[row], expected, rtol=1e-4, atol=1e-5)
    assert row_errors(weight, gram, made.values()).sum() < row_errors(weight, gram, found.values()).sum()


def test_levels_stay_sorted_and_those_without_weights_stay():
    weight = torch.tensor([[0.0, 0.1, 5.0, 5.1]])
    levels = torch.tensor([[[-9.0, 0.3, 4.0, 9.0]]])
    codes = torch.tensor([[2, 2, 1, 1]], dtype=torch.uint8)  # on the wrong sides of one another
    made = refitted(weight, torch.eye(4), Coded(codes, {"levels": levels}, Levels(bits=2)))
    torch.testing.assert_close(made.values(), torch.tensor([[0.05, 0.05, 5.05, 5.05]]))
    torch.testing.assert_close(made.params["levels"][0, 0], torch.tensor([-9.0, 0.05, 5.05, 9.0]))
    assert made.codes.tolist() == [[1, 1, 2, 2]]


def test_codes_follow_their_levels_round_a_circle():
    weight = torch.tensor([[9.0, 1.0, 5.0]])
    levels = torch.tensor([[[0.0, 6.0, 8.0, 10.0]]])
    codes = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    made = refitted(weight, torch.eye(3), Coded(codes, {"levels": levels}, Levels(bits=2)))
    torch.testing.assert_close(made.params["levels"][0, 0], torch.tensor([1.0, 5.0, 9.0, 10.0]))
    assert made.codes.tolist() == [[2, 0, 1]]


def test_a_row_keeps_its_steps_where_those_solved_for_are_worse_as_they_are_stored():
    weight, gram = problem(rows=200, inputs=16)
    found = start(weight, Integer(bits=4, group=4, scale_dtype=torch.float8_e5m2))
    made = refitted(weight, gram, found)
    before, after = row_errors(weight, gram, found.values()), row_errors(weight, gram, made.values())
    assert (after <= before).all()
    kept = (made.params["scale"] == found.params["scale"]).all(1)
    assert 0 < kept.sum() < 200


def test_stored_parameters_are_what_codes_are_decoded_with():
    weight, gram = problem(rows=30, inputs=32)
    for grid in (Integer(bits=3, group=8, scale_dtype=torch.bfloat16), Levels(bits=3, scale_dtype=torch.float16)):
        found = coordinate_descent(weight, gram, grid=grid, refit=True) if isinstance(grid, Integer) else lnq(
            weight, gram, grid=grid
        )  # fmt: skip
        name = "scale" if isinstance(grid, Integer) else "levels"
        assert torch.equal(found.params[name], found.params[name].to(grid.scale_dtype).float())
        before = gptq(weight, gram, grid=grid)
        assert output_error(weight, found.values(), gram) < output_error(weight, before.values(), gram)


def test_a_shared_step_is_not_moved():
    weight, gram = problem()
    grid = Integer(bits=3, per_tensor=True)
    found = coordinate_descent(weight, gram, grid=grid, refit=True)
    assert torch.equal(found.shared["scale"], grid.shared(weight)["scale"])
    assert found.params == {}


def test_it_begins_with_the_codes_that_are_asked_for():
    weight, gram = problem()
    grid = Integer(bits=3, group=4, symmetric=False)
    none = coordinate_descent(weight, gram, grid=grid, sweeps=0)
    assert torch.equal(none.codes, gptq(weight, gram, grid=grid).codes)
    none = coordinate_descent(weight, gram, grid=grid, sweeps=0, codes_from="nearest", clip=3)
    assert torch.equal(none.codes, coded(weight, grid, fitted(weight, grid, gram, clip=3)).codes)


def test_descent_is_measured_with_the_steadied_gram_matrix():
    weight, gram = problem()
    grid = Integer(bits=2)
    found = coordinate_descent(weight, gram, grid=grid, damp=0.3, shrink=0.2, sweeps=1, codes_from="nearest", clip=0)
    matrix = steadied(gram, damp=0.3, shrink=0.2).float()
    assert torch.equal(found.codes, swept(weight, matrix, start(weight, grid)).codes)
    assert not torch.equal(found.codes, swept(weight, gram, start(weight, grid)).codes)


def test_lnq_is_better_than_its_parts():
    weight, gram = problem(rows=40, inputs=64, seed=1)
    grid = Levels(bits=3)
    errors = [
        float(output_error(weight, found.values(), gram))
        for found in (
            start(weight, grid),
            gptq(weight, gram, grid=grid),
            lnq(weight, gram, grid=grid, turns=1, sweeps=1),
            lnq(weight, gram, grid=grid),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[1]
    nearest = lnq(weight, gram, grid=grid, codes_from="nearest")
    assert float(output_error(weight, nearest.values(), gram)) < 0.8 * errors[1]


def test_lnq_of_four_weights_is_at_least_k_means():
    """With the unit matrix the objective is that of k-means, whose centres are already still."""
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    grid = Levels(bits=2)
    found = lnq(weight, torch.eye(12), grid=grid, damp=0, codes_from="nearest")
    torch.testing.assert_close(found.values(), start(weight, grid).values(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [coordinate_descent, lnq])
def test_forms_of_gram_matrices(method: Any):
    weight, gram = problem(rows=4, inputs=8)
    grid = Integer(bits=3) if method is coordinate_descent else Levels(bits=2)
    blocks = torch.stack([gram[:4, :4], gram[4:, 4:]])
    assert torch.equal(method(weight, blocks, grid=grid).codes,
                       method(weight, torch.block_diag(*blocks), grid=grid).codes)  # fmt: skip
    diagonal = gram.diagonal()
    assert torch.equal(method(weight, diagonal, grid=grid).codes, method(weight, diagonal.diag(), grid=grid).codes)
    runs = method(weight, torch.stack([gram, torch.eye(8)]), grid=grid)
    assert torch.equal(runs.codes[:2], method(weight[:2], gram, grid=grid).codes)
    assert torch.equal(runs.codes[2:], method(weight[2:], torch.eye(8), grid=grid).codes)


@pytest.mark.parametrize("method", [coordinate_descent, lnq])
@pytest.mark.parametrize("grid", [Integer(bits=3, group=3), Levels(bits=2, group=3)])
def test_edges(method: Any, grid: Grid):
    for shape in ((0, 4), (3, 0), (1, 1), (2, 7)):
        found = method(torch.ones(shape), torch.eye(shape[1]), grid=grid)
        assert found.codes.shape == shape
        assert found.values().isfinite().all()
    weight, gram = problem()
    gram[3], gram[:, 3] = 0, 0
    for given in (gram, torch.zeros(16, 16), torch.ones(16, 16)):
        found = method(weight.bfloat16(), given, grid=grid, damp=0)
        assert found.values().isfinite().all()
    before = weight.clone()
    method(weight, gram, grid=grid)
    assert torch.equal(weight, before)


def test_refusals():
    weight, gram = problem()
    with pytest.raises(Error, match="codes_from is 'gptq' or 'nearest', got 'x'"):
        coordinate_descent(weight, gram, codes_from="x")  # type: ignore[arg-type]
    with pytest.raises(Error, match="codes_from is"):
        lnq(weight, gram, codes_from="x")  # type: ignore[arg-type]
    with pytest.raises(Error, match="sweeps is a whole number from 0, got -1"):
        coordinate_descent(weight, gram, sweeps=-1)
    with pytest.raises(Error, match=r"turns is a whole number from 0, got 0\.5"):
        lnq(weight, gram, turns=0.5)  # type: ignore[arg-type]
    with pytest.raises(Error, match="needs a Gram matrix"):
        lnq(weight, torch.eye(3))


@pytest.mark.parametrize("seed", [4, 7, 12, 14, 16, 17])
def test_it_ends_only_where_codes_and_steps_both_stay(seed: int):
    """Steps that are solved for codes that have not changed are others than before, and new again the next time."""
    weight, gram = problem(rows=1, inputs=8, seed=seed)
    found = coordinate_descent(
        weight, gram, grid=Integer(2, group=4), sweeps=100, refit=True, damp=0, codes_from="nearest"
    )
    again = refitted(weight, gram, swept(weight, gram, found))
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.params["scale"], found.params["scale"])
