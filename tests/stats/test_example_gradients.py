"""Gradients of single examples, against backward passes one by one, and projections that keep inner products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats import example_gradients, fitted, project


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()


def data(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64), torch.arange(count) % 4


def by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    model = copy.deepcopy(model).eval()
    rows = []
    for x, y in zip(*batch, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_each_row_is_one_backward_pass(at_once: int):
    model, (inputs, labels) = network(), data()
    found = example_gradients(model, [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])], at_once=at_once)
    torch.testing.assert_close(found, by_hand(model, (inputs, labels)))


def test_other_weights_and_a_pattern():
    model, other, batch = network(), network(5), data()
    expected = by_hand(other, batch)
    found = example_gradients(model, [batch], weights=other)
    torch.testing.assert_close(found, expected)
    last = example_gradients(model, [batch], weights=other.state_dict(), pattern="3.*")
    torch.testing.assert_close(last, expected[:, -36:])


def test_the_projection_is_one_matrix_of_signs(monkeypatch: pytest.MonkeyPatch):
    """Whatever the chunks of examples; and the matrix, read off basis vectors, has entries of one size."""
    monkeypatch.setattr("weightsmith.stats._example_gradients.BLOCK", 5)
    model, batch = network(), data()
    exact = example_gradients(model, [batch])
    names = {name: p.numel() for name, p in model.named_parameters()}
    basis = torch.eye(exact.shape[1], dtype=torch.float64).split(list(names.values()), dim=1)
    matrix = project(dict(zip(names, basis, strict=True)), dim=6, seed=3)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 6**-0.5))
    assert abs(float(matrix.sign().mean())) < 0.2
    assert len({tuple(row) for row in matrix.tolist()}) > 30  # blocks do not repeat each other
    for at_once in (2, 64):
        torch.testing.assert_close(
            example_gradients(model, [batch], dim=6, seed=3, at_once=at_once), exact @ matrix, rtol=1e-5, atol=1e-6
        )


def test_inner_products_stay():
    generator = torch.Generator().manual_seed(0)
    vectors = {"a": torch.randn(6, 900, generator=generator), "b": torch.randn(6, 10, 50, generator=generator)}
    whole = torch.cat([vectors["a"], vectors["b"].flatten(1)], dim=1)
    whole_gram = whole @ whole.T
    errors = []
    for dim in (100, 3000):
        short = project(vectors, dim)
        errors.append(float((short @ short.T - whole_gram).norm() / whole_gram.norm()))
    assert errors[1] < 0.06 < errors[0] < 0.4


def test_signs_go_by_name_and_seed():
    value = {"w": torch.ones(1, 50)}
    assert torch.equal(project(value, 20), project({"w": torch.ones(1, 50), "z": torch.zeros(1, 9)}, 20))
    assert not torch.equal(project(value, 20), project(value, 20, seed=1))
    assert not torch.equal(project(value, 20), project({"v": torch.ones(1, 50)}, 20))


class Awkward(nn.Module):
    """Decides by the data, which vectorised passes cannot."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > -1e9 else x


def test_a_model_that_cannot_be_vectorised_is_asked_example_by_example():
    torch.testing.assert_close(example_gradients(Awkward(), [data()]), example_gradients(network(), [data()]))


def test_the_model_and_the_random_state_are_left_as_they_were():
    model, batch = network().train(), data()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].bias.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    example_gradients(model, [batch], dim=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model.training
    assert not model[3].bias.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_gives_float32():
    layer = nn.Linear(2, 3).bfloat16()
    found = example_gradients(layer, [(torch.ones(2, 2).bfloat16(), torch.tensor([0, 1]))])
    assert found.dtype == torch.float32
    assert found.shape == (2, 9)


def test_fitted_takes_either_name_of_a_tied_tensor_and_casts():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    found = fitted(model, {"b.weight": torch.eye(2, dtype=torch.float64), "extra": torch.ones(1)})
    assert list(found) == ["a.weight"]
    assert found["a.weight"].dtype == torch.float32
    with pytest.raises(Error, match=r"they lack a\.weight"):
        fitted(model, {"extra": torch.ones(1)})
    with pytest.raises(Error, match=r"a\.weight \[3, 2\] into \[2, 2\]"):
        fitted(model, {"a.weight": torch.ones(3, 2)})


def test_what_it_refuses():
    model, batch = network(), data()
    with pytest.raises(Error, match="at least one example"):
        example_gradients(model, [])
    with pytest.raises(Error, match="dim is at least 1, got 0"):
        example_gradients(model, [batch], dim=0)
    with pytest.raises(Error, match="at_once is at least 1, got 0"):
        example_gradients(model, [batch], at_once=0)
    with pytest.raises(Error, match="fits 'nothing'"):
        example_gradients(model, [batch], pattern="nothing")
    with pytest.raises(Error, match=r"one number, got \[1, 4\]"):
        example_gradients(model, [batch], loss=lambda m, b: m(b[0]))
    with pytest.raises(Error, match="at least one tensor"):
        project({}, 3)


class Scaled(nn.Module):
    """One of its parameters is a plain number, one is empty."""

    def __init__(self):
        super().__init__()
        self.size, self.none = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.zeros(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.size + self.none.sum()


def test_parameters_that_are_plain_numbers_count_as_well():
    inputs = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    found = example_gradients(Scaled(), [inputs], loss=lambda m, x: m(x).sum())
    assert found.tolist() == [[3.0], [8.0]]
    short = example_gradients(Scaled(), [inputs], loss=lambda m, x: m(x).sum(), dim=4)
    torch.testing.assert_close(short.norm(dim=1), found[:, 0])


def test_a_projection_needs_as_many_vectors_of_every_tensor():
    with pytest.raises(Error, match="'b' has 3, others 2"):
        project({"a": torch.ones(2, 4), "b": torch.ones(3, 4)}, 5)
