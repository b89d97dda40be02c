"""How fast weights move: by hand, and at the balance of steps and decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.training import (
    UpdateRates,
    angular_update,
    equilibrium_angle,
    relative_update,
    updates,
)


def test_relative_and_angular_updates_by_hand():
    before, after = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 3.0]])
    assert relative_update(before, after) == pytest.approx(1.0)
    assert angular_update(before, after) == pytest.approx(math.pi / 4)
    assert angular_update(before, -before) == pytest.approx(math.pi)
    assert angular_update(before, 7 * before) == 0
    tiny = torch.tensor([3.0, 3e-9], dtype=torch.float64)
    assert angular_update(torch.tensor([3.0, 0.0]), tiny) == pytest.approx(1e-9)
    assert math.isinf(relative_update(torch.zeros(2), torch.ones(2)))
    assert relative_update(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isnan(angular_update(torch.zeros(2), torch.ones(2)))


def test_updates_between_checkpoints():
    path = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    checkpoints = [{"w": torch.tensor(place), "count": torch.tensor(3)} for place in path]
    found = updates(checkpoints, rate=0.5)
    row = found.table[0]
    assert len(found.table) == 1  # counters are no weights
    assert row["relative update"] == pytest.approx(math.sqrt(2))
    assert row["angle"] == pytest.approx(math.pi / 2)
    assert row["path"] == pytest.approx(2 / math.sqrt(2))
    assert row["effective rate"] == pytest.approx(0.5)
    assert (row["norm"], row["new norm"]) == (1.0, 1.0)
    shorter = updates([{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 1.0])}])
    assert (shorter["norm"], shorter["new norm"]) == ([5.0], [1.0])
    tied = torch.ones(2, 2)
    assert updates([{"embed": tied, "head": tied}, {"embed": 2 * tied, "head": 2 * tied}])["tensor"] == ["embed"]
    with pytest.raises(Error, match="at least 2"):
        updates(checkpoints[:1])
    with pytest.raises(Error, match="no float tensor"):
        updates(checkpoints, pattern="count")
    with pytest.raises(Error, match="differ"):
        updates([{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    with pytest.raises(Error, match="same tensors"):
        updates([{"w": torch.ones(2)}, {"v": torch.ones(2)}])


def test_recorder_by_a_slow_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = UpdateRates(model)
    name, noted = "2.weight", []
    for _ in range(4):
        before = model[2].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        watch.step(0.1)
        after = model[2].weight.detach()
        noted.append((float(before.norm()), float((after - before).norm()), relative_update(before, after)))
    row = next(row for row in watch.report(last=0.5).table if row["tensor"] == name)
    assert row["norm"] == pytest.approx((noted[2][0] + noted[3][0]) / 2, rel=1e-5)
    assert row["update"] == pytest.approx((noted[2][1] + noted[3][1]) / 2, rel=1e-4)
    assert row["relative update"] == pytest.approx((noted[2][2] + noted[3][2]) / 2, rel=1e-4)
    assert row["effective rate"] == pytest.approx((0.1 / noted[2][0] ** 2 + 0.1 / noted[3][0] ** 2) / 2, rel=1e-5)
    assert watch.report()["steps"] == 4


def test_rates_by_name_and_refusals():
    model = nn.Linear(1, 1)
    watch = UpdateRates(model)
    with pytest.raises(Error, match="at least one step"):
        watch.report()
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    watch.step({"weight": 0.1, "bias": 0.2})
    watch.step({"weight": 0.1, "bias": 0.2})
    found = watch.report(last=0.01)
    assert found["effective rate"] == pytest.approx([0.1 / 4, 0.2 / 9])
    with pytest.raises(Error, match="share"):
        watch.report(last=0.0)
    with pytest.raises(Error, match="none for bias"):
        watch.step({"weight": 0.1})
    for options in ({"decay": -1.0}, {"momentum": 1.0}, {"optimizer": "lion"}):
        with pytest.raises(Error, match=r"momentum in|optimizer is one of"):
            UpdateRates(model, **options)
    for measure in (relative_update, angular_update):
        with pytest.raises(Error, match="one shape"):
            measure(torch.ones(2), torch.ones(2, 2))


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.8), ("adamw", 0.0), ("adamw", 0.8)])
def test_scale_invariant_weights_settle_at_the_angle_of_the_formula(optimizer, momentum):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(400, generator=generator) / 4)
    holder = nn.Module()
    holder.weight = weight
    rate, decay = 0.05, 0.1
    if optimizer == "sgd":
        made = torch.optim.SGD([weight], lr=rate, momentum=momentum, weight_decay=decay)
    else:
        made = torch.optim.AdamW([weight], lr=rate, betas=(momentum, 0.99), weight_decay=decay)
    watch = UpdateRates(holder, decay=decay, momentum=momentum, optimizer=optimizer)
    for _ in range(800):
        flat = weight.detach()  # a random gradient, orthogonal to the weight and falling with its length
        noise = torch.randn(400, generator=generator)
        noise -= noise @ flat / flat.square().sum() * flat
        weight.grad = noise / flat.norm()
        made.step()
        watch.step(rate)
    found = watch.report(last=0.5)
    expected = equilibrium_angle(rate, decay, momentum=momentum, optimizer=optimizer)
    assert found["angle at equilibrium"] == pytest.approx(expected)
    assert found["mean angle"] == pytest.approx(expected, rel=0.05)


def test_the_rate_of_the_balance_is_that_of_the_last_steps():
    watch = UpdateRates(nn.Linear(1, 1), decay=0.5)
    for rate in (8.0, 4.0, 1.0, 1.0):
        watch.step(rate)
    assert watch.report(last=0.5)["angle at equilibrium"] == pytest.approx(1.0)
