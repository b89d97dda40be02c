"""The same curves as loss-landscapes and the same curvature as PyHessian, where these are right."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import weightsmith as ws


def networks() -> list[nn.Sequential]:
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        made.append(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval())
    return made


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)


def test_the_line_between_two_models_as_loss_landscapes():
    theirs: Any = pytest.importorskip("loss_landscapes", reason="loss-landscapes is not installed")
    from loss_landscapes.metrics import Loss

    first, second, _ = networks()
    metric = Loss(nn.CrossEntropyLoss(), *data())
    ours = ws.inspect.landscape.path(first, [first, second], None, [data()], steps=11)
    expected = theirs.linear_interpolation(copy.deepcopy(first), copy.deepcopy(second), metric, steps=10)
    # theirs leaves out the start
    assert ours["loss"][1:] == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_plane_of_three_models_as_loss_landscapes():
    theirs: Any = pytest.importorskip("loss_landscapes", reason="loss-landscapes is not installed")
    from loss_landscapes.metrics import Loss

    first, second, third = networks()
    metric = Loss(nn.CrossEntropyLoss(), *data())
    directions = tuple(ws.inspect.landscape.between(first, other) for other in (second, third))
    ours = ws.inspect.landscape.plane(first, None, [data()], directions=directions, span=(0, 1), steps=6)
    expected = theirs.planar_interpolation(*map(copy.deepcopy, (first, second, third)), metric, steps=5)
    surface = ours.plots[0].surface
    assert surface is not None
    found = torch.tensor(surface.z).T  # theirs has the first direction down
    for i, row in enumerate(expected.tolist()):
        # theirs steps before it measures: on the way there all is one step further than it says
        shift = 1 if i % 2 == 0 else 0
        assert row == pytest.approx(found[i, shift : shift + 5].tolist(), rel=1e-4)


def curvature() -> tuple[Any, nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    theirs: Any = pytest.importorskip("pyhessian", reason="pyhessian is not installed")
    net = networks()[0]
    return theirs.hessian(copy.deepcopy(net), nn.CrossEntropyLoss(), data=data(), cuda=False), net, data()


def test_the_largest_eigenvalues_as_pyhessian():
    theirs, net, batch = curvature()
    torch.manual_seed(0)
    expected, vectors = theirs.eigenvalues(maxIter=500, tol=1e-6, top_n=2)
    found = ws.inspect.landscape.top_eigen(net, None, [batch], count=2, tolerance=1e-5)
    assert found.values == pytest.approx(expected, rel=2e-2)
    assert found.values[0] >= expected[0] - 1e-5  # power iteration comes from below
    ours = torch.cat([found.vectors[0][name].reshape(-1) for name in found.vectors[0]])
    other = torch.cat([part.reshape(-1) for part in vectors[0]])
    assert abs(float(ours @ other)) > 0.99


def test_the_trace_as_pyhessian():
    theirs, net, batch = curvature()
    torch.manual_seed(0)
    samples = torch.tensor(theirs.trace(maxIter=400, tol=0))
    found = ws.inspect.landscape.trace(net, None, [batch], probes=400, at_once=50)
    error = math.hypot(found["standard error"], float(samples.std()) / 20)
    assert abs(found["trace"] - float(samples.mean())) < 4 * error


def test_the_spectral_density_as_pyhessian(monkeypatch: pytest.MonkeyPatch):
    theirs, net, batch = curvature()

    def eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    monkeypatch.setattr(torch, "eig", eig, raising=False)  # gone from PyTorch; without it theirs does not run
    torch.manual_seed(0)
    values, weights = (torch.tensor(found) for found in theirs.density(iter=30, n_v=40))
    mean, square = (float((weights * values**power).sum(1).mean()) for power in (1, 2))
    found = ws.inspect.landscape.spectral_density(net, None, [batch], steps=30, probes=40)
    ours, shares = (torch.tensor(found[name]) for name in ("eigenvalue", "weight"))
    assert float(ours.max()) == pytest.approx(float(values.max()), rel=1e-3)
    assert float(shares @ ours) == pytest.approx(mean, rel=0.2, abs=1e-3)
    assert float(shares @ ours**2) == pytest.approx(square, rel=0.3)


def test_a_product_as_torch():
    _, net, batch = None, networks()[0], data()
    vector = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    names = list(vector)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(net, dict(zip(names, values, strict=True)), batch[0])
        return functional.cross_entropy(logits, batch[1])

    _, expected = torch.autograd.functional.hvp(loss, tuple(net.parameters()), tuple(vector.values()))
    found = ws.inspect.landscape.hvp(net, vector, None, [batch])
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
