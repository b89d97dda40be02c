"""Matrices that spread: orthogonal, with equal entries, and fast."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.transforms import hadamard, hadamard_transform, keeping_mean, random_orthogonal
from weightsmith.quantize.transforms._hadamard import orders, spreading

SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 68, 72, 76, 80, 84, 88, 96, 104, 108, 384, 576]


@pytest.mark.parametrize("size", SIZES)
def test_entries_are_equal_and_rows_orthogonal(size: int) -> None:
    for matrix in (hadamard(size), hadamard(size, seed=3)):
        whole = matrix * size**0.5
        assert torch.equal(whole.round().abs(), torch.ones(size, size, dtype=torch.float64))
        assert torch.allclose(whole, whole.round())
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_a_power_of_two_is_sylvesters() -> None:
    scipy = pytest.importorskip("scipy.linalg", reason="has Sylvester's construction")
    assert torch.equal((hadamard(64) * 8).round(), torch.from_numpy(scipy.hadamard(64)).double())


@pytest.mark.parametrize("size", [1, 2, 12, 16, 36, 96, 576])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_fast_transform_is_the_product(size: int, seed: int | None) -> None:
    values = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = hadamard_transform(values, seed=seed)
    assert torch.allclose(found, values @ hadamard(size, seed=seed).T, atol=1e-12)
    assert hadamard_transform(values.bfloat16()).dtype == torch.float32
    assert hadamard_transform(values[:0]).shape == (0, 2, size)
    turned = values.transpose(0, 1)
    assert torch.allclose(hadamard_transform(turned, seed=seed), found.transpose(0, 1), atol=1e-12)


def test_widths_of_common_models_are_known() -> None:
    for width in (384, 576, 768, 896, 960, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 4608, 5120, 8192):
        total = 1
        for order in orders(width):
            total *= order
        assert total == width


def test_what_is_not_known_is_said_and_replaced_by_a_random_turn() -> None:
    for size in (0, 3, 6, 92):
        with pytest.raises(Error, match=f"order {size} "):
            hadamard(size)
    turn = spreading(92)
    assert torch.allclose(turn @ turn.T, torch.eye(92, dtype=torch.float64), atol=1e-10)
    assert torch.equal(spreading(12, seed=4), hadamard(12, seed=4))


def test_random_turns_depend_on_their_seed_alone() -> None:
    torch.manual_seed(0)
    first = random_orthogonal(7, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(first, random_orthogonal(7, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(first, random_orthogonal(7, seed=2))
    assert torch.allclose(first @ first.T, torch.eye(7, dtype=torch.float64), atol=1e-12)
    many = torch.stack([random_orthogonal(3, seed=seed) for seed in range(400)])
    assert (many.mean(0).abs() < 0.12).all()  # no sign is preferred
    assert not torch.equal(hadamard(8, seed=1), hadamard(8, seed=2))


def test_turns_that_keep_the_mean() -> None:
    turn = keeping_mean(random_orthogonal(5, seed=1))
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(turn @ turn.T, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((x @ turn.T).mean(1), x.mean(1))
    assert torch.allclose((x @ turn.T).var(1), x.var(1))
    norm = torch.nn.functional.layer_norm
    assert torch.allclose(norm(x @ turn.T, (6,)), norm(x, (6,)) @ turn.T)
    assert not torch.allclose(turn, torch.eye(6, dtype=torch.float64), atol=0.3)
    assert keeping_mean(torch.zeros(0, 0, dtype=torch.float64)).tolist() == [[1.0]]
