"""The controls: who is trained how long, from which weights, and at what cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.prune.structured import allocate, controls, cut_module, norms, parameters, proportional
from weightsmith.prune.structured._controls import random_structure


def test_the_table(mlp):
    model, graph = mlp
    kept = allocate(norms(model, graph), graph, 0.6)
    inherited = cut_module(model, graph, kept)
    calls, before = [], copy.deepcopy(model.state_dict())

    def train(made: nn.Module, epochs: int, seed: int) -> None:
        same = [p.shape for p in made.parameters()] == [p.shape for p in inherited.parameters()]
        own = same and all(torch.equal(a, b) for a, b in zip(made.parameters(), inherited.parameters(), strict=True))
        calls.append((epochs, seed, same, own, made[0].weight.detach().clone()))  # type: ignore[index]
        made.register_buffer("quality", torch.tensor(float(epochs + seed)))

    def evaluate(made: nn.Module) -> float:
        return float(getattr(made, "quality", -1.0))

    found = controls(model, graph, kept, train, evaluate, epochs=10, tune_epochs=3, seeds=(0, 1))
    share = parameters(graph)({name: len(index) for name, index in kept.items()}) / parameters(graph)({})
    longer = round(10 / share)
    assert [call[:2] for call in calls] == [(e, s) for s in (0, 1) for e in (3, 10, longer, 10)]
    assert [call[3] for call in calls] == [True, False, False, False] * 2
    assert [call[2] for call in calls[:3]] == [True, True, True]
    assert torch.equal(calls[1][4], calls[2][4])  # Scratch-E and Scratch-B start alike
    assert not torch.equal(calls[1][4], calls[5][4])
    rows = {row["network"]: row for row in found.table}
    assert list(rows) == ["whole", "cut", "fine-tuned", "scratch-E", "scratch-B", "random structure"]
    assert rows["whole"]["quality"] == rows["cut"]["quality"] == -1
    assert rows["fine-tuned"]["quality"] == 3.5
    assert rows["fine-tuned"]["spread"] == pytest.approx(0.5**0.5)
    assert rows["scratch-B"]["epochs"] == longer
    assert rows["cut"]["cost"] == pytest.approx(share)
    drawn = [random_structure(graph, kept, parameters(graph), seed) for seed in (0, 1)]
    shares = [parameters(graph)({n: len(i) for n, i in one.items()}) / parameters(graph)({}) for one in drawn]
    assert rows["random structure"]["cost"] == pytest.approx(sum(shares) / 2)
    assert rows["random structure"]["cost"] <= share + 1e-9
    assert found["fine-tuned minus scratch-B"] == pytest.approx(3 - longer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_control_begins_with_the_models_own_start_and_its_mode_is_its_own(mlp):
    _, graph = mlp
    kept = {"one": torch.tensor([0, 2])}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the seed of the controls
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    inherited = cut_module(model, graph, kept)
    starts = []
    controls(model, graph, kept, lambda m, *a: starts.append(copy.deepcopy(m)), lambda m: float(not m.eval()), epochs=1)
    assert all((a == b).all() for a, b in zip(starts[0].parameters(), inherited.parameters(), strict=True))
    for start in starts[1:3]:
        assert not any((a == b).any() for a, b in zip(start.parameters(), inherited.parameters(), strict=True))
    assert model.training


def test_weights_that_cannot_be_drawn_are_found_before_training(mlp):
    model, graph = mlp

    class Odd(nn.Sequential):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.gain = nn.Parameter(torch.ones(()))

    calls = []
    with pytest.raises(Error, match=r"reset_parameters draws gain; .* initialise="):
        controls(Odd(*model), graph, {"one": torch.arange(2)}, lambda *a: calls.append(a), lambda m: 0.0, epochs=1)
    assert not calls


def test_scratch_b_has_an_end(mlp):
    model, graph = mlp
    kept = {"one": torch.tensor([0]), "two": torch.tensor([0])}
    seen = []
    controls(model, graph, kept, lambda m, epochs, seed: seen.append(epochs), lambda m: 0.0, epochs=4)
    assert seen == [4, 4, 8, 4]


def test_random_structures_differ_and_cost_no_more(cnn):
    model, graph = cnn
    kept = allocate(norms(model, graph), graph, 0.5)
    cost = proportional(graph, {"0.weight": 100.0, "7.weight": 1.0})
    most = cost({name: len(index) for name, index in kept.items()})
    drawn = [random_structure(graph, kept, cost, seed) for seed in range(8)]
    sizes = [{name: len(index) for name, index in one.items()} for one in drawn]
    assert all(cost(one) <= most for one in sizes)
    assert len({(graph.sizes | size)["a"] for size in sizes}) > 1


def test_refusals(mlp):
    model, graph = mlp
    kept = {"one": torch.arange(5)}
    with pytest.raises(Error, match="needs a cut"):
        controls(model, graph, kept, lambda *a: None, lambda m: 0.0, epochs=1)
    with pytest.raises(Error, match="at least 1 seed"):
        controls(model, graph, {"one": torch.arange(2)}, lambda *a: None, lambda m: 0.0, epochs=1, seeds=())
