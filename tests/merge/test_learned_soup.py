"""The learned soup: what it must find, and what it is when there is nothing to learn."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import learned_soup
from weightsmith.merge._learned_soup import Stirring
from weightsmith.weights import Weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))


def labelled(model: nn.Module, count: int = 64, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    inputs = random(count, 3, seed=seed)
    with torch.no_grad():
        return [(inputs, (5 * model(inputs)).argmax(1))]


def shares(soup: Weights) -> list[float]:
    return soup.lineage.options["weight"]["*"]


def held_out(soup: Weights, data: list[tuple[Tensor, Tensor]]) -> float:
    """Cross-entropy at the temperature that was found."""
    module = network()
    soup.load_into(module)
    inputs, labels = data[0]
    return float(functional.cross_entropy(module(inputs).detach() * soup.lineage.options["temperature"], labels))


def test_the_one_good_model_is_found_among_noise():
    good = network(1)
    models = [network(2), good, network(3)]
    soup = learned_soup(models, network(), labelled(good), steps=300)
    assert shares(soup)[1] > 0.9
    assert sum(shares(soup)) == pytest.approx(1)
    uniform = learned_soup(models, network(), labelled(good), steps=0)
    assert held_out(soup, labelled(good)) < held_out(uniform, labelled(good))


def test_the_shares_that_made_the_labels_are_found():
    models = [network(1), network(2)]
    mixed = network()
    ws.merge.mean(models, weight=[0.8, 0.2]).load_into(mixed)
    soup = learned_soup(models, network(), labelled(mixed, 2000), steps=400, rate=0.05)
    assert shares(soup)[0] == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
def test_without_a_step_it_is_the_uniform_soup(per: str):
    models = [network(seed) for seed in range(3)]
    soup = learned_soup(models, network(), labelled(models[0]), per=per, steps=0)  # type: ignore[arg-type]
    for name, value in ws.merge.mean(models).items():
        torch.testing.assert_close(soup[name], value)
    assert soup.lineage.options["temperature"] == 1


def test_one_model_is_its_own_soup():
    model = network(1)
    soup = learned_soup([model], network(), labelled(network(2)), steps=20)
    assert shares(soup) == [1.0]
    for name, value in model.state_dict().items():
        assert torch.equal(soup[name], value)


def test_identical_models_keep_equal_shares():
    """The differences are nothing, so there is no slope along any share."""
    model = network(1)
    told: list[Stirring] = []
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    soup = learned_soup(models, network(), labelled(network(2)), steps=20, on_step=told.append)
    assert shares(soup) == pytest.approx([1 / 3] * 3, abs=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(soup[name], value)
    assert told[-1].temperature != 1  # the temperature is learned all the same


def test_the_temperature_is_the_one_that_fits():
    """With one model the loss depends on the temperature alone, and its minimum can be looked up."""
    model, data = network(1), labelled(network(2), 256)
    found = learned_soup([model], network(), data, steps=400, rate=0.05).lineage.options["temperature"]
    logits = model(data[0][0]).detach()
    losses = {t / 100: float(functional.cross_entropy(logits * (t / 100), data[0][1])) for t in range(1, 500)}
    assert found == pytest.approx(min(losses, key=lambda t: losses[t]), abs=0.02)


def test_the_loss_is_that_of_the_weights_before_the_step():
    models, data = [network(1), network(2)], labelled(network(3))
    told: list[Stirring] = []
    learned_soup(models, network(), data, steps=3, on_step=told.append)
    for before, after in pairwise(told):
        module = network()
        ws.merge.mean(models, weight=before.weight).load_into(module)
        inputs, labels = data[0]
        expected = functional.cross_entropy(module(inputs) * before.temperature, labels)
        assert after.loss == pytest.approx(float(expected), rel=1e-5)
    assert [one.number for one in told] == [1, 2, 3]


def test_layers_may_have_shares_of_their_own():
    """The first layer of one model and the second of another make the labels."""
    models = [network(1), network(2)]
    chimera = nn.Sequential(models[0][0], nn.Tanh(), models[1][2])
    data = labelled(chimera, 512)
    whole, split = (learned_soup(models, network(), data, per=per, steps=300) for per in ("model", "layer"))  # type: ignore[arg-type]
    assert held_out(split, data) < 0.5 * held_out(whole, data)
    weight = split.lineage.options["weight"]
    assert weight["0.weight"][0] > 0.8
    assert weight["2.weight"][1] > 0.8


def test_a_loss_of_ones_own_is_minimised():
    models = [{"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[5.0]])}]
    layer = nn.Linear(1, 1, bias=False)
    soup = learned_soup(
        models, layer, [torch.ones(4, 1)], loss=lambda model, batch: (model(batch) - 2).square().sum(), steps=300
    )
    assert float(soup["weight"]) == pytest.approx(2, abs=0.01)
    assert soup.lineage.options["temperature"] == 1


def test_low_precision_and_integers():
    models = [{"w.weight": torch.full((2, 1), x, dtype=torch.bfloat16), "n": torch.tensor(int(x))} for x in (1, 3)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(1, 2, bias=False)
            self.register_buffer("n", torch.tensor(0))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.w(inputs)

    soup = learned_soup(models, Net(), [(torch.ones(2, 1), torch.tensor([0, 1]))], steps=2)
    assert soup["w.weight"].dtype == torch.bfloat16
    assert soup["n"] == 1


def test_refusals():
    models = [network(1), network(2)]
    with pytest.raises(Error, match="learned_soup needs at least 1 model, got 0"):
        learned_soup([], network(), [])
    with pytest.raises(Error, match="batches have no labels"):
        learned_soup(models, network(), [torch.ones(2, 3)])
    with pytest.raises(Error, match="data of task 1 ran out"):
        learned_soup(models, network(), [])
    with pytest.raises(Error, match="differ in shape"):
        learned_soup([nn.Linear(1, 2), nn.Linear(1, 3)], nn.Linear(1, 2), [])
    with pytest.raises(Error, match="not finite"):
        learned_soup(models, network(), [(torch.full((1, 3), math.nan), torch.tensor([0]))])
