"""Hessian products, traces, eigenvalues, spectra and diagonals, against the dense Hessian of tiny networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.landscape import diagonal, hvp, spectral_density, top_eigen, trace
from weightsmith.inspect.landscape._curvature import curvature_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    return [(x[:12], y[:12]), (x[12:], y[12:])]


def dense(net: nn.Module, chosen: str = "") -> torch.Tensor:
    """The Hessian of the mean over all 20 examples."""
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    names = [name for name, _ in net.named_parameters() if name.startswith(chosen)]
    values = {name: p.detach() for name, p in net.named_parameters()}
    shapes = [values[name].shape for name in names]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.reshape(s) for part, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        given = values | dict(zip(names, parts, strict=True))
        return functional.cross_entropy(torch.func.functional_call(net, given, x), y)

    return torch.func.hessian(loss)(torch.cat([values[name].reshape(-1) for name in names]))


def flat(weights) -> torch.Tensor:
    return torch.cat([weights[name].reshape(-1) for name in weights])


@pytest.mark.parametrize("single", [True, False])
def test_hvp_is_the_dense_hessian(single: bool):
    net, parts = network(), batches()
    if single:
        parts = [tuple(torch.cat(pair) for pair in zip(*parts, strict=True))]
    matrix = dense(net)
    with curvature_of(net, None, parts) as curvature:
        assert curvature.size == len(matrix)
        found = curvature(torch.eye(curvature.size, dtype=torch.float64))
        torch.testing.assert_close(found, matrix, rtol=0, atol=1e-10)
        torch.testing.assert_close(curvature(torch.eye(len(matrix), dtype=torch.float64)[:, 3:4])[:, 0], matrix[3])
    vector = {"2.weight": torch.randn(3, 5, dtype=torch.float64)}
    whole = torch.cat([torch.zeros(20, dtype=torch.float64), vector["2.weight"].reshape(-1), torch.zeros(3).double()])
    product = hvp(net, vector, None, parts)
    assert list(product) == [name for name, _ in net.named_parameters()]
    torch.testing.assert_close(flat(product), matrix @ whole, rtol=0, atol=1e-10)


def test_hvp_of_some_parameters_is_a_block():
    net = network()
    with curvature_of(net, None, batches(), pattern="2.*") as curvature:
        found = curvature(torch.eye(curvature.size, dtype=torch.float64))
    torch.testing.assert_close(found, dense(net, "2."), rtol=0, atol=1e-10)


def test_hvp_gauss_newton_is_the_jacobian_squared():
    net = network()
    (x, _), (z, _) = batches()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def outputs(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), torch.cat([x, z]))

    jacobians = torch.func.jacrev(outputs, argnums=tuple(range(4)))(*parameters)
    jacobian = torch.cat([j.reshape(20, 3, -1) for j in jacobians], dim=2)
    chances = net(torch.cat([x, z])).softmax(1)
    bends = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    expected = (torch.einsum("nkp,nkl,nlq->pq", jacobian, bends, jacobian) / 20).detach()
    with curvature_of(net, None, batches(), "gauss_newton") as curvature:
        found = curvature(torch.eye(curvature.size, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    def own(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    vector = {"0.bias": torch.ones(5, dtype=torch.float64)}
    a = hvp(net, vector, own, batches(), matrix="gauss_newton")
    b = hvp(net, vector, None, batches(), matrix="gauss_newton")
    torch.testing.assert_close(flat(a), flat(b))


def test_the_model_is_as_before():
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)).double()
    net[3].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, needs = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    random = torch.get_rng_state()
    full = trace(net, None, batches(), probes=2)
    assert full["parameters"] == sum(p.numel() for p in net.parameters())  # what is frozen counts as well
    top_eigen(net, None, batches(), steps=3)
    with pytest.raises(Error):
        hvp(net, {}, lambda model: model[0].weight)
    assert net.training
    assert needs == [p.requires_grad for p in net.parameters()]
    assert bool((net[0].weight.grad == 1).all())
    assert net[3].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_trace_against_the_dense_one():
    net = network()
    truth = float(dense(net).trace())
    for method in ("hutchinson", "hutch++"):
        found = trace(net, None, batches(), probes=600, method=method, at_once=50)
        assert abs(found["trace"] - truth) < 4 * found["standard error"] + 1e-9
        assert found["mean eigenvalue"] == pytest.approx(found["trace"] / 38)
    apart = trace(net, None, batches(), probes=6, seed=3)
    assert trace(net, None, batches(), probes=6, seed=3, at_once=4)["trace"] == pytest.approx(apart["trace"])
    with pytest.raises(Error, match="method is one of"):
        trace(net, None, batches(), method="exact")  # type: ignore[arg-type]
    with pytest.raises(Error, match="probes is at least 1"):
        trace(net, None, batches(), probes=0)


def test_top_eigen_against_the_dense_ones():
    net = network()
    matrix = dense(net)
    values = torch.linalg.eigvalsh(matrix)
    found = top_eigen(net, None, batches(), count=3, ends="both", tolerance=1e-9, steps=38)
    expected = [*values.flip(0)[:3].tolist(), *values[:3].flip(0).tolist()]
    assert found.values == pytest.approx(expected, abs=1e-7)
    assert found.converged
    for value, vector in zip(found.values, found.vectors, strict=True):
        assert float((matrix @ flat(vector) - value * flat(vector)).norm()) < 1e-6
        assert float(flat(vector).norm()) == pytest.approx(1)
    assert found.report()["eigenvalue"] == list(found.values)
    rough = top_eigen(net, None, batches(), steps=2, tolerance=1e-12)
    assert not rough.converged
    assert "Not all are converged" in rough.report().notes[0]


def test_top_eigen_finds_equal_eigenvalues_and_flat_losses():
    net = nn.Linear(3, 2, bias=False)
    equal = top_eigen(net, lambda m: 2 * m.weight.square().sum(), count=4)
    assert equal.values == pytest.approx([4.0] * 4, rel=1e-5)
    flat_one = top_eigen(net, lambda m: m.weight.sum(), count=2, ends="both")
    assert flat_one.values == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(Error, match="cannot find 7"):
        top_eigen(net, lambda m: m.weight.sum(), count=7)


def test_spectral_density_has_the_moments_and_ends():
    net = network()
    matrix = dense(net)
    values = torch.linalg.eigvalsh(matrix)
    found = spectral_density(net, None, batches(), steps=38, probes=40)
    assert found["largest"] == pytest.approx(float(values[-1]), abs=1e-8)
    assert found["least"] == pytest.approx(float(values[0]), abs=1e-8)
    assert sum(found["weight"]) == pytest.approx(1)
    assert found["trace"] == pytest.approx(float(matrix.trace()), rel=0.1)
    assert found["share below 0"] == pytest.approx(float((values < 0).double().mean()), abs=0.15)
    largest = max(map(abs, found["eigenvalue"]))
    near = sum(w for e, w in zip(found["eigenvalue"], found["weight"], strict=True) if abs(e) <= 0.01 * largest)
    assert found["share near 0"] == pytest.approx(near)
    drawn = found.plots[0].lines[0]
    step = drawn.x[1] - drawn.x[0]
    assert sum(drawn.y) * step == pytest.approx(1, abs=0.02)
    with pytest.raises(Error, match="width"):
        spectral_density(net, None, batches(), width=0)
    nothing = spectral_density(nn.Linear(2, 1), lambda m: m.weight.sum())
    assert nothing["share below 0"] == 0
    assert nothing["share near 0"] == 1


def test_diagonal_against_the_dense_one():
    net = network()
    found = diagonal(net, None, batches(), probes=4000, at_once=200)
    torch.testing.assert_close(flat(found), dense(net).diagonal(), rtol=0, atol=0.02)
    assert found["0.weight"].shape == (5, 3)
    some = diagonal(net, None, batches(), probes=3, pattern="*.bias")
    assert list(some) == ["0.bias", "2.bias"]


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(3, 4, 8)
    found = trace(net, lambda m: m(x).pow(2).mean() + functional.scaled_dot_product_attention(
        m.linear1.weight[None, :4], x[:1], x[:1]).square().sum(), probes=2)  # fmt: skip
    assert found["trace"] == found["trace"]


def test_what_is_refused():
    net = network()
    with pytest.raises(Error, match="matrix is one of"):
        hvp(net, {}, None, batches(), matrix="fisher")  # type: ignore[arg-type]
    with pytest.raises(Error, match="no weight"):
        trace(net, None, batches(), pattern="3.*")
    with pytest.raises(Error, match="no parameter that was chosen"):
        hvp(net, {"x": torch.ones(1)}, None, batches())
    with pytest.raises(Error, match=r"0.bias is \[1\]"):
        hvp(net, {"0.bias": torch.ones(1)}, None, batches())
    with pytest.raises(Error, match="calls model"):
        hvp(net, {}, lambda m: next(m.parameters()).square().sum(), matrix="gauss_newton")
    with pytest.raises(Error, match="once"):
        hvp(net, {}, lambda m, b: m(b[0]).sum() + m(b[0]).sum(), batches(), matrix="gauss_newton")
    with pytest.raises(Error, match="not finite"):
        top_eigen(net, lambda m: m[0].weight.square().sum() * float("nan"))


def test_a_parameter_without_values_takes_no_rows():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.none = nn.Parameter(torch.zeros(2, 0))
            self.some = nn.Parameter(torch.ones(3))
            self.one = nn.Parameter(torch.ones(()))

    found = hvp(Some(), {"some": torch.ones(3), "one": torch.tensor(2.0)}, lambda m: (m.some**2).sum() * m.one / 2)
    assert found["none"].shape == (2, 0)
    assert found["some"].tolist() == [3.0] * 3  # 1 of its own, and 2 through the other
    assert float(found["one"]) == 3.0


def test_a_loss_without_a_gradient_is_said():
    for matrix in ("hessian", "gauss_newton"):
        with pytest.raises(Error, match="the loss has no gradient"):
            hvp(network(), {}, lambda m, b: m(b[0]).sum().item(), batches(), matrix=matrix)


def test_the_gauss_newton_matrix_of_a_deep_network_has_no_negative_eigenvalue():
    ends = [top_eigen(network(), None, batches(), ends="smallest", matrix=matrix, tolerance=1e-8).values[0]
            for matrix in ("hessian", "gauss_newton")]  # fmt: skip
    assert ends[0] < -1e-3
    assert ends[1] > -1e-9
