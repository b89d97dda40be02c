"""The sampled diagonal against the dense Hessian, and Hessian times gradient against both written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.stats import Curvature, Gradients, collect, combine, curvature, gradients, hessian_gradient


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(*cuts: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (7,), generator=generator)
    return list(zip(inputs.split(cuts), labels.split(cuts), strict=True))


def dense(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The Hessian and the gradient of the mean loss over all of the data, by the parameters in a row."""
    inputs, labels = batches(7)[0]
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.reshape(v.shape) for part, v in zip(flat.split(sizes), values, strict=True)]
        outputs = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (inputs,))
        return functional.cross_entropy(outputs, labels)

    flat = torch.cat([value.detach().reshape(-1) for value in values])
    return torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat)


def joined(found) -> Tensor:
    return torch.cat([found[name].reshape(-1) for name in found])


@pytest.mark.parametrize("cuts", [(7,), (5, 2)])
def test_a_diagonal_hessian_is_found_exactly(cuts):
    layer = nn.Linear(3, 1, bias=False).double()
    scales = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    bends = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)[:, None]

    def loss(model, batch):  # of every example, (s_i w_i)^2, the last one downwards
        return len(batch[0]) * (bends * model(torch.diag(scales)) ** 2).sum()

    found = curvature(layer, batches(*cuts), loss=loss)
    torch.testing.assert_close(found["weight"], torch.tensor([[2.0, 32.0, -8.0]], dtype=torch.float64))


@pytest.mark.parametrize("cuts", [(7,), (4, 3)])
def test_many_draws_come_to_the_dense_diagonal(cuts):
    model = network()
    exact = dense(model)[0].diagonal()
    few, many = (joined(curvature(model, batches(*cuts), draws=draws)) for draws in (1, 500))
    assert float((many - exact).norm() / exact.norm()) < 0.15
    assert float((many - exact).norm()) < float((few - exact).norm())


def test_gauss_newton_leaves_out_the_network_itself():
    """For a linear model both matrices are one; else only that of a convex loss has no negative diagonal."""
    linear = nn.Linear(3, 3).double()
    one, other = (curvature(linear, batches(7), draws=3, matrix=m) for m in ("hessian", "gauss_newton"))
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    model = network()
    found = joined(curvature(model, batches(7), draws=400, matrix="gauss_newton"))
    inputs, _ = batches(7)[0]
    names = [name for name, _ in model.named_parameters()]
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(
        {name: p.detach() for name, p in model.named_parameters()}
    )
    rows = torch.cat([jacobian[name].reshape(7, 3, -1) for name in names], dim=2)
    chances = model(inputs).detach().softmax(-1)
    bend = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    exact = torch.einsum("nap,nab,nbp->p", rows, bend, rows) / 7
    assert float((found - exact).norm() / exact.norm()) < 0.1
    assert float((found - dense(model)[0].diagonal()).norm()) > float((found - exact).norm())


def test_a_seed_fixes_what_is_drawn_and_batches_have_signs_of_their_own():
    model = network()
    state = torch.random.get_rng_state()
    one, same, other = (joined(curvature(model, batches(7), seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    inputs, labels = batches(7)[0]
    twice = joined(curvature(model, [(inputs, labels)] * 2, seed=3))
    assert not torch.allclose(one, twice)  # the mean of two draws


def test_shards_combine():
    model = network()
    parts = [curvature(model, [batch], seed=i) for i, batch in enumerate(batches(5, 2))]
    expected = (5 * joined(parts[0]) + 2 * joined(parts[1])) / 7
    torch.testing.assert_close(joined(combine(*parts)), expected)


@pytest.mark.parametrize("cuts", [(7,), (4, 3), (1,) * 7])
def test_hessian_times_gradient_is_exact(cuts):
    model = network()
    hessian, gradient = dense(model)
    torch.testing.assert_close(joined(hessian_gradient(model, batches(*cuts))), hessian @ gradient)


def test_hessian_times_gradient_of_data_that_is_read_once():
    model = network()
    torch.testing.assert_close(
        joined(hessian_gradient(model, iter(batches(4, 3)))), joined(hessian_gradient(model, batches(7)))
    )


def test_hessian_times_gradient_of_some_parameters_is_theirs_alone():
    model = network()
    hessian, gradient = dense(model)
    found = hessian_gradient(model, batches(7), pattern="0.*")
    assert list(found) == ["0.weight", "0.bias"]
    torch.testing.assert_close(joined(found), hessian[:16, :16] @ gradient[:16])
    with pytest.raises(Error, match="do not say of how many examples"):
        combine(found, found)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)).double().train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = curvature(model, batches(7))
    hessian_gradient(model, batches(7))
    assert found["0.weight"].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_attention_has_second_derivatives():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, x):
            y = self.mix(x)[None, None]
            return functional.scaled_dot_product_attention(y, y, y)[0, 0]

    for statistic in (curvature, hessian_gradient):
        assert joined(statistic(Attends().double(), batches(7))).isfinite().all()


def test_beside_gradients_in_one_pass():
    model = network()
    found = collect(model, batches(5, 2), {"h": Curvature(draws=2), "g": Gradients()})
    torch.testing.assert_close(found["g"]["0.weight"], gradients(model, batches(7))["0.weight"])
    torch.testing.assert_close(found["h"]["0.weight"], curvature(model, batches(5, 2), draws=2)["0.weight"])


def test_tied_parameters_move_together():
    """(a + a) x for one weight: the curvature of (2 a x)^2 / 2 is 4 x^2."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.one(x) + self.two(x)

    found = curvature(Twice(), [torch.full((1, 1), 3.0)], loss=lambda m, b: (m(b) ** 2).sum() / 2)
    assert float(found["one.weight"]) == pytest.approx(36)
    assert found.ties == {"two.weight": "one.weight"}


def test_bf16_gives_float32():
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    found = curvature(layer, [torch.ones(2, 2, dtype=torch.bfloat16)], loss=lambda m, b: (m(b) ** 2).sum())
    assert found["weight"].dtype == torch.float32
    assert found["weight"].isfinite().all()


def test_what_is_not_finite_is_an_error():
    def loss(model, batch):
        return (model(batch[0]) ** 2).sum() * float("inf")

    for statistic in (curvature, hessian_gradient):
        with pytest.raises(Error, match=r"0\.weight.*not finite"):
            statistic(network(), batches(7), loss=loss)


def test_refusals():
    with pytest.raises(Error, match="draws"):
        curvature(network(), batches(7), draws=0)
    with pytest.raises(Error, match="matrix is one of"):
        curvature(network(), batches(7), matrix="fisher")  # type: ignore[arg-type]
    with pytest.raises(Error, match="at least one batch"):
        curvature(network(), [])
    with pytest.raises(Error, match="one number"):
        hessian_gradient(network(), batches(7), loss=lambda m, b: m(b[0]))
