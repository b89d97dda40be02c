"""A matrix on a grid: groups, ranges by the error of outputs, and the way back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize._coded import (
    NARROWEST,
    Coded,
    by_rows,
    checked_matrix,
    coded,
    fitted,
    gram_runs,
    group_count,
    joined,
    output_error,
    parts_by_gram,
    run_errors,
    runs_of,
    spans,
)
from weightsmith.quantize.grids import GRIDS, Integer, Levels

PLAIN = sorted(set(GRIDS) - {"billm", "two_four"})  # these two are fitted to inputs, by roundings of their own


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("inputs", "group", "count"), [(8, 4, 2), (9, 4, 3), (3, 4, 1), (8, None, 1), (0, 4, 1)])
def test_groups(inputs: int, group: int | None, count: int):
    assert group_count(inputs, group) == count
    ends = list(spans(inputs, group))
    assert len(ends) == count
    assert ends[0][0] == 0
    assert ends[-1][1] == inputs
    assert all(one[1] == two[0] for one, two in itertools.pairwise(ends))
    matrix = torch.arange(2.0 * inputs).view(2, inputs)
    runs = runs_of(matrix, group)
    assert torch.equal(torch.cat([run.flatten(1) for run in runs], 1), matrix)
    assert sum(run.shape[1] for run in runs) == count


@pytest.mark.parametrize("word", PLAIN)
@pytest.mark.parametrize("rest", [0, 3])
def test_each_group_is_coded_as_if_it_were_alone(word: str, rest: int):
    grid = GRIDS[word]()
    size = grid.group or 8
    weight = some(3, 2 * size + rest if grid.group else size)
    shared = grid.shared(weight)
    found = coded(weight, grid)
    for number, (start, stop) in enumerate(spans(weight.shape[1], grid.group)):
        params = {**shared, **grid.fit(weight[:, start:stop], shared)}
        codes = grid.encode(weight[:, start:stop], params)
        assert torch.equal(found.codes[:, start:stop], codes)
        torch.testing.assert_close(found.values()[:, start:stop], grid.decode(codes, params), rtol=0, atol=0)
        for name, value in found.params.items():
            assert torch.equal(value[:, number], params[name])
    for name, stored in grid.stored().items():
        own = found.shared if stored.shared else found.params
        lead = () if stored.shared else (3, group_count(weight.shape[1], grid.group))
        assert own[name].shape == (*lead, *stored.tail)


def grams_of(gram: Tensor, size: int) -> dict[str, Tensor]:
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])
    return {"full": gram, "blocks": blocks, "diagonal": gram.diagonal()}


@pytest.mark.parametrize("form", ["full", "blocks", "diagonal", "none"])
def test_the_range_of_each_group_is_the_one_of_least_error(form: str):
    grid, steps = Integer(bits=2, group=4, symmetric=False), 5
    weight, data = some(6, 12), some(40, 12, seed=1)
    weight[:, ::4] *= 2
    data[:, ::4] *= 0.3
    gram = data.T @ data
    given = {**grams_of(gram, 4), "none": None}[form]
    found = fitted(weight, grid, given, clip=steps)
    narrower = 0
    for row in range(6):
        for group in range(3):
            own = slice(4 * group, 4 * group + 4)
            matrix = {"none": torch.eye(4), "diagonal": torch.diag(gram.diagonal()[own])}.get(form, gram[own, own])
            tried = []
            for step in range(steps + 1):
                params = grid.fit(weight[row, own], shrink=1 - (1 - NARROWEST) * step / steps)
                apart = grid.decode(grid.encode(weight[row, own], params), params) - weight[row, own]
                tried.append((float(apart @ matrix @ apart), float(params["scale"])))
            assert float(found["scale"][row, group]) == pytest.approx(min(tried)[1])
            narrower += min(tried)[1] != tried[0][1]
    assert narrower > 3


def test_importance_reaches_the_grid_whichever_shape_it_has():
    weight = some(2, 8)
    heed = torch.tensor([1.0, 9, 1, 1, 4, 1, 2, 1])
    grid = Levels(bits=1, group=4)
    found = fitted(weight, grid, importance=heed)
    expected = torch.stack([grid.fit(weight[:, :4], importance=heed[:4])["levels"],
                            grid.fit(weight[:, 4:], importance=heed[4:])["levels"]], 1)  # fmt: skip
    assert torch.equal(found["levels"], expected)
    assert torch.equal(fitted(weight, grid, importance=heed.expand(2, 8))["levels"], expected)
    assert not torch.equal(fitted(weight, grid)["levels"], expected)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_parts_of_gram_matrices(size: int):
    data = some(30, 16)
    gram = data.T @ data
    for start, stop in ((0, 16), (8, 16)):
        expected = torch.stack([gram[i : i + size, i : i + size] for i in range(start, stop, size)])
        assert torch.equal(gram_runs(gram, start, stop, size), expected)
        blocks = torch.stack([gram[:8, :8], gram[8:, 8:]])
        assert torch.equal(gram_runs(blocks, start, stop, size), expected)
        diagonal = gram_runs(gram.diagonal(), start, stop, size)
        assert torch.equal(diagonal, expected.diagonal(dim1=1, dim2=2))
        errors = some(3, (stop - start) // size, size, seed=2)
        by_hand = torch.einsum("rgi,gij,rgj->rg", errors, expected, errors)
        torch.testing.assert_close(run_errors(errors, expected), by_hand)
        torch.testing.assert_close(run_errors(errors, diagonal), (errors.square() * diagonal).sum(-1))
    assert torch.equal(
        gram_runs(torch.stack([gram[:8, :8], gram[8:, 8:]]), 0, 15, 3), gram.diagonal()[:15].unflatten(0, (5, 3))
    )  # fmt: skip - no block holds whole groups


def test_the_error_of_outputs():
    weight, other, data = some(3, 6), some(3, 6, seed=1), some(20, 6, seed=2)
    gram = data.T @ data
    apart = weight - other
    torch.testing.assert_close(output_error(weight, other, gram), (data @ apart.T).square().sum())
    blocks = torch.stack([gram[:3, :3], gram[3:, 3:]])
    expected = (data[:, :3] @ apart[:, :3].T).square().sum() + (data[:, 3:] @ apart[:, 3:].T).square().sum()
    torch.testing.assert_close(output_error(weight, other, blocks), expected)
    expected = (apart.square() * gram.diagonal()).sum()
    torch.testing.assert_close(output_error(weight, other, gram.diagonal()), expected)


def test_gram_matrices_of_runs_of_rows_are_known_by_their_shape():
    gram = torch.eye(4)
    assert not by_rows(gram, 4)
    assert not by_rows(gram[None], 4)  # one block
    assert not by_rows(torch.eye(2).expand(2, 2, 2), 4)  # two blocks
    assert by_rows(gram.expand(2, 4, 4), 4)
    rows = some(6, 4)
    parts = parts_by_gram(rows, torch.stack([gram, 2 * gram]))
    assert [len(part) for part, _ in parts] == [3, 3]
    assert torch.equal(torch.cat([part for part, _ in parts]), rows)
    assert torch.equal(parts[1][1], 2 * gram)
    found = joined(coded(part, Integer(bits=3, group=2)) for part, _ in parts)
    whole = coded(rows, Integer(bits=3, group=2))
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.params["scale"], whole.params["scale"])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (1, 1)])
def test_shapes_at_the_edge(shape: tuple[int, int]):
    for grid in (Integer(bits=3, group=2), Integer(), Levels(bits=2)):
        found = coded(torch.ones(shape), grid, fitted(torch.ones(shape), grid, clip=3))
        assert found.codes.shape == shape
        assert found.values().shape == shape


def test_what_is_given_is_left_alone():
    weight = some(4, 8)
    before = weight.clone()
    params = fitted(weight, Integer(group=4), torch.eye(8), clip=4)
    kept = {name: value.clone() for name, value in params.items()}
    made = coded(weight, Integer(group=4), params)
    assert isinstance(made, Coded)
    assert torch.equal(weight, before)
    assert all(torch.equal(made.params[name], kept[name]) for name in kept)


def test_matrices():
    assert checked_matrix("x", torch.ones(2, 3, 4)).shape == (2, 12)
    assert checked_matrix("x", torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert checked_matrix("x", torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(Error, match=r"x quantizes matrices \[out, in\], got a single number"):
        checked_matrix("x", torch.ones(()))
    for gram in (torch.eye(3), torch.ones(4, 3), torch.ones(3), torch.ones(2, 3, 3), torch.ones(1, 1, 2, 2)):
        with pytest.raises(Error, match="x: a weight of 4 inputs needs a Gram matrix"):
            checked_matrix("x", torch.ones(2, 4), gram, runs=True)
    with pytest.raises(Error, match="needs a Gram matrix"):
        checked_matrix("x", torch.ones(2, 4), torch.ones(2, 4, 4))
    checked_matrix("x", torch.ones(2, 4), torch.ones(2, 4, 4), runs=True)
