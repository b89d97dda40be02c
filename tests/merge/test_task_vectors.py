"""Task vectors added, trimmed and elected, against loops written from the formulas."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._task_vectors import breadcrumbs, breadcrumbs_ties, task_arithmetic, ties

SHAPES = [(1,), (40,), (6, 7), (2, 3, 3), ()]


def fine_tunes(k: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values on a coarse grid: exact sums, and many equal magnitudes of both signs."""
    values = torch.randint(-6, 7, (k + 1, *shape), generator=torch.Generator().manual_seed(seed)) / 4
    return values[1:], values[0]


def order_of(delta: list[float]) -> list[int]:
    """Places by magnitude, the largest first, the first of equals first."""
    return sorted(range(len(delta)), key=lambda place: (-abs(delta[place]), place))


def top(delta: list[float], density: float) -> list[float]:
    keep = max(1, int(density * len(delta))) if density > 0 else 0
    places = order_of(delta)[:keep]
    return [x if place in places else 0.0 for place, x in enumerate(delta)]


def band(delta: list[float], density: float, gamma: float) -> list[float]:
    keep, outliers = int(density * len(delta)), int(gamma * len(delta))
    outliers = min(outliers, len(delta) - keep)
    places = order_of(delta)[outliers : outliers + keep]
    return [x if place in places else 0.0 for place, x in enumerate(delta)]


def rescaled(trimmed: list[float], whole: list[float]) -> list[float]:
    rest = sum(map(abs, trimmed))
    return [x * sum(map(abs, whole)) / rest for x in trimmed] if rest else trimmed


def elect(deltas: list[list[float]], weight: list[float], normalize: bool) -> list[float]:
    found = []
    for column in zip(*deltas, strict=True):
        votes = [a * d for a, d in zip(weight, column, strict=True)]
        plus = sum(votes) >= 0
        agree = [(a, v) for a, v in zip(weight, votes, strict=True) if (v > 0 if plus else v < 0)]
        divisor = sum(a for a, _ in agree) if normalize else 1.0
        found.append(sum(v for _, v in agree) / (divisor or 1.0))
    return found


def add(deltas: list[list[float]], weight: list[float], normalize: bool) -> list[float]:
    divisor = sum(weight) if normalize else 1.0
    return [sum(a * d for a, d in zip(weight, column, strict=True)) / divisor for column in zip(*deltas, strict=True)]


def by_hand(models: Tensor, base: Tensor, trim: Any, join: Any, weight: list[float], options: Any) -> Tensor:
    deltas = [(model - base).flatten().double().tolist() for model in models]
    kept = [trim(delta) for delta in deltas]
    if options.get("rescale"):
        kept = [rescaled(one, whole) for one, whole in zip(kept, deltas, strict=True)]
    change = torch.tensor(join(kept, weight, options["normalize"])).reshape(base.shape)
    return (base.double() + options["amount"] * change).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.25, 1.5, 0.5], [1.0, -0.25, 0.5]])
def test_the_formulas(weight: list[float], normalize: bool, shape: tuple[int, ...]):
    models, base = fine_tunes(3, *shape, seed=len(shape))
    plain: dict[str, Any] = {"amount": 0.5, "normalize": normalize}
    found = task_arithmetic(models, base, weight=weight, **plain)
    torch.testing.assert_close(found, by_hand(models, base, list, add, weight, plain))
    for density, gamma, rescale in ((0.0, 0.1, True), (0.001, 0.0, False), (0.3, 0.1, True), (0.7, 0.5, False)):
        options = plain | {"rescale": rescale}
        given: dict[str, Any] = options | {"weight": weight, "density": density}
        cut = partial(top, density=density)
        found = ties(models, base, **given)
        torch.testing.assert_close(found, by_hand(models, base, cut, elect, weight, options))
        cut = partial(band, density=density, gamma=gamma)
        found = breadcrumbs(models, base, gamma=gamma, **given)
        torch.testing.assert_close(found, by_hand(models, base, cut, add, weight, options))
        found = breadcrumbs_ties(models, base, gamma=gamma, **given)
        torch.testing.assert_close(found, by_hand(models, base, cut, elect, weight, options))


def test_every_model_may_have_a_density_and_a_gamma_of_its_own():
    models, base = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]), torch.zeros(4)
    assert ties(models, base, density=[0.25, 0.5], normalize=False).tolist() == [4, 0, 3, 4]
    assert breadcrumbs(models, base, density=[0.5, 0.25], gamma=[0.25, 0]).tolist() == [0, 3, 2, 4]


def test_opposed_changes_of_one_size_are_plus():
    models = torch.tensor([[-1.0], [1.0]])
    assert ties(models, torch.zeros(1)).tolist() == [1]


def test_what_the_task_vector_does_not_reach_stays():
    models, base = fine_tunes(3, 30)
    for method in (ties, breadcrumbs, breadcrumbs_ties):
        assert torch.equal(method(models, base, density=0.0), base)
        assert torch.equal(method(models, base, amount=0.0), base)
    assert torch.equal(task_arithmetic(models, base, amount=0.0), base)


def test_a_negative_weight_forgets():
    models, base = fine_tunes(1, 10)
    torch.testing.assert_close(task_arithmetic(models, base, weight=-1), 2 * base - models[0])


def test_a_value_that_is_not_a_number_stays_where_it_is():
    models, base = fine_tunes(2, 20)
    models[0, 3] = torch.nan
    found = ties(models, base, density=0.5)
    assert found.isnan().nonzero().tolist() == [[3]]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_what_is_kept_is_chosen_in_the_whole_tensor_not_in_its_chunks(method: str):
    models, base = fine_tunes(3, 10, 17)
    models[:, :5] *= 10
    options: dict[str, Any] = {"density": [0.3, 0.5, 0.9], "rescale": True, "weight": [1, 0.5, 0.25]}
    lazy = getattr(ws.merge, method)([{"w": model} for model in models], {"w": base}, **options)["w"]
    torch.testing.assert_close(lazy, getattr(ws.merge, method)(models, base, **options))


def test_options_may_differ_by_tensor():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    model = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    found = ws.merge.ties([model], base, density={"a": 0.25, "*": 1.0})
    assert found["a"].tolist() == [0, 0, 0, 3]
    assert found["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("method", [task_arithmetic, ties, breadcrumbs, breadcrumbs_ties])
def test_the_result_has_the_dtype_of_the_models(method: Any):
    models, base = fine_tunes(2, 5)
    assert method(models.bfloat16(), base).dtype == torch.bfloat16
    assert method(models, base.bfloat16()).dtype == torch.float32
    assert method(models, base.double()).dtype == torch.float32


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"])
def test_refusals(name: str):
    method: Any = getattr(ws.merge, name)
    models, base = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}], {"w": torch.ones(2)}
    with pytest.raises(Error, match=f"{name} needs at least 1 model, got 0"):
        method(torch.ones(0, 2), torch.ones(2))
    with pytest.raises(Error, match=f"{name} needs base="):
        method(models)
    with pytest.raises(Error, match="weight needs one number for each of the 2 models, got 3"):
        method(models, base, weight=[1, 2, 3])
    with pytest.raises(Error, match="amount must be a finite number, got nan"):
        method(models, base, amount=float("nan"))
    if name != "task_arithmetic":
        with pytest.raises(Error, match=r"density must lie between 0 and 1, got 1\.5"):
            method(models, base, density=1.5)
        with pytest.raises(Error, match="density needs one number for each of the 2 models, got 1"):
            method(models, base, density=[0.5])
    if name.startswith("breadcrumbs"):
        with pytest.raises(Error, match="gamma must lie between 0 and 1, got -1"):
            method(models, base, gamma=-1)


# Arithmetic in place of masks: the same bytes


def plain_election(deltas: Tensor, weights: list[float], normalize: bool) -> Tensor:
    """With comparisons and masks, as the formula reads."""
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    sign = torch.where(sum(weighted[1:], weighted[0]) >= 0, 1.0, -1.0)
    agree = [torch.where(one.sign() == sign, one, 0.0) for one in weighted]
    total = sum(agree[1:], agree[0])
    shares = [torch.where(one.sign() == sign, weight, 0.0) for one, weight in zip(weighted, weights, strict=True)]
    divisor = sum(shares[1:], shares[0])
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 1.7, 0.2], [1.0, -0.4, 0.0], [1e-30, 2e-30, 1e-30]])
@pytest.mark.parametrize("ties_among", [False, True])
def test_to_the_bit_what_the_formula_gives(ties_among: bool, weights: list[float], normalize: bool):
    models, base = fine_tunes(3, 4000)
    if ties_among:
        models, base = (models * 2).round(), (base * 2).round()
    deltas = models - base
    trimmed = torch.stack([torch.where(most_changed(delta, 1300), delta, 0.0) for delta in deltas])
    expected = base + 0.7 * plain_election(trimmed, weights, normalize)
    found = ties(models, base, density=0.325, weight=weights, normalize=normalize, amount=0.7)
    assert torch.equal(found, expected)


def most_changed(delta: Tensor, count: int) -> Tensor:
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().argsort(stable=True, descending=True)[:count]] = True
    return mask.reshape(delta.shape)


# Dialects


def papers_loop(parts: Any, places: Any, weights: list[float], combine: str, tie: float) -> list[list[float]]:
    """TIES as its paper's code has it, element by element; ``parts`` are tensors of task vectors ``[k][n]``."""
    merged = []
    for deltas, kept in zip(parts, places, strict=True):
        row = []
        for j in range(len(deltas[0])):
            values = [deltas[i][j] if j in kept[i] else 0.0 for i in range(len(deltas))]
            vote = sum(values)
            sign = math.copysign(1, vote) if vote else tie
            agreeing = [w * v for v, w in zip(values, weights, strict=True) if v * sign > 0]
            if not agreeing:
                row.append(0.0)
            elif combine == "max":
                row.append(max(agreeing, key=abs))
            else:
                row.append(sum(agreeing) / (len(agreeing) if combine == "mean" else 1))
        merged.append(row)
    return merged


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("seed", range(4))
def test_the_papers_way(combine: str, seed: int):
    """One threshold a model over all tensors; tied votes go with the majority of all elements."""
    generator = torch.Generator().manual_seed(seed)
    sizes, k = [40, 7, 90], 4
    parts = [torch.randint(-4, 4, (k, n), generator=generator).float() for n in sizes]
    together = torch.cat(parts, dim=1)
    count = int(0.4 * together.shape[1])
    kept = [most_changed(row, count) for row in together]
    trimmed = torch.stack([torch.where(mask, row, 0.0) for mask, row in zip(kept, together, strict=True)])
    tie = -1.0 if float(trimmed.sum(0).sign().sum()) < 0 else 1.0
    starts = [0, 40, 47]
    places = [
        [{j for j in range(n) if mask[start + j]} for mask in kept] for start, n in zip(starts, sizes, strict=True)
    ]
    weights = [1.0, 0.5, 2.0, 1.0]
    expected = papers_loop([p.tolist() for p in parts], places, weights, combine, tie)
    base = {f"{i}.w": torch.zeros(n) for i, n in enumerate(sizes)}
    models = [{f"{i}.w": part[m] for i, part in enumerate(parts)} for m in range(k)]
    merged = ws.merge.ties(models, base, density=0.4, dialect="paper", combine=combine, weight=weights)
    for i, row in enumerate(expected):
        torch.testing.assert_close(merged[f"{i}.w"], torch.tensor(row))
    assert (trimmed.sum(0) == 0).logical_and((trimmed != 0).any(0)).any(), "no vote was tied: the test says nothing"


def test_the_papers_majority_may_be_minus():
    models = torch.tensor([[1.0, -3.0, -3.0, -3.0], [-1.0, -3.0, -3.0, -3.0]])
    assert ties(models, torch.zeros(4), density=1.0, dialect="paper").tolist() == [-1, -3, -3, -3]
    assert ties(models, torch.zeros(4), density=1.0).tolist() == [1, -3, -3, -3]


def test_one_threshold_needs_one_density():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    model = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(Error, match=r"one threshold here, so .*density.* cannot differ by tensor"):
        ws.merge.ties([model], base, density={"a": 0.5, "*": 1.0}, dialect="paper")
    with pytest.raises(Error, match="cannot differ by tensor"):
        ws.merge.ties([model], base, dialect={"a": "paper", "*": "mergekit"})
    found = ws.merge.ties([model], base, dialect="paper", density=1.0, weight={"a": [2.0], "*": [1.0]})
    assert (found["a"].tolist(), found["b"].tolist()) == ([2, 2], [1, 1])


def test_tied_tensors_count_once_in_the_threshold_of_the_whole_model():
    shared, zeros = torch.tensor([9.0, 8.0]), torch.zeros(2)
    model = {"a": shared, "b": shared, "c": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    merged = ws.merge.ties([model], {"a": zeros, "b": zeros, "c": torch.zeros(4)}, density=0.5, dialect="paper")
    assert {n: v.tolist() for n, v in merged.items()} == {"a": [9, 8], "b": [9, 8], "c": [4, 0, 0, 0]}


def test_one_vote_a_model():
    models = torch.tensor([[3.0], [-1.0], [-1.0]])
    base = torch.zeros(1)
    assert ties(models, base, density=1.0).tolist() == [3]
    assert ties(models, base, density=1.0, dialect="count").tolist() == [-1]
    weighted = ties(models, base, density=1.0, dialect="count", weight=[1.0, 2.0, 1.0])
    assert weighted.tolist() == [-1]  # (2 * -1 + 1 * -1) / (2 + 1)


def test_divisors():
    models = torch.tensor([[1.0], [3.0]])
    base, weight = torch.zeros(1), [1.0, 3.0]
    assert ties(models, base, density=1.0, weight=weight).tolist() == [(1 + 9) / 4]
    assert ties(models, base, density=1.0, weight=weight, dialect="peft").tolist() == [(1 + 9) / 2]
    assert ties(models, base, density=1.0, weight=weight, combine="max").tolist() == [9]
    assert ties(models, base, density=1.0, weight=weight, combine="sum").tolist() == [10]


def test_dialects_said_wrongly():
    models, base = fine_tunes(2, 5)
    with pytest.raises(Error, match="dialect must be 'mergekit', 'paper', 'peft' or 'count', got 'other'"):
        ties(models, base, dialect="other")  # type: ignore[arg-type]
    with pytest.raises(Error, match="combine must be 'mean', 'sum' or 'max', got 'median'"):
        ties(models, base, combine="median")  # type: ignore[arg-type]
