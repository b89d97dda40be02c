"""Controls of a mask: what each begins with, how long it trains; and losses before and after retraining."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy import stats
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune import controls, oracle_correlation, shuffled
from weightsmith.prune._controls import CONTROLS, pearson, row, spearman


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 40))


def test_the_table():
    model = net()
    before = copy.deepcopy(model.state_dict())
    mask = ws.prune.magnitude(model, {"0.weight": 0.2, "2.weight": 0.7}, action="mask").to_dict()
    density = sum(int(m.sum()) for m in mask.values()) / 600
    calls = []

    def train(made: nn.Module, epochs: int, seed: int) -> None:
        kept = {name: made.get_parameter(name).detach() != 0 for name in mask}
        inherited = [torch.equal(made.get_parameter(n).detach(), before[n] * kept[n]) for n in mask]
        same = [torch.equal(kept[name], mask[name]) for name in mask]
        counts = {name: int(k.sum()) for name, k in kept.items()}
        calls.append((epochs, seed, all(inherited), all(same), counts))
        for parameter in made.parameters():  # decay, noise or what not: the mask is kept all the same
            parameter.data += 1.0
        made.register_buffer("quality", torch.tensor(float(epochs + seed)))

    def evaluate(made: nn.Module) -> float:
        if hasattr(made, "quality"):
            kept = {name: int((made.get_parameter(name) != 0).sum()) for name in mask}
            assert sum(kept.values()) == pytest.approx(density * 600, abs=1)
        return float(getattr(made, "quality", -1.0))

    found = controls(model, mask, train, evaluate, epochs=10, tune_epochs=3, longest=1.5, seeds=(0, 1))
    assert [call[:2] for call in calls] == [(e, s) for s in (0, 1) for e in (3, 3, 10, 15, 10, 10)]
    assert [call[2] for call in calls] == [True, True, False, False, False, False] * 2
    assert [call[3] for call in calls] == [True, False, True, True, False, False] * 2
    own = {name: int(m.sum()) for name, m in mask.items()}
    assert [call[4] == own for call in calls] == [True, True, True, True, True, False] * 2
    even = {name: round(m.numel() * density) for name, m in mask.items()}
    assert calls[5][4] == pytest.approx(even, abs=1)
    rows = {entry["network"]: entry for entry in found.table}
    assert list(rows) == ["whole", "pruned", *CONTROLS]
    assert rows["whole"]["quality"] == rows["pruned"]["quality"] == -1
    assert rows["fine-tuned"] == row("fine-tuned", [3.0, 4.0], density, 3)
    assert rows["equal computing"]["quality"] == 15.5
    assert found["fine-tuned minus equal computing"] == -12
    assert found["kept"] == density
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    few = controls(model, mask, lambda *a: None, lambda m: 0.0, epochs=1, rows=("random",))
    assert few["network"] == ["whole", "pruned", "random"]


def test_no_control_begins_with_the_models_own_start_and_its_mode_is_its_own():
    model = net()  # built after torch.manual_seed(0)
    mask = {"2.weight": torch.arange(400).reshape(40, 10) % 2 == 0}
    starts = []

    def evaluate(made: nn.Module) -> float:
        made.eval()
        return 0.0

    controls(model, mask, lambda m, *a: starts.append(copy.deepcopy(m)), evaluate, epochs=1, seeds=(0,))
    for place, start in enumerate(starts):
        same = (start.get_parameter("0.weight") == model.get_parameter("0.weight")).any()
        assert bool(same) == (place < 2)
    assert model.training


def test_what_cannot_be_had_is_found_before_training():
    class Odd(nn.Sequential):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.gain = nn.Parameter(torch.ones(()))

    half, calls = {"0.weight": torch.arange(200).reshape(10, 20) < 100}, []
    with pytest.raises(Error, match=r"reset_parameters draws gain; .* initialise="):
        controls(Odd(*net()), half, lambda *a: calls.append(a), lambda m: 0.0, epochs=1)
    given = [half, half, {"0.weight": half["0.weight"].T}]
    with pytest.raises(Error, match=r"the mask of 0.weight is torch.bool \[20, 10\]"):
        oracle_correlation(net(), given, lambda *a: calls.append(a), lambda m: 0.0)
    assert not calls
    controls(Odd(*net()), half, lambda *a: calls.append(a), lambda m: 0.0, epochs=1, rows=("fine-tuned", "shuffled"))
    assert len(calls) == 2


def test_shuffled_masks_keep_the_counts():
    mask = {"a": torch.rand(7, 9) < 0.3, "b": torch.rand(7, 9) < 0.3, "c": torch.ones(4, 2, dtype=torch.bool)}
    one, other, again = (shuffled(mask, seed) for seed in (0, 1, 0))
    assert {n: int(m.sum()) for n, m in one.items()} == {n: int(m.sum()) for n, m in mask.items()}
    assert all(torch.equal(one[n], again[n]) for n in mask)
    assert not torch.equal(one["a"], other["a"])
    assert not torch.equal(one["a"], mask["a"])
    places = torch.stack([shuffled(mask, seed)["a"].float() for seed in range(100)]).mean(0)
    assert (places - mask["a"].float().mean()).abs().max() < 0.2  # every place is as likely as another


def test_refusals():
    model = net()
    mask = {"0.weight": torch.ones(10, 20, dtype=torch.bool)}
    half = {"0.weight": torch.arange(200).reshape(10, 20) < 100}
    for given, options, words in (
        (mask, {}, "this one keeps 200 of 200"),
        ({"0.weight": ~mask["0.weight"]}, {}, "this one keeps 0 of 200"),
        (half, {"seeds": ()}, "at least 1 seed and 1 epoch"),
        (half, {"epochs": 0}, "at least 1 seed and 1 epoch"),
        (half, {"rows": ("scratch",)}, "controls knows fine-tuned, .* got 'scratch'"),
        ({"1.weight": half["0.weight"]}, {}, "no such parameters"),
    ):
        with pytest.raises(Error, match=words):
            controls(model, given, lambda *a: None, lambda m: 0.0, **({"epochs": 1} | options))


def masks(count: int) -> list[dict[str, torch.Tensor]]:
    return [ws.prune.random(net(), 0.5, seed=seed, action="mask").to_dict() for seed in range(count)]


def test_correlations_and_anomalies():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, generator=generator).double()
    second = (0.6 * first + torch.randn(40, generator=generator)).round(decimals=1).double()
    model, given = net(), masks(40)
    order = {tuple(mask["0.weight"].flatten().tolist()): place for place, mask in enumerate(given)}
    seeds = []

    def place(made: nn.Module) -> int:
        return order[tuple((made.get_parameter("0.weight") != 0).flatten().tolist())]

    def before(made: nn.Module) -> float:
        assert not hasattr(made, "trained")
        return float(first[place(made)])

    def train(made: nn.Module, seed: int) -> None:
        made.register_buffer("trained", torch.ones(()))
        made[0].weight.data.add_(0.01)  # type: ignore[index]
        seeds.append(seed)

    def after(made: nn.Module) -> float:
        assert hasattr(made, "trained")
        return float(second[place(made)])

    found = oracle_correlation(model, given, train, before, after, samples=200, seed=5)
    x, y = first.numpy(), second.numpy()
    assert found["Pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["Spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["Kendall"] == pytest.approx(stats.kendalltau(x, y).statistic)
    for name in ("Pearson", "Spearman", "Kendall"):
        assert -1 < found[f"{name} low"] < found[name] < found[f"{name} high"] < 1
    oracle = int(first.argmin())
    assert found["anomalies"] == sum(float(v) < float(second[oracle]) for v in second) / 39
    assert found.table[0]["mask"] == oracle
    assert found["before"] == sorted(found["before"])
    assert set(seeds) == {5}


def test_perfect_order_none_and_ties():
    given = masks(5)

    def told(losses: list[float]):
        left = iter(value for loss in losses for value in (loss, 3 * loss))
        return lambda made: next(left)

    found = oracle_correlation(net(), given, lambda m, s: None, told([1.0, 2.0, 3.0, 4.0, 5.0]), samples=50)
    assert found["Kendall"] == found["Spearman"] == 1
    assert found["anomalies"] == 0
    found = oracle_correlation(net(), given, lambda m, s: None, lambda m: 1.0)
    assert found["Pearson"] is None
    assert found["Kendall low"] is None
    with pytest.raises(Error, match="at least 3 masks"):
        oracle_correlation(net(), given[:2], lambda m, s: None, lambda m: 1.0)
    with pytest.raises(Error, match="a loss of mask 0 is not finite"):
        oracle_correlation(net(), given, lambda m, s: None, lambda m: float("nan"))


def test_statistics_are_those_of_scipy():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(6, (3, 30), generator=generator).double()
    second = torch.randint(6, (3, 30), generator=generator).double()
    for one, other, p, s in zip(first, second, pearson(first, second), spearman(first, second), strict=True):
        assert float(p) == pytest.approx(stats.pearsonr(one.numpy(), other.numpy()).statistic)
        assert float(s) == pytest.approx(stats.spearmanr(one.numpy(), other.numpy()).statistic)
