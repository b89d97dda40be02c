"""Dead and dormant units, ranks of features: by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.training import dead_units, feature_rank, plasticity


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def data(n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def test_units_by_a_slow_loop():
    model, (inputs, labels) = network(), data()
    with torch.no_grad():
        model[0].bias[2] = -100.0  # dead
        model[0].weight[3] *= 1e-3  # dormant: nearly dead
        model[0].bias[3] = 1e-4
        model[2].weight[1] = 0.0  # constant
    found = dead_units(model, [(inputs[:13], labels[:13]), (inputs[13:], labels[13:])], tau=0.025)
    for row, layers in zip(found.table, (model[:2], model[:4]), strict=True):
        outputs = layers(inputs).detach()
        units = outputs.shape[1]
        mean = [sum(abs(float(outputs[i, u])) for i in range(30)) / 30 for u in range(units)]
        scores = [value / (sum(mean) / units) for value in mean]
        assert row["units"] == units
        assert row["dormant"] == sum(score <= 0.025 for score in scores)
        assert row["dead"] == sum(all(float(value) == 0 for value in outputs[:, u]) for u in range(units))
        assert row["constant"] == sum(len(set(outputs[:, u].tolist())) == 1 for u in range(units))
        assert row["mean activation"] == pytest.approx(sum(mean) / units, rel=1e-5)
        values = torch.linalg.svdvals(outputs.double())
        values = values[values > 1e-7 * values.max()]
        assert row["feature rank"] == feature_rank(values)
        shares = values / values.sum()
        assert row["effective rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)
    first, second = found.table
    assert (first["dead"], first["dormant"]) == (1, 2)
    assert second["constant"] == 1
    assert found["dead, share"] == pytest.approx(1 / 14)
    assert found["dormant, share"] == pytest.approx((first["dormant"] + second["dormant"]) / 14)


def test_channels_of_images_and_tokens():
    convolution = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU())
    convolution[0].weight.data = torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1)
    found = dead_units(convolution, [torch.rand(2, 1, 4, 4)])
    assert (found["units"], found["dead"]) == ([3], [1])
    tokens = nn.Sequential(nn.ReLU())
    assert dead_units(tokens, [torch.tensor([[[1.0, -1.0], [2.0, -2.0], [1.0, -1.0]]])])["units"] == [2]


@pytest.mark.parametrize("order", [1, -1])
def test_what_differs_between_batches_alone(order):
    """A unit that is 0 in one batch is not dead, and one of another value in each is not constant."""
    batches = [torch.tensor([[1.0, -1.0, 3.0]] * 2), torch.tensor([[2.0, 5.0, 3.0]] * 2)][::order]
    found = dead_units(nn.Sequential(nn.ReLU()), batches, tau=0.0)
    assert (found["dead"], found["constant"], found["dormant"]) == ([0], [1], [0])
    assert dead_units(nn.Sequential(nn.ReLU()), [-batches[0]], tau=0.0)["dormant"] == [2 + (order < 0)]


def test_batches_of_a_form_of_their_own():
    model, (inputs, labels) = network(), data()
    batches = [{"features": inputs, "classes": labels}]

    def forward(asked, batch):
        return asked(batch["features"])

    def loss(asked, batch):
        return functional.cross_entropy(asked(batch["features"]), batch["classes"], reduction="sum")

    found = plasticity(model, batches, [model], forward=forward, loss=loss)
    assert found.rows() == plasticity(model, [(inputs, labels)], [model]).rows()


class Twice(nn.Module):
    """One activation after two layers of different widths, as residual networks have it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False), nn.ReLU()

    def forward(self, inputs):
        return self.act(self.second(self.act(self.first(inputs))))


def test_a_module_that_is_used_twice_is_two_layers():
    model = Twice()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        model.second.weight.copy_(torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 0.0]]))
    batch = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    found = dead_units(model, [batch, batch])
    assert found["layer"] == ["act", "act, use 2"]
    assert found["units"] == [3, 2]
    assert found["dead"] == [1, 1]
    assert len(found.notes) == 1
    assert dead_units(model, [batch], layers="first").notes == []


def test_layers_by_name_and_checkpoints():
    model, other, (inputs, _) = network(), network(1), data()
    found = dead_units(model, [inputs], layers="2", weights=other)
    assert found["layer"] == ["2"]
    expected = other[:3](inputs).detach().abs().mean()
    assert found["mean activation"] == [pytest.approx(float(expected), rel=1e-5)]


def test_feature_rank_is_the_smallest_that_suffices():
    values = torch.tensor([90.0, 9.0, 0.9, 0.1])
    assert feature_rank(values, delta=0.011) == 2
    assert feature_rank(values, delta=0.009) == 3
    assert feature_rank(values, delta=0.0) == 4
    assert feature_rank(values.flip(0), delta=0.011) == 2
    assert feature_rank(torch.empty(0)) == 0
    with pytest.raises(Error, match="delta"):
        feature_rank(values, delta=1.0)
    for wrong in (math.nan, -1.0):
        with pytest.raises(Error, match="singular values"):
            feature_rank(torch.tensor([1.0, wrong]))


def test_plasticity_by_hand():
    model, (inputs, labels) = network(), data()
    worse = copy.deepcopy(model)
    with torch.no_grad():
        worse[0].bias[:4] = -50.0
        worse[2].weight *= 2
    found = plasticity(model, [(inputs, labels)], [model, worse], dim=None)
    assert found["dead"] == [0.0, pytest.approx(4 / 14)]
    rows = []
    for one in (model, worse):
        gradients = []
        for x, y in zip(inputs, labels, strict=True):
            loss = functional.cross_entropy(one(x[None]), y[None])
            parts = torch.autograd.grad(loss, list(one.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
        rows.append(torch.stack(gradients).double())
    norms = [torch.cat([p.detach().flatten() for p in one.parameters()]).norm() for one in (model, worse)]
    assert found["weight"] == [1.0, pytest.approx(float(norms[1] / norms[0]), rel=1e-5)]
    assert found["gradient"] == [pytest.approx(float(row.mean(dim=0).norm()), rel=1e-4) for row in rows]
    for place, row in enumerate(rows):
        values = torch.linalg.eigvalsh(row @ row.T).clamp(min=0)
        shares = values[values > 0] / values.sum()
        entropy = -float((shares * shares.log()).sum())
        assert found["gradient rank"][place] == pytest.approx(math.exp(entropy), rel=1e-3)
    tall = plasticity(model, [(inputs, labels)], [model], dim=5)  # more examples than numbers
    assert tall["gradient rank"][0] <= 5
    first, last = found["gradient rank"]
    assert found["gradient rank, last over first"] == pytest.approx(last / first)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).train()
    before, (inputs, labels) = copy.deepcopy(model.state_dict()), data()
    plasticity(model, [(inputs, labels)], [before])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_asked():
    model, (inputs, labels) = network(), data()
    with pytest.raises(Error, match="no activation modules"):
        dead_units(nn.Linear(4, 2), [inputs])
    with pytest.raises(Error, match="no module fits"):
        dead_units(model, [inputs], layers="conv*")
    with pytest.raises(Error, match="at least one batch"):
        dead_units(model, [])
    with pytest.raises(Error, match="layer 1 are not all finite"):
        dead_units(model, [inputs * math.nan])
    with pytest.raises(Error, match="layer 0 has 5 units, then 4"):
        dead_units(nn.Sequential(nn.ReLU()), [torch.ones(2, 5), torch.ones(2, 4)])
    broken = copy.deepcopy(model)
    broken[4].weight.data.fill_(math.nan)
    with pytest.raises(Error, match="checkpoint 1 are not all finite"):
        plasticity(model, [(inputs, labels)], [model, broken])
    with pytest.raises(Error, match="tau"):
        dead_units(model, [inputs], tau=-1)
    with pytest.raises(Error, match="sequence"):
        plasticity(model, iter([(inputs, labels)]), [model])
    with pytest.raises(Error, match="checkpoint"):
        plasticity(model, [(inputs, labels)], [])
