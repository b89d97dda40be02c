"""Null directions that were planted are counted exactly, and the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect import degeneracy
from weightsmith.inspect._degeneracy import _Layer, _see, _Units


def network(seed=0, inplace=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(inplace), nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
        )


def data(seed=0, n=200):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def rows(report):
    return {row["part"]: row for row in report.table}


def test_a_full_network_has_nothing_free_but_what_three_outputs_cannot_see():
    found = rows(degeneracy(network(), [data()]))
    assert (found["0"]["input rank"], found["0"]["of inputs"]) == (6, 6)  # with the one of the bias
    assert (found["0"]["Jacobian rank"], found["3"]["Jacobian rank"]) == (6, 8)
    assert (found["5"]["Jacobian rank"], found["5"]["free"]) == (3, 0)


def test_a_duplicated_unit_costs_exactly_one_rank_on_each_side():
    model = network()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[3].weight[:, 1] = model[3].weight[:, 0]
    found = degeneracy(model.eval(), [data()[:120], data()[120:]])
    parts = rows(found)
    assert parts["3"]["input rank"] == parts["3"]["of inputs"] - 1
    assert (parts["1"]["units"], parts["1"]["distinct"]) == (6, 5)
    assert found.figures["units that another one repeats"] == 1
    assert parts["0"]["Jacobian rank"] == parts["0"]["of outputs"] - 1
    assert parts["3"]["free"] == 7 * 8 - 6 * 8


def test_unused_inputs_and_unread_units_are_free():
    model = network()
    inputs = data()
    inputs[:, 2] = inputs[:, 0] - inputs[:, 1]
    with torch.no_grad():
        model[5].weight[:, 4] = 0
    found = rows(degeneracy(model, [inputs]))
    assert found["0"]["input rank"] == 5
    assert found["3"]["Jacobian rank"] == 7
    assert found["3"]["free"] == 7 * 8 - 7 * 7
    assert found["3"]["share free"] == pytest.approx(1 / 8)


def test_the_grams_are_those_of_the_definition():
    model, inputs = network().eval(), data(n=4)
    linear = {"3": model[3]}
    layers, units = {"3": _Layer()}, {"1": _Units()}
    generator = torch.Generator().manual_seed(0)
    _see(model, inputs, linear, {"1": model[1]}, layers, units, lambda m, b: m(b), None, generator)
    middle = model[:3](inputs).double()
    augmented = torch.cat([middle, torch.ones(4, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(layers["3"].inputs, (augmented.T @ augmented).detach())
    outputs = model[:4](inputs)
    jacobians = torch.stack([torch.autograd.functional.jacobian(model[4:], one[None])[0, :, 0] for one in outputs])
    torch.testing.assert_close(layers["3"].behind, torch.einsum("nci,ncj->ij", jacobians, jacobians).double())


def test_probes_find_the_same_ranks_and_the_same_sums_on_average():
    model, inputs = network().eval(), data()
    assert rows(degeneracy(model, [inputs], probes=8))["0"] == rows(degeneracy(model, [inputs]))["0"]
    sums = []
    for probes in (None, 400):
        layers = {"3": _Layer()}
        generator = torch.Generator().manual_seed(0)
        _see(model, inputs, {"3": model[3]}, {}, layers, {}, lambda m, b: m(b), probes, generator)
        sums.append(layers["3"].behind)
    torch.testing.assert_close(sums[1], sums[0], rtol=0.15, atol=0.05 * float(sums[0].max()))


def test_dead_and_steady_units():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, -1.0, 1.0]))
    found = rows(degeneracy(model, [torch.tensor([[1.0, 0.0], [-1.0, 0.0]])]))["1"]
    assert (found["distinct"], found["dead"], found["always on"]) == (3, 1, 1)
    with torch.no_grad():
        model[0].bias[2] = -1.0
    found = rows(degeneracy(model, [torch.tensor([[1.0, 0.0], [-1.0, 0.0]])]))["1"]
    assert (found["distinct"], found["dead"], found["always on"]) == (2, 2, 0)


def test_sequences_and_frozen_models():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    found = rows(degeneracy(model, [torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(0))]))
    assert (found["0"]["input rank"], found["2"]["Jacobian rank"]) == (5, 2)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_left_as_it_was(inplace):
    model = network(inplace=inplace).train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    degeneracy(model, [data()], probes=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_refusals(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(Error, match="no linear layer fits"):
        degeneracy(nn.ReLU(), [data()])
    with pytest.raises(Error, match="none of the linear layers was called"):
        degeneracy(network(), [])
    with pytest.raises(Error, match="tolerance above 0"):
        degeneracy(network(), [data()], tolerance=0.0)
    assert degeneracy(network(), [data()]).save(tmp_path / "r.html").exists()


def test_layers_that_are_not_asked_and_values_that_are_not_finite():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.gate = nn.Linear(5, 2), nn.Linear(5, 2), nn.ReLU()

        def forward(self, x):
            return self.gate(self.used(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Skips()
    with pytest.raises(Error, match="none of the linear layers was called"):
        degeneracy(model, [data()], pattern="unused")
    assert set(rows(degeneracy(model, [data()]))) == {"used", "gate"}
    broken = data()
    broken[3, 1] = torch.inf
    with pytest.raises(Error, match="used: its inputs"):
        degeneracy(model, [broken])
