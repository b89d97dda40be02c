"""Attributions, against captum and shap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from weightsmith.inspect.attribution import deeplift, integrated_gradients, shapley


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 2), nn.Tanh(),
            nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, 3),
        ).double().eval()  # fmt: skip


def data(seed: int, count: int = 5) -> Tensor:
    return torch.randn(count, 1, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [("gauss-legendre", "gausslegendre"), ("middle", "riemann_middle"), ("left", "riemann_left"), ("trapezoid", None)],
)
def test_integrated_gradients_of_captum(rule, theirs):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    model, inputs, base = network(), data(1), data(2)
    target = torch.tensor([0, 1, 2, 0, 1])
    found = integrated_gradients(model, inputs, target=target, baselines=base, steps=11, rule=rule)
    if theirs is None:  # captum's trapezoid has other weights: the integral itself is the same
        found = integrated_gradients(model, inputs, target=target, baselines=base, steps=600, rule=rule)
        expected = captum.IntegratedGradients(model).attribute(
            inputs, base, target, n_steps=300, method="gausslegendre"
        )
        torch.testing.assert_close(found.values, expected, rtol=0.02, atol=1e-3)
        return
    expected = captum.IntegratedGradients(model).attribute(inputs, base, target, n_steps=11, method=theirs)
    torch.testing.assert_close(found.values, expected)


def test_deeplift_of_captum():
    """Without a max pool: there captum's parts do not sum to the change."""
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    model, inputs, base = network(), data(1), data(2)
    model[3] = nn.AvgPool2d(3, 2)
    expected = captum.DeepLift(model).attribute(inputs, base, target=1)
    torch.testing.assert_close(deeplift(model, inputs, target=1, baselines=base).values, expected)
    hidden = captum.LayerDeepLift(model, model[4]).attribute(inputs, base, target=1)
    torch.testing.assert_close(deeplift(model, inputs, target=1, baselines=base, layer="4").values, hidden.detach())


def test_shapley_values_of_shap():
    shap = pytest.importorskip("shap", reason="shap is not installed")
    weights = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(seen: Tensor) -> Tensor:
        x = seen.double()
        return torch.tanh(x @ weights) + x[:, 0] * x[:, 1] * x[:, 2]

    explainer = shap.ExactExplainer(
        lambda x: value(torch.tensor(x > 0.5)).numpy(), shap.maskers.Independent(torch.zeros(1, 6).numpy())
    )
    expected = explainer(torch.ones(1, 6).numpy()).values[0]
    assert shapley(value, 6).values.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
