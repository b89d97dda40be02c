"""The covariance operator of contrastive learning against the gradients of autograd."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.training import contrastive_loss, contrastive_operator


def network(seed: int = 0, bias: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.ReLU(), nn.Linear(7, 3, bias=bias)).double()


def views(n: int = 8, each: int = 4, seed: int = 0, noise: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    examples = torch.randn(n, 1, 5, generator=generator, dtype=torch.float64)
    return examples + noise * torch.randn(n, each, 5, generator=generator, dtype=torch.float64)


def test_losses_by_slow_loops():
    outputs = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def half(a, b):
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)) / 2

    same = [half(outputs[i, a], outputs[i, b]) for i in range(3) for a in range(2) for b in range(2)]
    every = list(itertools.product(range(3), range(2)))
    other = [half(outputs[p], outputs[q]) for p in every for q in every]
    expected = sum(same) / len(same) - sum(other) / len(other)
    assert float(contrastive_loss(outputs)) == pytest.approx(expected)
    temperature, total = 0.7, 0.0
    for i in range(3):
        for a, b in ((0, 1), (1, 0)):
            terms = [math.exp(-half(outputs[i, a], outputs[k, b]) / temperature) for k in range(3)]
            total -= math.log(terms[i] / sum(terms))
    found = float(contrastive_loss(outputs, loss="nce", temperature=temperature))
    assert found == pytest.approx(total / 6)


@pytest.mark.parametrize("layer", ["0.weight", "2.weight"])
def test_the_operator_is_the_gradient_of_the_simple_loss(layer):
    model, data = network(), views()
    found = contrastive_operator(model, data, layer)
    asked = copy.deepcopy(model)
    contrastive_loss(asked(data.flatten(0, 1)).view(8, 4, 3)).backward()
    descent = -dict(asked.named_parameters())[layer].grad.flatten()
    assert torch.allclose(found.descent, descent)
    assert torch.allclose(found.predicted, descent)
    assert torch.allclose(found.exact, descent)
    # twice the covariance of the mean connections, as a matrix
    means = found.connections.mean(dim=1)
    centred = means - means.mean(dim=0)
    operator = 2 * sum(one @ one.T for one in centred) / 8
    assert torch.allclose(operator @ found.weight, descent)
    values = torch.linalg.eigvalsh(operator).flip(0)
    assert torch.allclose(found.values, values[: len(found.values)])
    assert (found.values >= 0).all()
    rebuilt = found.vectors.T @ torch.diag(found.values) @ found.vectors
    assert torch.allclose(rebuilt, operator)


def test_the_report_by_hand():
    found = contrastive_operator(network(), views(), "0.weight")
    report = found.report()
    step, weight = (one / one.norm() for one in (found.descent, found.weight))
    for row, value, vector in zip(report.table, found.values, found.vectors, strict=True):
        assert row["eigenvalue"] == float(value)
        assert row["share of the step"] == pytest.approx(float((vector @ step) ** 2))
        assert row["share of the weights"] == pytest.approx(float((vector @ weight) ** 2))
    assert sum(report["share of the step"]) == pytest.approx(1.0)  # the step lies in the range of the operator
    assert len(report.table) == 24 - 3  # connections of all outputs of 8 examples, less their mean
    assert report["share of the step in the first 2"] == pytest.approx(sum(report["share of the step"][:2]))
    assert report["length, covariance"] == pytest.approx(1.0)
    assert report["largest eigenvalue"] == float(found.values[0])


@pytest.mark.parametrize("layer", ["0.weight", "2.weight"])
def test_the_pairs_are_the_gradient_of_the_nce_loss(layer):
    model, data = network(), views()
    found = contrastive_operator(model, data, layer, loss="nce", temperature=0.4)
    assert torch.allclose(found.exact, found.descent, atol=1e-12)
    report = found.report()
    assert report["cosine, exact"] == pytest.approx(1.0)
    assert report["length, exact"] == pytest.approx(1.0)


def test_the_weighted_covariance_by_a_slow_loop():
    model, data, temperature = network(), views(n=5, each=3), 0.4
    found = contrastive_operator(model, data, "0.weight", loss="nce", temperature=temperature)
    outputs = model(data.flatten(0, 1)).view(5, 3, 3).detach()
    means = found.connections.mean(dim=1)
    operator = torch.zeros(35, 35, dtype=torch.float64)
    for i in range(5):
        for a, b in itertools.permutations(range(3), 2):
            scores = torch.stack([-(outputs[i, a] - outputs[k, b]).square().sum() / 2 for k in range(5)])
            beta = (scores / temperature).softmax(dim=0)
            for k in range(5):
                if k != i:
                    gap = means[i] - means[k]
                    operator += float(beta[k]) * gap @ gap.T / (6 * 5 * temperature)
    assert torch.allclose(operator @ found.weight, found.predicted)
    assert float(found.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(operator)[-1]))


def test_without_augmentation_the_weighted_covariance_is_exact():
    data = views(noise=0.0)
    found = contrastive_operator(network(), data, "0.weight", loss="nce")
    assert torch.allclose(found.predicted, found.descent, atol=1e-12)


def test_with_many_views_it_is_near():
    data = views(n=24, each=12, noise=0.1)
    report = contrastive_operator(network(), data, "0.weight", loss="nce").report()
    assert report["cosine, covariance"] > 0.99


def test_what_augmentation_changes_is_not_in_the_operator():
    model = nn.Linear(2, 1, bias=False)
    data = torch.tensor([[[1.0, 5.0], [1.0, -5.0]], [[-1.0, 5.0], [-1.0, -5.0]]])
    found = contrastive_operator(model, data, "weight")
    assert found.vectors.abs().tolist() == [[pytest.approx(1.0), pytest.approx(0.0)]]
    assert found.report()["eigenvalue"] == [pytest.approx(2.0)]


def test_hidden_units_take_up_what_survives():
    """One bit that is in all views and four that are not: gradient steps turn the first layer towards the first."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (32, 1, 1), generator=generator).double().expand(32, 6, 1)
    noise = torch.randint(0, 2, (32, 6, 4), generator=generator).double()
    data = 2 * torch.cat([bits, noise], dim=2) - 1
    model = network()

    def share() -> float:
        weight = model[0].weight.detach()
        return float(weight[:, 0].square().sum() / weight.square().sum())

    before = share()
    for _ in range(60):
        found = contrastive_operator(model, data, "0.weight")
        with torch.no_grad():
            model[0].weight += 5 * found.predicted.view(7, 5)
            model[0].weight /= model[0].weight.norm()
    assert share() > max(0.8, before)


def test_refusals():
    data = views()
    with pytest.raises(Error, match=r"did you mean '0.weight'"):
        contrastive_operator(network(), data, "0.weights")
    with pytest.raises(Error, match="homogeneous"):
        contrastive_operator(network(bias=True), data, "0.weight")
    with pytest.raises(Error, match="examples is at least 2"):
        contrastive_operator(network(), data[:1], "0.weight")
    with pytest.raises(Error, match="views are"):
        contrastive_operator(network(), data[:, 0, 0], "0.weight")
    with pytest.raises(Error, match="2 views for nce"):
        contrastive_operator(network(), data[:, :1], "0.weight", loss="nce")
    with pytest.raises(Error, match="loss is one of"):
        contrastive_operator(network(), data, "0.weight", loss="triplet")
    with pytest.raises(Error, match="not all finite"):
        contrastive_operator(network(), data * math.nan, "0.weight")
    with pytest.raises(Error, match="one row of outputs"):
        contrastive_operator(nn.Sequential(network(), nn.Unflatten(1, (3, 1))), data, "0.0.weight")
    for wrong in ({"loss": "triplet"}, {"loss": "nce", "temperature": 0.0}):
        with pytest.raises(Error, match=r"loss is one of|temperature is above 0"):
            contrastive_loss(data, **wrong)
    with pytest.raises(Error, match="2 views for nce"):
        contrastive_loss(data[:, :1], loss="nce")


def test_narrow_floats_are_computed_in_wider_ones():
    model, data = network().bfloat16(), views().bfloat16()
    found = contrastive_operator(model, data, "0.weight")
    wide = contrastive_operator(copy.deepcopy(model).double(), data.double(), "0.weight")
    assert torch.allclose(found.predicted, wide.predicted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.descent, wide.descent, rtol=1e-4, atol=1e-5)
    assert contrastive_loss(data).dtype == torch.float32


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(network(), nn.Dropout(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    contrastive_operator(model, views(), "0.0.weight")
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
