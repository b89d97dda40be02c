"""The change of the loss with one more example: by a loop, and against its bound."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.landscape import growth
from weightsmith.inspect.landscape._growth import _changes, _fit, _norms, _steps


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, (x[:, 0] > 0).long()


def test_changes_by_a_loop():
    table = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, most = _changes(table, 4, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(12, generator=generator).tolist() for _ in range(4)]
    for k in range(1, 12):
        changes = []
        for order in orders:
            for row in table.tolist():
                before = sum(row[i] for i in order[:k]) / k
                after = sum(row[i] for i in order[: k + 1]) / (k + 1)
                changes.append(abs(after - before))
        assert float(mean[k - 1]) == pytest.approx(sum(changes) / len(changes))
        assert float(most[k - 1]) == pytest.approx(max(changes))


def test_fit_finds_the_power():
    k = torch.arange(10, 500)
    assert _fit(k, 3 * k.double() ** -1.25) == pytest.approx((-1.25, 3.0))
    with_zeros = 3 * k.double() ** -1.25
    with_zeros[5] = 0
    assert _fit(k, with_zeros)[0] == pytest.approx(-1.25)


def test_steps_have_the_radius_and_stay_in_the_span():
    net = network()
    generator = torch.Generator().manual_seed(0)
    for step in _steps(net, None, "*", 3, 0.7, generator):
        assert sum(float(step[n].square().sum()) for n in step) == pytest.approx(0.49)
    axes = [{"0.bias": torch.tensor([1.0, 0, 0, 0])}, {"0.bias": torch.tensor([0.0, 1, 0, 0])}]
    for step in _steps(net, axes, "*", 3, 2.0, generator):
        assert list(step) == ["0.bias"]
        assert float(step["0.bias"].norm()) == pytest.approx(2)
        assert not step["0.bias"][2:].any()
    assert list(next(_steps(net, None, "2.*", 1, 1.0, generator))) == ["2.weight", "2.bias"]


def test_norms_of_single_examples():
    net, (x, y) = network(), data(4)
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients, hessians = _norms(
        net, (x, y), lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="none"), [0, 2], "*", 0
    )
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for at, gradient, hessian in zip((0, 2), gradients, hessians, strict=True):

        def loss(vector: torch.Tensor, at: int = at) -> torch.Tensor:
            parts = vector.split([p.numel() for p in parameters])
            values = {n: v.reshape(p.shape) for n, v, p in zip(names, parts, parameters, strict=True)}
            return functional.cross_entropy(torch.func.functional_call(net, values, x[at : at + 1]), y[at : at + 1])

        assert gradient == pytest.approx(float(torch.func.grad(loss)(flat).norm()))
        norm = float(torch.linalg.matrix_norm(torch.func.hessian(loss)(flat), 2))
        assert hessian == pytest.approx(norm, rel=1e-3)


def test_norms_are_sizes_also_where_the_loss_bends_down():
    net, batch = nn.Linear(3, 1).double(), data(3)
    up, down = (
        _norms(net, batch, lambda m, b, sign=sign: sign * m(b[0])[:, 0].square(), [1], "*", 0)[1][0] for sign in (1, -1)
    )
    assert up == pytest.approx(down)
    assert down == pytest.approx(2 * (float(batch[0][1].square().sum()) + 1))


def test_growth_falls_as_one_over_k_within_its_bound():
    net, (x, y) = network(), data(300)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    before = copy.deepcopy(net.state_dict())
    found = growth(net, (x, y), radius=0.2, curved=300)
    assert found["slope"] == pytest.approx(-1, abs=0.15)
    assert found["share within the bound"] == 1.0
    assert found["share of means within the bound"] == 1.0
    each = functional.cross_entropy(net(x), y, reduction="none").detach()
    assert found["largest loss"] == pytest.approx(float(each.max()))
    assert found["loss at the minimum"] == pytest.approx(float(each.mean()))
    row = found.table[-1]
    bound = 2 / (row["examples"] + 1) * (
        found["largest loss"] + 0.2 * found["largest gradient"] + 0.02 * found["largest Hessian"])  # fmt: skip
    assert row["bound"] == pytest.approx(bound)
    k, means = found.plots[0].lines[0].x, found.plots[0].lines[0].y
    paper = [2 / (i + 1) * (found["largest loss"] + 0.04 * found["largest Hessian"]) for i in k]
    share = sum(m <= b for m, b in zip(means, paper, strict=True)) / len(k)
    assert found["share of means within the bound without gradients"] == pytest.approx(share)
    assert found["mean change"][0] <= found["largest change"][0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    plain = growth(net, (x, y), radius=0.2, curved=0)
    assert "largest Hessian" not in plain.figures
    assert plain["slope"] == found["slope"]
    assert growth(net, (x, y), radius=0.2, curved=0, batch=7)["slope"] == pytest.approx(found["slope"])


def test_growth_takes_a_loss_and_refuses():
    net, (x, y) = network(), data()
    one = growth(net, (x, y), lambda m, b: (m(b[0])[:, 0] - b[1]).square(), curved=2)
    assert one["largest Hessian"] > 0
    with pytest.raises(Error, match="at least 12 examples"):
        growth(net, (x[:5], y[:5]))
    with pytest.raises(Error, match="one number an example"):
        growth(net, (x, y), lambda m, b: m(b[0]).sum())
    with pytest.raises(Error, match="radius"):
        growth(net, (x, y), radius=0)
    with pytest.raises(Error, match="points is at least 1"):
        growth(net, (x, y), points=0)
    with pytest.raises(Error, match="directions are zero"):
        growth(net, (x, y), directions=[{"0.bias": torch.zeros(4)}])


def test_growth_along_anything_that_opens():
    net, (x, y) = network(), data()
    along = growth(net, (x, y), directions=[net, net], points=3, orders=2, curved=0)
    axis = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert along["slope"] == growth(net, (x, y), directions=[axis, axis], points=3, orders=2, curved=0)["slope"]
    with pytest.raises(Error, match="at least one direction"):
        growth(net, (x, y), directions=[])
    with pytest.raises(Error, match="one number an example"):
        growth(net, (x, y), lambda m, b: 1.0)
