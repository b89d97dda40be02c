"""Widths within a budget, against all that there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.quantize.budget import Level, mixed

WIDTHS = (2, 3, 4, 8)


def curves(seed: int, tensors: int = 5, convex: bool = True) -> dict[str, list[Level]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index in range(tensors):
        count = int(torch.randint(1, 9, (), generator=generator)) * 8
        worth = float(torch.rand((), generator=generator)) * 10
        errors = [worth * 4.0**-width for width in WIDTHS]
        if not convex:
            errors = sorted((torch.rand(4, generator=generator) * worth).tolist(), reverse=True)
        found[f"t{index}"] = [
            Level(width, count * width, -(-count * width // 8) + 4, error)
            for width, error in zip(WIDTHS, errors, strict=True)
        ]
    return found


def brute(found: dict[str, list[Level]], budget: float, what: str) -> float:
    sums = [
        sum(level.error for level in chosen)
        for chosen in itertools.product(*found.values())
        if sum(getattr(level, what) for level in chosen) <= budget
    ]
    return min(sums)


def error_of(found: dict[str, list[Level]], bits: dict[str, int]) -> float:
    return sum(level.error for name, own in found.items() for level in own if level.bits == bits[name])


def total(found: dict[str, list[Level]], bits: dict[str, int], what: str) -> int:
    return sum(getattr(level, what) for name, own in found.items() for level in own if level.bits == bits[name])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2.0, 2.5, 3.3, 5.0, 8.0])
@pytest.mark.parametrize("convex", [True, False])
def test_no_choice_within_the_budget_is_better(seed: int, bits: float, convex: bool):
    found = curves(seed, convex=convex)
    weights = sum(own[0].codes / own[0].bits for own in found.values())
    exact = mixed(found, bits, exact=True)
    assert total(found, exact, "codes") <= bits * weights + 1e-9
    assert error_of(found, exact) == pytest.approx(brute(found, bits * weights, "codes"))
    quick = mixed(found, bits)
    assert total(found, quick, "codes") <= bits * weights + 1e-9
    assert error_of(found, quick) >= error_of(found, exact) - 1e-12
    uniform = dict.fromkeys(found, max(width for width in WIDTHS if width <= bits))
    if convex:
        assert error_of(found, quick) <= error_of(found, uniform) + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_in_bytes(seed: int):
    found = curves(seed)
    least, most = (sum(own[i].size for own in found.values()) for i in (0, -1))
    for size in (least, (least + most) // 2, most, 10 * most):
        bits = mixed(found, size=size, exact=True)
        assert total(found, bits, "size") <= size
        assert error_of(found, bits) == pytest.approx(brute(found, size, "size"))


def test_refusals():
    with pytest.raises(Error, match=r"1\.5 bits a weight cannot be had.*2 bits"):
        mixed(curves(0), 1.5)
    with pytest.raises(Error, match="3 bytes cannot be had"):
        mixed(curves(0), size=3)
    for given in ({}, {"bits": 3.0, "size": 100}):
        with pytest.raises(Error, match="one budget"):
            mixed(curves(0), **given)
    with pytest.raises(Error, match="at least one tensor"):
        mixed({}, 3.0)
    with pytest.raises(Error, match="bits is a number"):
        mixed(curves(0), float("nan"))
