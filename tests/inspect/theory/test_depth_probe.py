"""Networks at their start: against exact moments, and a model that is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.theory import depth_ensemble, depth_probe


def test_linear_networks_have_known_moments():
    found = depth_ensemble([20] + [20] * 4 + [20], "linear", networks=4000, seed=1)
    for layer, row in enumerate(found.rows()):
        assert row["kernel"] == pytest.approx(1, abs=0.05)
        assert row["gradient"] == pytest.approx(1, abs=0.1)
        assert row["excess kurtosis"] == pytest.approx((1 + 2 / 20) ** layer - 1, abs=0.06)
    assert found["tangent share"] == pytest.approx([1 / 5] * 5, abs=0.02)


def test_kernel_follows_a_start_that_is_off():
    found = depth_ensemble([50] + [50] * 6 + [50], "relu", weight_scale=2.4, networks=300)
    assert found["kernel, last over first"] == pytest.approx(1.2**6, rel=0.15)
    assert found["gradient, first over last"] == pytest.approx(1.2**6, rel=0.25)


def test_biases_and_gelu_stay_at_the_fixed_point():
    found = depth_ensemble([300] * 5, "gelu", networks=100)
    assert found["kernel"] == pytest.approx([found["kernel, theory"][0]] * 4, rel=0.1)


def test_ensemble_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch):
    one = depth_ensemble([5, 6, 6, 2], "tanh", networks=3000)
    monkeypatch.setattr("weightsmith.inspect.theory._depth_probe._AT_ONCE", 36 * 700)
    with torch.no_grad():  # the draws differ, their averages do not
        other = depth_ensemble([5, 6, 6, 2], "tanh", networks=3000)
    for what in ("kernel", "gradient", "tangent share"):
        assert one[what] == pytest.approx(other[what], rel=0.08)
    with pytest.raises(Error, match="at least 2 networks"):
        depth_ensemble([5, 5, 5], "relu", networks=1)


def test_depth_probe_against_gradients_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False))
    x = torch.randn(5, 6)
    found = depth_probe(model, x)
    first, last = model[0](x).detach(), model[2].weight.detach()
    out = first.relu() @ last.T
    gradient = (out @ last) * (first > 0)
    assert found["layer"] == ["0", "2"]
    assert found["kernel"] == pytest.approx([float(first.square().mean()), float(out.square().mean())], rel=1e-5)
    expected = [float(one.square().sum(1).mean()) for one in (gradient, out)]
    assert found["gradient"] == pytest.approx(expected, rel=1e-5)
    assert found["fan in"] == [6, 8]
    assert found["weight scale"][1] == pytest.approx(float(last.var(correction=0)) * 8, rel=1e-5)


def test_depth_probe_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2)).train()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    depth_probe(model, torch.randn(3, 1, 6, generator=torch.Generator().manual_seed(0)).bfloat16().float())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not model[0]._forward_hooks
    with pytest.raises(Error, match="the model has none"):
        depth_probe(nn.ReLU(), torch.ones(2, 2))
    with pytest.raises(Error, match="do not come from"):
        depth_probe(nn.Linear(2, 2), torch.ones(2, 2), forward=lambda model, batch: batch)
