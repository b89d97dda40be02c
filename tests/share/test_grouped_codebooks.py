"""Codebooks of groups of rows: the objective by hand, limits where the answer is known, and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, FormatError
from weightsmith.share import decode, grouped_codebooks, lift
from weightsmith.share._grouped_codebooks import (
    _codebook,
    _move,
    _State,
    _sweep,
    alike,
    nearest,
    packed,
    packed_width,
    unpacked,
)
from weightsmith.solve import steadied
from weightsmith.weights import Weights

kernel: Any = grouped_codebooks.kernel


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: int, seed: int = 0) -> Tensor:
    """Inputs that go together, as those of a network do."""
    mixed = normal(4 * inputs, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1)
    return mixed.T @ mixed


def values_of(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    codes, books, rows = parts
    return books[rows.int()[:, None], codes.int()]


def error(values: Tensor, weight: Tensor, gram: Tensor) -> float:
    missed = (values - weight).double()
    return float(((missed @ gram.double()) * missed).sum())


def state_of(weight: Tensor, gram: Tensor, books: Tensor, rows: Tensor) -> _State:
    return _State(weight, gram, rows, nearest(weight, books, rows), books)


# Groups


def test_rows_are_grouped_by_how_their_weights_are_distributed():
    small, large, shifted = normal(6, 200) * 0.1, normal(6, 200, seed=1) * 3, normal(6, 200, seed=2) * 0.1 + 2
    mixed = torch.cat([small, large, shifted])[torch.arange(18).view(3, 6).T.reshape(-1)]
    found = alike(mixed, 3).tolist()
    assert found == found[:3] * 6
    assert len(set(found[:3])) == 3


def test_the_order_of_inputs_does_not_matter_to_groups():
    weight = normal(20, 50) * torch.linspace(0.1, 2, 20)[:, None]
    turned = weight[:, torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(alike(weight, 4), alike(turned, 4))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 7), (5, 40)])
def test_rows_that_are_equal_and_few(shape: tuple[int, int]):
    assert alike(torch.ones(shape), min(shape[0], 4)).unique().numel() == 1
    parts = kernel(torch.ones(shape), bits=2, groups=8)
    assert torch.equal(values_of(parts), torch.ones(shape))


# Codebooks


def test_a_codebook_of_few_values_is_those_values():
    weight = torch.tensor([[1.0, 2.0, 5.0, 1.0], [2.0, 5.0, 9.0, 9.0]])
    assert _codebook(weight, torch.ones(4), 4).tolist() == [1, 2, 5, 9]


def test_lloyd_lowers_the_error_to_a_fixed_point():
    weight, scale = normal(8, 100), torch.rand(100, generator=torch.Generator().manual_seed(3))
    book = _codebook(weight, scale, 8)
    index = nearest(weight, book[None], torch.zeros(8, dtype=torch.long))
    for one in range(8):  # each value is the weighted mean of what is nearest to it
        own = index == one
        mean = (scale.expand_as(weight)[own] * weight[own]).sum() / scale.expand_as(weight)[own].sum()
        assert book[one] == pytest.approx(float(mean), abs=0.03)


def test_nearest_by_hand():
    books = torch.tensor([[-1.0, 0.0, 4.0], [0.0, 0.1, 0.2]])
    rows = torch.tensor([0, 1, 0])
    values = torch.tensor([[-9.0, 1.9, 2.1], [0.06, 0.16, 7.0], [-0.4, -0.6, 0.0]])
    assert nearest(values, books, rows).tolist() == [[0, 1, 2], [1, 2, 2], [1, 0, 1]]


def test_the_fit_of_codebooks_is_the_least_squares_one():
    """Against a solver that is given the inputs themselves, one equation an output."""
    inputs, weight = normal(60, 6, seed=5).double(), normal(4, 6, seed=6).double()
    rows = torch.tensor([0, 1, 0, 1])
    books = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-2.0, -0.5, 0.5, 1.5]]).double()
    state = state_of(weight, inputs.T @ inputs, books, rows)
    codes = state.codes.clone()
    state.fit()
    for group in range(2):
        own = (rows == group).nonzero()[:, 0]
        design = torch.cat([inputs @ torch.nn.functional.one_hot(codes[row], 4).double() for row in own])
        wanted = torch.cat([inputs @ weight[row] for row in own])
        used = codes[own].unique()
        expected = torch.linalg.lstsq(design[:, used], wanted).solution
        unused = books[group][[one for one in range(4) if one not in used]]
        assert torch.allclose(state.books[group], torch.cat([expected, unused]).sort().values, atol=1e-3)
    assert (state.books[:, 1:] >= state.books[:, :-1]).all()


def test_a_fit_keeps_what_each_weight_stands_for():
    weight = normal(6, 12)
    state = state_of(weight, gram_of(12), torch.tensor([[-1.0, -0.9, 0.0, 3.0]]), torch.zeros(6, dtype=torch.long))
    before = error(state.values(), weight, state.matrix)
    codes = state.codes.clone()
    state.fit()
    assert error(state.values(), weight, state.matrix) < before
    for one in range(4):  # weights of one value are of one value still
        assert state.values()[codes == one].unique().numel() <= 1


def test_codes_follow_when_a_fit_turns_the_order_of_values_round():
    weight = torch.tensor([[5.0, -1.0, 2.0, 5.0, 2.0]])
    codes = torch.tensor([[0, 1, 2, 0, 2]])
    state = _State(weight, torch.eye(5), torch.tensor([0]), codes, torch.tensor([[0.0, 1.0, 2.0]]))
    state.fit()
    assert torch.allclose(state.values(), weight, atol=1e-4)
    assert torch.allclose(state.books, torch.tensor([[-1.0, 2.0, 5.0]]), atol=1e-4)


# Indices


def test_a_sweep_moves_each_index_to_the_best_place():
    """Column by column against trying all values of each weight."""
    weight, gram = normal(60, 9), gram_of(9)
    books, rows = torch.tensor([[-1.5, -0.5, 0.2, 1.0], [-1.0, 0.0, 0.5, 2.0]]), torch.tensor([0, 1, 1, 0, 1] * 12)
    for block in (2, 5, 128):
        state = state_of(weight, gram, books, rows)
        values = state.values().clone()
        _sweep(state, block)
        for column, row in itertools.product(range(9), range(60)):
            tried = []
            for value in books[rows[row]]:
                one = values[row].clone()
                one[column] = value
                tried.append((error(one, weight[row], gram), float(value)))
            values[row, column] = min(tried)[1]
        assert torch.allclose(state.values(), values)


def test_the_pull_on_an_index_by_hand():
    weight, gram = normal(4, 5), gram_of(5)
    books, rows = torch.tensor([[-2.0, -0.5, 0.1, 1.5], [-1.0, 0.0, 0.3, 2.0]]), torch.tensor([0, 1, 1, 0])
    state = state_of(weight, gram, books, rows)
    gradient = state.lacks()[0]
    assert torch.allclose(gradient, (state.values() - weight) @ gram)
    pull = state.pull(gradient)
    for row, column in itertools.product(range(4), range(5)):
        book, here, slope = books[rows[row]], int(state.codes[row, column]), float(gradient[row, column])
        there = min(max(here - 1 if slope > 0 else here + 1, 0), 3)
        gap = abs(float(book[here] - book[there])) or float(book[1] - book[0] if here == 0 else book[3] - book[2])
        assert float(pull[row, column]) == pytest.approx(slope / (float(gram[column, column]) * gap), rel=1e-4)


def test_moves_are_between_neighbours_and_keep_the_best_of_each_group():
    weight, gram = normal(30, 40), steadied(gram_of(40), damp=0.01).float()
    rows = alike(weight, 3)
    books = torch.stack([_codebook(weight[rows == group], gram.diagonal(), 8) for group in range(3)])
    state = state_of(weight, gram, books, rows)
    state.fit()
    best, before = state.copy(), state.lacks()[1]
    _move(state, best, 1, 0.3)
    assert (best.codes - state.copy().codes).abs().max() <= 1
    _move(state, best, 80, 0.003)
    after = best.lacks()[1]
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.9 * before.sum()


def test_each_step_lowers_the_error_on_data():
    weight, gram = normal(64, 48) * torch.linspace(0.3, 2, 64)[:, None], gram_of(48)
    found = {
        name: error(values_of(kernel(weight, gram, bits=2, **options)), weight, gram)
        for name, options in {
            "weights": {"groups": 4, "steps": 0, "sweeps": 0},
            "one": {"groups": 1},
            "moved": {"groups": 4, "sweeps": 0},
            "whole": {"groups": 4},
        }.items()
    }
    blind = error(values_of(kernel(weight, bits=2, groups=4)), weight, gram)
    assert found["whole"] < found["moved"] < found["weights"] < blind
    assert found["whole"] < found["one"]


def test_diagonals_and_blocks_are_gram_matrices_too():
    weight, gram = normal(8, 12), gram_of(12)
    blocks = torch.stack([gram[:6, :6], gram[6:, 6:]])
    one, other = kernel(weight, blocks, bits=2), kernel(weight, torch.block_diag(*blocks), bits=2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    flat, full = kernel(weight, gram.diagonal(), bits=2), kernel(weight, gram.diagonal().diag(), bits=2)
    assert error(values_of(full), weight, gram.diagonal().diag()) <= 1.001 * error(
        values_of(flat), weight, gram.diagonal().diag()
    )


def test_layers_that_were_never_called_and_inputs_that_were_always_zero():
    weight, gram = normal(8, 12), gram_of(12)
    plain = error(values_of(kernel(weight, bits=3)), weight, torch.eye(12))
    never = values_of(kernel(weight, torch.zeros(12, 12), bits=3))
    assert error(never, weight, torch.eye(12)) <= 1.1 * plain
    gram[3] = gram[:, 3] = 0
    codes, books, _ = kernel(weight, gram, bits=3)
    assert books.isfinite().all()
    assert codes.max() < 8


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3, 256])
def test_any_bits_and_groups(bits: int, groups: int):
    weight = normal(6, 5).bfloat16()
    codes, books, rows = kernel(weight, gram_of(5), bits=bits, groups=groups, steps=20)
    assert books.shape == (min(groups, 6), 2**bits)
    assert codes.shape == (6, 5)
    assert int(codes.max()) < 2**bits
    assert rows.max() < min(groups, 6)
    assert books.isfinite().all()
    if bits == 8:
        assert error(values_of((codes, books, rows)), weight.float(), gram_of(5)) < 1e-2 * error(
            torch.zeros(6, 5), weight.float(), gram_of(5)
        )


@pytest.mark.parametrize(
    ("weight", "gram", "options", "told"),
    [
        (normal(3, 4), None, {"bits": 9}, "bits must be"),
        (normal(3, 4), None, {"bits": 2.0}, "bits must be"),
        (normal(3, 4), None, {"groups": 0}, "groups must be"),
        (normal(3, 4), None, {"groups": 257}, "groups must be"),
        (normal(3, 4), None, {"steps": -1}, "steps and sweeps"),
        (normal(3, 4), None, {"rate": 0.0}, "rate above 0"),
        (normal(3), None, {}, "matrices"),
        (normal(0, 4), None, {}, "matrices"),
        (torch.full((2, 2), torch.nan), None, {}, "NaN"),
        (normal(3, 4), torch.eye(5), {}, "Gram matrix of 4 inputs"),
        (normal(3, 4), torch.full((4, 4), torch.nan), {}, "NaN"),
    ],
)
def test_what_is_refused(weight: Tensor, gram: Tensor | None, options: dict[str, Any], told: str):
    with pytest.raises(Error, match=told):
        kernel(weight, gram, **options)


# Stored


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("inputs", [1, 7, 8, 33])
def test_indices_are_packed_without_gaps(bits: int, inputs: int):
    codes = torch.randint(0, 2**bits, (3, inputs), generator=torch.Generator().manual_seed(bits)).byte()
    words = packed(codes, bits)
    assert words.shape == (3, packed_width(inputs, bits))
    for row, own in zip(codes.tolist(), words.tolist(), strict=True):
        assert int.from_bytes(bytes(own), "little") == sum(code << bits * place for place, code in enumerate(row))
    assert torch.equal(unpacked(words, bits, inputs), codes)


@pytest.mark.usefixtures("small_pieces")
def test_there_and_back_through_a_file(tmp_path: Path):
    weights = {"a.weight": normal(20, 6).bfloat16(), "c.weight": normal(8, 3, 2, 2, seed=1), "a.bias": normal(20)}
    stats = {"a.weight": gram_of(6), "c.weight": gram_of(12)}
    options: dict[str, Any] = {"bits": {"a*": 3, "*": 4}, "groups": 4, "steps": 5}
    encoded = grouped_codebooks(weights, stats=stats, **options)
    encoded.save(tmp_path / "w.safetensors", threads=2)
    back = decode(tmp_path / "w.safetensors")
    assert back.specs == Weights.of(weights).specs
    for name, bits in (("a.weight", 3), ("c.weight", 4)):
        parts = kernel(weights[name].float(), stats[name], bits=bits, groups=4, steps=5)
        assert torch.equal(back[name], values_of(parts).reshape(weights[name].shape).to(weights[name].dtype))
    assert torch.equal(back["a.bias"], weights["a.bias"])
    assert encoded.spec("a.weight_codes").shape == (20, 3)
    assert encoded.spec("a.weight_codebooks").shape == (4, 8)


def test_codebooks_are_learnt_once_a_tensor():
    calls = []

    @card(paper="none", unit="tensor")
    def counting(weight: Tensor, gram: Tensor | None = None, *, bits: int = 4, groups: int = 8) -> Any:
        calls.append(tuple(weight.shape))
        return kernel(weight, gram, bits=bits, groups=groups)

    encoded = lift(counting)({"a.weight": normal(20, 6)}, stats={"a.weight": gram_of(6)})
    calls.clear()  # options were tried
    assert decode(encoded)["a.weight"].shape == (20, 6)
    assert calls == [(20, 6)]


def test_only_what_is_named_and_known():
    weights = {"a.weight": normal(6, 4), "b.weight": normal(6, 4)}
    assert "b.weight" in grouped_codebooks(weights, pattern="a*")
    with pytest.raises(Error, match="stats say nothing of b"):
        grouped_codebooks(weights, stats={"a.weight": torch.eye(4)})
    with pytest.raises(Error, match="no matrix"):
        grouped_codebooks({"a": torch.ones(3)})
    with pytest.raises(Error, match="bits must be"):
        grouped_codebooks(weights, bits=11)
    with pytest.raises(Error, match="no option 'group'"):
        grouped_codebooks(weights, group=11)


def test_files_that_lie():
    encoded = grouped_codebooks({"a.weight": normal(6, 4)}, groups=2)
    for name, wrong in {
        "a.weight_codes": torch.zeros(6, 3, dtype=torch.uint8),
        "a.weight_codebooks": torch.zeros(2, 8),
        "a.weight_rows": torch.zeros(5, dtype=torch.uint8),
        "a.weight_shape": torch.tensor([6]),
    }.items():
        with pytest.raises(FormatError):
            decode(encoded | {name: wrong})
    weights = decode(encoded | {"a.weight_rows": torch.full((6,), 2, dtype=torch.uint8)})
    with pytest.raises(FormatError, match="codebook 2 of 2"):
        weights["a.weight"]
