"""Moments after a merge: by hand, at the limits, and where there is no variance to match."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import match_moments, mean
from weightsmith.merge._moments import line
from weightsmith.weights import Weights


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(values: list[float]) -> tuple[float, float]:
    middle = sum(values) / len(values)
    return middle, sum((value - middle) ** 2 for value in values) / len(values)


def by_hand(merged: list[float], models: list[list[float]], weight: list[float]) -> list[float]:
    share = [a / sum(weight) for a in weight]
    own, spread = moments(merged)
    target = sum(a * moments(model)[0] for a, model in zip(share, models, strict=True))
    variance = sum(a * moments(model)[1] for a, model in zip(share, models, strict=True))
    return [target + math.sqrt(variance / spread) * (value - own) for value in merged]


def models_of(*shape: int, count: int = 3) -> list[Tensor]:
    return [(1 + i) * normal(*shape, seed=i) + i for i in range(count)]


@pytest.mark.parametrize("weight", [None, [1, 2, 0.5]])
@pytest.mark.parametrize("shape", [(40,), (6, 7), (2, 3, 4)])
def test_the_formula(shape: tuple[int, ...], weight: list[float] | None):
    models = models_of(*shape)
    merged = normal(*shape, seed=9)
    found = match_moments({"w": merged}, [{"w": model} for model in models], weight=weight)["w"]
    lists = [model.flatten().tolist() for model in models]
    expected = by_hand(merged.flatten().tolist(), lists, weight or [1, 1, 1])
    torch.testing.assert_close(found, torch.tensor(expected).reshape(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (4, 3, 2)])
def test_row_by_row(shape: tuple[int, ...]):
    models = models_of(*shape)
    merged = normal(*shape, seed=9)
    found = match_moments({"w": merged}, [{"w": model} for model in models], rows=True, weight=[1, 2, 3])["w"]
    for row in range(shape[0]):
        lists = [model[row].flatten().tolist() for model in models]
        expected = torch.tensor(by_hand(merged[row].flatten().tolist(), lists, [1, 2, 3]))
        torch.testing.assert_close(found[row].flatten(), expected, rtol=1e-5, atol=1e-5)


def test_the_moments_are_those_of_the_models_on_average():
    models = [{"w": model} for model in models_of(50, 40)]
    found = match_moments(mean(models), models)["w"].double()
    variances = [model["w"].double().var(correction=0) for model in models]
    torch.testing.assert_close(found.var(correction=0), sum(variances) / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean(), sum(model["w"].double().mean() for model in models) / 3)


def test_the_mean_of_unrelated_models_has_a_kth_of_the_variance_and_gets_it_back():
    models = [{"w": normal(200, 200, seed=i)} for i in range(4)]
    merged = mean(models)
    assert float(merged["w"].var()) == pytest.approx(1 / 4, rel=0.02)
    assert float(match_moments(merged, models)["w"].var()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("rows", [False, True])
def test_models_that_are_all_the_same_are_left_alone(rows: bool):
    model = {"w": normal(6, 7, seed=0)}
    torch.testing.assert_close(match_moments(mean([model] * 3), [model] * 3, rows=rows)["w"], model["w"])


def test_it_does_not_matter_how_the_merge_was_scaled_or_shifted():
    models = [{"w": model} for model in models_of(30)]
    merged = normal(30, seed=9)
    one = match_moments({"w": merged}, models)["w"]
    other = match_moments({"w": 5 * merged - 3}, models)["w"]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6, 1e-30])
def test_equal_elements_are_only_shifted(value: float, rows: bool):
    """No variance to scale; rounding is not taken for one."""
    models = [{"w": torch.full((4, 9), value) + i} for i in (0.0, 1.0)]
    found = match_moments({"w": torch.full((4, 9), value)}, models, rows=rows)["w"]
    expected = sum(float(model["w"][0, 0]) for model in models) / 2
    torch.testing.assert_close(found, torch.full((4, 9), expected), rtol=1e-6, atol=1e-7)
    varied = [{"w": normal(4, 9, seed=1)}]
    found = match_moments({"w": torch.full((4, 9), value)}, varied, rows=rows)["w"]
    assert found.isfinite().all()
    assert float(found[0].std()) < 1e-6


def test_the_last_bits_are_no_variance():
    """Ones that a sum has rounded in different ways: scaled up to the models' spread they would be noise."""
    merged = torch.ones(4, 8)
    merged[:, ::2] += 2**-23
    for rows in (False, True):
        found = match_moments({"w": merged}, [{"w": normal(4, 8, seed=0)}], rows=rows)["w"]
        assert float(found[0].std()) < 1e-6


@pytest.mark.parametrize("value", [2.0, 0.1, -0.3, 1e5 / 7])
@pytest.mark.parametrize("size", [4, 7, 100, 1001])
def test_models_without_variance_give_their_mean(size: int, value: float):
    models = [{"w": torch.full((size,), value)}, {"w": torch.full((size,), 2 * value)}]
    found = match_moments({"w": normal(size, seed=0)}, models)["w"]
    torch.testing.assert_close(found, torch.full((size,), 1.5 * value), rtol=1e-6, atol=1e-6 * abs(value))


def test_a_variance_that_rounding_left_negative_is_none():
    factor, shift = line(torch.tensor([0.0, 3.0]).double(), torch.tensor([1.0, -1e-17]).double(), [1.0])
    assert (factor.item(), shift.item()) == (0, 3)


def test_a_small_spread_around_a_large_mean():
    """Squares that are summed in float32 would lose it."""
    models = [{"w": 3000 + (1 + i) * normal(100_000, seed=i)} for i in range(2)]
    found = match_moments(mean(models), models)["w"].double()
    assert float(found.var()) == pytest.approx(2.5, rel=0.02)


def test_sizes_at_the_edge():
    merged = {
        "empty": torch.zeros(0, 3),
        "none": torch.zeros(3, 0),
        "one": torch.tensor([5.0]),
        "number": torch.ones(()),
    }
    model = {name: value + 1 for name, value in merged.items()}
    for rows in (False, True):
        found = match_moments(merged, [model], rows=rows)
        assert found["empty"].shape == (0, 3)
        assert found["none"].shape == (3, 0)
        assert found["one"].tolist() == [6]
        assert found["number"].item() == 2


def test_running_statistics_and_counters_are_left_alone():
    names = ("1.weight", "1.running_mean", "1.running_var")
    models = [{name: normal(8, seed=i).abs() for name in names} | {"n": torch.tensor(i)} for i in range(2)]
    merged = mean(models)
    found = match_moments(merged, models)
    assert not torch.equal(found["1.weight"], merged["1.weight"])
    for name in ("1.running_mean", "1.running_var", "n"):
        assert torch.equal(found[name], merged[name])


def test_a_pattern_and_options_by_tensor():
    models = [{"a": model, "b": model.clone()} for model in models_of(6, 7)]
    merged = mean(models)
    found = match_moments(merged, models, pattern="a")
    assert not torch.equal(found["a"], merged["a"])
    assert torch.equal(found["b"], merged["b"])
    found = match_moments(merged, models, rows={"a": True, "*": False}, weight={"a": [1, 0, 0], "*": [0, 0, 1]})
    torch.testing.assert_close(found["a"].var(1), models[0]["a"].var(1))
    torch.testing.assert_close(found["b"].var(), models[2]["b"].var())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_pieces_and_through_a_file(dtype: torch.dtype, rows: bool, tmp_path: Path):
    models = [{"w": model.to(dtype)} for model in models_of(20, 10)]
    merged = {"w": normal(20, 10, seed=9).to(dtype)}
    expected = match_moments({"w": merged["w"].double()}, [{"w": m["w"].double()} for m in models], rows=rows)["w"]
    found = match_moments(merged, models, rows=rows)
    assert found.spec("w").dtype == dtype
    torch.testing.assert_close(found["w"].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for threads in (1, 3):
        match_moments(merged, models, rows=rows).save(tmp_path / f"{threads}.safetensors", threads=threads)
        assert torch.equal(ws.open(tmp_path / f"{threads}.safetensors")["w"], found["w"])


def test_a_strided_tensor():
    models = [{"w": model.t()} for model in models_of(6, 7)]
    merged = normal(6, 7, seed=9)
    plain = match_moments({"w": merged.t().contiguous()}, [{"w": m["w"].contiguous()} for m in models])["w"]
    torch.testing.assert_close(match_moments({"w": merged.t()}, models)["w"], plain)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_in_its_tensor(value: float, rows: bool):
    models = [{"a": normal(4, 2, seed=0), "b": normal(4, seed=1)}, {"a": normal(4, 2, seed=2), "b": normal(4, seed=3)}]
    models[1]["a"][2, 1] = value
    found = match_moments({"a": normal(4, 2, seed=4), "b": normal(4, seed=5)}, models, rows=rows)
    with pytest.raises(Error, match="tensor a: match_moments: the merge or a model holds NaN"):
        found["a"]
    assert found["b"].isfinite().all()


def test_tied_tensors_stay_tied_unless_their_options_differ():
    models = []
    for model in models_of(6, 7):
        models.append(Weights.of({"embed": model, "head": model}))
    assert match_moments(mean(models), models).ties == {"head": "embed"}
    found = match_moments(mean(models), models, pattern="head")
    assert not found.ties
    assert torch.equal(found["embed"], mean(models)["embed"])


def test_lineage_and_files():
    models = [Weights.of({"w": model}).with_files({"config.json": b"{}"}) for model in models_of(6)]
    found = match_moments(mean(models), models, weight=[1, 1, 2])
    assert found.lineage.method == "merge.match_moments"
    assert found.lineage.options["weight"] == [1, 1, 2]
    assert set(found.files) == {"config.json"}


def test_refusals():
    models = [{"w": torch.ones(3)}] * 2
    with pytest.raises(Error, match="match_moments needs at least 1 model, got 0"):
        match_moments(models[0], [])
    with pytest.raises(Error, match="match_moments: model 1 and model 3 differ in shape: w"):
        match_moments({"w": torch.ones(4)}, models)
    with pytest.raises(Error, match="weights that are not negative"):
        match_moments(models[0], models, weight=[2, -1])
    with pytest.raises(Error, match="one number for each of the 2 models, got 3"):
        match_moments(models[0], models, weight=[1, 1, 1])
    with pytest.raises(Error, match="match_moments: no tensor with floats fits pattern='v'"):
        match_moments(models[0], models, pattern="v")
