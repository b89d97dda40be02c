"""What is dropped at random: rates and means over seeds, and that nothing but the place decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._drop import below, by_rank
from weightsmith.merge._random import dare_linear, dare_ties, della, della_linear
from weightsmith.merge._task_vectors import task_arithmetic, ties
from weightsmith.solve import random_bits, uniform

NAMES = ["dare_linear", "dare_ties", "della", "della_linear"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_uniform_numbers_are_uniform_and_independent():
    numbers = uniform(2**16, start=0, seed=0, key="w")
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, 64, 0, 1)
    assert float(((counts - 1024) ** 2 / 1024).sum()) < 63 + 5 * (2 * 63) ** 0.5
    for other in (
        uniform(2**16, start=0, seed=1, key="w"),
        uniform(2**16, start=0, seed=0, key="v"),
        uniform(2**16, start=1, seed=0, key="w"),
    ):
        assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < 5 / 2**8


def test_uniform_numbers_belong_to_places():
    whole = uniform(100, start=0, seed=3, key="w")
    for start in range(40):
        for count in (0, 1, 7, 60):
            assert torch.equal(uniform(count, start=start, seed=3, key="w"), whole[start : start + count])
    far = uniform(20, start=2**40 + 5, seed=3, key="w")
    assert torch.equal(far[9:], uniform(11, start=2**40 + 14, seed=3, key="w"))


def test_the_probability_grows_with_the_rank_in_the_row():
    size = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 9.0]])
    found = by_rank(size.flatten(), 0.5, 0.25, 3).reshape(2, 3)
    assert found.tolist() == [[0.75, 0.25, 0.5], [0.25, 0.5, 0.75]]
    assert by_rank(torch.tensor([7.0]), 0.5, 0.25, 1).tolist() == [0.5]


@pytest.mark.parametrize("method", [dare_linear, della_linear])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_the_mean_over_seeds_is_what_bernoulli_says(density: float, method: Any):
    """Every element by itself, within five standard errors; with the paper's scale it is the whole task vector."""
    base, models = normal(12, seed=1), normal(2, 12, seed=2)
    options: dict[str, Any] = {"weight": [1.0, 0.5], "density": density}
    seeds = 500
    whole = task_arithmetic(models, base, weight=[1.0, 0.5])
    scaled = [method(models, base, dialect="paper", seed=seed, **options) for seed in range(seeds)]
    plain = [method(models, base, rescale=False, seed=seed, **options) for seed in range(seeds)]
    bound = 5 * torch.stack(scaled).std(0) / seeds**0.5
    assert ((torch.stack(scaled).mean(0) - whole).abs() <= bound).all()
    if method is dare_linear:
        expected = base + density * (whole - base)
        bound = 5 * torch.stack(plain).std(0) / seeds**0.5
        assert ((torch.stack(plain).mean(0) - expected).abs() <= bound).all()


def test_della_keeps_large_elements_more_often():
    base = torch.zeros(2, 5)
    models = torch.tensor([[[5.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]]])
    kept = sum(della_linear(models, base, epsilon=0.3, rescale=False, seed=s) != 0 for s in range(2000)) / 2000
    expected = torch.tensor([[0.8, 0.2, 0.35, 0.5, 0.65], [0.2, 0.35, 0.5, 0.65, 0.8]])
    assert (kept - expected).abs().max() < 0.06


@pytest.mark.parametrize("method", [dare_linear, della_linear])
def test_by_default_the_sum_of_magnitudes_stays(method: Any):
    models = normal(1, 30, 40)
    found = method(models, torch.zeros(30, 40), density=0.3)
    assert float(found.abs().sum()) == pytest.approx(float(models.abs().sum()), rel=1e-5)
    ratio = (found / models[0])[found != 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert 0.2 < (found != 0).float().mean() < 0.4


@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_with_density_one_nothing_is_random(dialect: Any):
    base, models = normal(6, 7, seed=1), normal(3, 6, 7, seed=2)
    given: dict[str, Any] = {"density": 1.0, "dialect": dialect, "weight": [1.0, 0.5, 2.0]}
    for method in (dare_linear, della_linear):
        assert torch.equal(method(models, base, **given), task_arithmetic(models, base, weight=given["weight"]))
    for method in (dare_ties, della):
        expected = ties(models, base, density=1.0, weight=given["weight"], normalize=True)
        assert torch.equal(method(models, base, normalize=True, **given), expected)
    for method in (dare_linear, della_linear, dare_ties, della):
        assert torch.equal(method(models, base, density=0.0, dialect=dialect), base)


def test_the_election_is_among_what_was_kept():
    """One model alone keeps an element, or both do: never their difference."""
    models = torch.stack([torch.full((400,), 1.0), torch.full((400,), -3.0)])
    found = dare_ties(models, torch.zeros(400), rescale=False)
    assert found.unique().tolist() == [-3, 0, 1]
    assert della(models, torch.zeros(400), rescale=False).unique().tolist() == [-3, 0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_models_tensors_and_seeds_differ_in_what_is_dropped(name: str):
    method: Any = getattr(ws.merge, name)
    base, one = {"a": torch.zeros(200), "b": torch.zeros(200)}, {"a": torch.ones(200), "b": torch.ones(200)}
    found = method([one], base, rescale=False)
    assert torch.equal(found["a"], method([one], base, rescale=False)["a"])
    for other in (found["b"], method([one], base, rescale=False, seed=1)["a"]):
        assert 0.3 < (found["a"] == other).float().mean() < 0.7
    models = torch.stack([torch.ones(200), 2 * torch.ones(200)])
    both: Any = getattr(ws.merge, name)(models, torch.zeros(200), rescale=False, normalize=False)
    assert both.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str):
    method: Any = getattr(ws.merge, name)
    models, base = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}], {"w": torch.ones(2)}
    with pytest.raises(Error, match=f"{name} needs at least 1 model, got 0"):
        method(torch.ones(0, 2), torch.ones(2))
    with pytest.raises(Error, match=r"density must lie between 0 and 1, got -0\.5"):
        method(models, base, density=-0.5)
    with pytest.raises(Error, match="density needs one number for each of the 2 models, got 3"):
        method(models, base, density=[0.5, 0.5, 0.5])
    with pytest.raises(Error, match="dialect must be 'mergekit', 'paper', 'peft' or 'count', got 'other'"):
        method(models, base, dialect="other")
    with pytest.raises(Error, match=f"{name} has no option 'key'"):
        method(models, base, key="w")
    if name.startswith("della"):
        with pytest.raises(Error, match=r"epsilon must be smaller than density and 1 - density, got 0\.15"):
            method(models, base, density=0.1)


@pytest.mark.parametrize(("chance", "width"), [(0.5, 16), (0.2, 16), (0.3, 16), (0.001, 32), (1 - 2**-14 * 0.3, 32)])
def test_below_by_hand(chance: float, width: int):
    """Where numbers of 16 bits come near enough they are used, else ones of 32."""
    drawn = torch.cat([torch.from_numpy(bits.astype("i8")) for _, bits in random_bits(5000, 7, 3, "w", width)])
    assert torch.equal(below(chance, 5000, start=7, seed=3, key="w"), drawn < round(chance * 2**width))
    assert abs(round(chance * 2**width) / 2**width - chance) <= 1e-4 * min(chance, 1 - chance)


@pytest.mark.parametrize("width", [16, 32])
def test_the_row_of_numbers_is_one_row(width: int):
    whole = torch.cat([torch.from_numpy(bits.astype("i8")) for _, bits in random_bits(70000, 0, 0, "w", width)])
    assert len(whole) == 70000
    assert abs(float(whole.double().mean()) / 2 ** (width - 1) - 1) < 0.01
    for start, count in ((1, 3), (5, 66000), (65535, 10), (3, 0)):
        parts = [torch.from_numpy(bits.astype("i8")) for _, bits in random_bits(count, start, 0, "w", width)]
        assert torch.equal(torch.cat([whole[:0], *parts]), whole[start : start + count])
