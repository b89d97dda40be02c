"""Langevin dynamics on posteriors that are known, and mean predictions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.landscape import langevin, predictions


def regression() -> tuple[nn.Linear, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Linear regression with unit noise; the mean and covariance of its posterior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + torch.randn(50, generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv(x.T @ x + torch.eye(2) / 0.25)
    net = nn.Linear(2, 1, bias=False).double()
    return net, [(x[:25], y[:25]), (x[25:], y[25:])], covariance @ x.T @ y, covariance


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean() / 2


def test_langevin_samples_the_posterior():
    net, batches, mean, covariance = regression()
    whole = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    found = langevin(net, loss, whole, examples=50, rate=4e-3, prior=0.5, steps=8000, burn=500, samples=1500)
    drawn = torch.stack([sample["weight"][0] for sample in found.samples])
    torch.testing.assert_close(drawn.mean(dim=0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.2, atol=0.003)
    colder = langevin(net, loss, whole, examples=50, rate=4e-3, prior=0.5, steps=4000, burn=500, samples=700,
                      temperature=0.25)  # fmt: skip
    cold = torch.stack([sample["weight"][0] for sample in colder.samples])
    torch.testing.assert_close(cold.T.cov().diagonal(), covariance.diagonal() / 4, rtol=0.3, atol=0.001)


def test_langevin_without_noise_is_descent_by_hand():
    net, batches, *_ = regression()
    found = langevin(net, loss, batches, examples=50, rate=0.01, prior=0.5, steps=5, burn=1, samples=4,
                     temperature=0, decay=0.5)  # fmt: skip
    weight = net.weight.detach().clone().requires_grad_()
    for step in range(5):
        x, y = batches[step % 2]
        value = ((x @ weight[0]) - y).square().mean() / 2
        assert found.losses[step] == pytest.approx(float(value.detach()))
        (slope,) = torch.autograd.grad(value, weight)
        size = 0.01 / (1 + step) ** 0.5
        weight = (weight - size / 2 * (50 * slope + weight / 0.25)).detach().requires_grad_()
        if step:
            torch.testing.assert_close(found.samples[step - 1]["weight"], weight.detach())
    assert found.report()["samples"] == 4


def test_langevin_leaves_the_model_alone():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].bias.requires_grad_(False)
    x, y = torch.randn(8, 2), torch.randint(0, 2, (8,))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = langevin(net, None, [(x, y)], examples=8, rate=1e-3, steps=4, burn=0, samples=2, pattern="2.*")
    assert [sorted(sample) for sample in found.samples] == [["2.bias", "2.weight"]] * 2
    assert not torch.equal(found.samples[0]["2.bias"], found.samples[1]["2.bias"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert net.training
    assert not net[0].bias.requires_grad
    again = langevin(net, None, [(x, y)], examples=8, rate=1e-3, steps=4, burn=0, samples=2, pattern="2.*")
    assert torch.equal(again.samples[1]["2.bias"], found.samples[1]["2.bias"])


def test_langevin_refuses():
    net, batches, *_ = regression()
    for options, words in (
        ({"examples": 0}, "examples is at least 1"),
        ({"rate": 0.0}, "rate is above 0"),
        ({"steps": 10}, "at least 510 steps"),
        ({"rate": 1e6}, "smaller rate"),
    ):
        with pytest.raises(Error, match=words):
            langevin(net, loss, batches, **({"examples": 50, "rate": 0.01} | options))


def test_predictions_are_the_mean_of_the_probabilities():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    samples = [{"3.weight": torch.randn(2, 4)} for _ in range(3)]
    x = torch.randn(7, 3)
    before = copy.deepcopy(net.state_dict())
    found = predictions(net, samples, iter([x[:4], (x[4:], torch.zeros(3))]))
    net.eval()
    by_hand = torch.zeros(7, 2)
    for sample in samples:
        by_hand += torch.func.functional_call(net, sample, x).softmax(dim=1) / 3
    torch.testing.assert_close(found, by_hand.detach())
    assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(Error, match="at least 1 sample"):
        predictions(net, [], [x])
    with pytest.raises(Error, match="at least one batch"):
        predictions(net, samples, [])


def test_langevin_wants_a_prior_and_a_loss_with_a_gradient():
    net, batches, *_ = regression()
    with pytest.raises(Error, match="prior is above 0; for weight it is 0"):
        langevin(net, loss, batches, examples=50, rate=0.01, prior=0.0)
    with pytest.raises(Error, match="the loss has no gradient"):
        langevin(net, lambda m, b: loss(m, b).item(), batches, examples=50, rate=0.01)
    with pytest.raises(Error, match="at least one batch"):
        langevin(net, loss, type("No", (), {"__iter__": lambda self: iter([])})(), examples=50, rate=0.01)
