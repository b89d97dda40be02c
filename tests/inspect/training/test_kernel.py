"""Tangent kernels: exact on linear models, by a loop elsewhere."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.training import (
    kernel_alignment,
    kernel_change,
    kernel_rank,
    label_alignment,
    linear_share,
    ntk,
)


def network(width: int = 5, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def data(n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes_by_loop(model, inputs):
    """``[n][c]`` to the gradient by name."""
    rows = []
    for one in inputs:
        outputs = model(one[None])[0]
        rows.append([torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in outputs])
    return rows


def test_ntk_by_a_slow_loop():
    model, inputs = network(), data()
    rows = slopes_by_loop(model, inputs)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    whole = torch.zeros(6, 2, 6, 2, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            for a in range(2):
                for b in range(2):
                    dot = sum(float((g * h).sum()) for g, h in zip(rows[i][a], rows[j][b], strict=True))
                    whole[i, a, j, b] = dot
                    if a == b:
                        expected[i, j] += dot / 2
    assert torch.allclose(ntk(model, inputs)["all"], expected)
    assert torch.allclose(ntk(model, inputs, at_once=4)["all"], expected)
    assert torch.allclose(ntk(model, inputs, whole=True)["all"], whole)


def test_layers_sum_to_the_whole():
    model, inputs = network(), data()
    found = ntk(model, inputs, by_layer=True)
    assert list(found) == ["all", "0", "2"]
    assert torch.allclose(found["0"] + found["2"], found["all"])
    assert torch.allclose(ntk(model, inputs, pattern="2.*")["all"], found["2"])
    hidden = model[1](model[0](inputs))
    assert torch.allclose(found["2"], hidden @ hidden.T + 1)  # the last layer's kernel is that of its features


class Attention(nn.Module):
    """Of few tokens, by the function that has kernels without a second derivative."""

    def __init__(self):
        super().__init__()
        self.heads, self.out = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, inputs):
        query, key, value = (part[:, None] for part in self.heads(inputs).chunk(3, dim=2))
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value)[:, 0].mean(dim=1))


def test_attention_has_a_tangent():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Attention(), torch.randn(4, 5, 3)
    near = {name: value + 1e-3 for name, value in model.state_dict().items()}
    found = kernel_change(model, inputs, [model, near], labels=torch.tensor([0, 1, 0, 1]))
    assert found["linear share"] > 0.99
    assert 0 < found["kernel distance"] < 0.01


def test_narrow_floats_are_computed_in_wider_ones():
    model, inputs = nn.Linear(3, 2).to(torch.bfloat16), data().bfloat16()
    moved = {name: value + 0.01 for name, value in model.state_dict().items()}
    assert linear_share(model, inputs, model, moved) == pytest.approx(1.0, abs=1e-6)
    first = data().float().bfloat16().double()
    expected = first @ first.T + 1
    assert torch.allclose(ntk(model, inputs)["all"].double(), expected, rtol=1e-5)


def test_a_layer_called_all_is_not_the_whole():
    model = nn.Sequential()
    model.add_module("all", nn.Linear(3, 2))
    with pytest.raises(Error, match='called "all"'):
        ntk(model, data().float(), by_layer=True)
    assert list(ntk(model, data().float())) == ["all"]


def test_projected_kernels_are_near():
    model, inputs = network(width=400), data()
    exact, near = ntk(model, inputs)["all"], ntk(model, inputs, dim=300)["all"]
    assert 0 < float((exact - near).norm() / exact.norm()) < 0.2


def test_kernel_of_a_checkpoint():
    model, inputs, other = network(), data(), network(seed=1)
    assert torch.allclose(ntk(model, inputs, weights=other)["all"], ntk(other, inputs)["all"])


def test_alignment_by_hand():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    a, b = centre @ first @ centre, centre @ second @ centre
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert kernel_alignment(first, second) == pytest.approx(expected)
    plain = float((first * second).sum() / (first.norm() * second.norm()))
    assert kernel_alignment(first, second, centred=False) == pytest.approx(plain)
    assert math.isnan(kernel_alignment(first, torch.zeros(4, 4)))
    assert math.isnan(kernel_alignment(first, torch.full((4, 4), 0.1)))  # centred, it is zero but for rounding
    with pytest.raises(Error, match="same examples"):
        kernel_alignment(first, torch.zeros(3, 3))


def test_label_alignment_of_classes_and_targets():
    labels = torch.tensor([0, 0, 1, 2])
    ideal = (labels[:, None] == labels).double()
    assert label_alignment(3 * ideal + 7, labels) == pytest.approx(1.0)
    assert label_alignment(ideal, labels - 100) == pytest.approx(1.0)  # any integers
    assert label_alignment(ideal, labels == 0) < 1
    targets = torch.tensor([1.0, -1.0, 0.5, -0.5])
    assert label_alignment(torch.outer(targets, targets), targets) == pytest.approx(1.0)
    assert label_alignment(torch.eye(4), labels) < 0.9
    with pytest.raises(Error, match="do not fit"):
        label_alignment(torch.eye(4), labels[:3])


def test_rank_counts_equal_directions():
    assert kernel_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0]))) == pytest.approx(2.0)
    assert kernel_rank(torch.zeros(2, 2)) == 0
    assert math.isnan(kernel_rank(torch.full((2, 2), math.nan)))


def test_linear_models_are_lazy_and_their_kernel_stays():
    model = nn.Linear(3, 2).double()
    moved = {name: value + 1 for name, value in model.state_dict().items()}
    assert linear_share(model, data(), model, moved) == pytest.approx(1.0)
    found = kernel_change(model, data(), [model, moved])
    assert found["alignment with the first"] == pytest.approx(1.0)
    assert found["kernel distance"] == pytest.approx(0.0, abs=1e-12)
    assert found["linear share"] == pytest.approx(1.0)


def test_linear_share_by_finite_differences():
    model, inputs, other = network(), data(), network(seed=1)
    start, end = dict(model.named_parameters()), dict(other.named_parameters())

    def outputs(amount: float) -> torch.Tensor:
        values = {name: start[name] + amount * (end[name] - start[name]) for name in start}
        return torch.func.functional_call(model, values, (inputs,)).detach()

    tangent = (outputs(1e-5) - outputs(-1e-5)) / 2e-5
    change = outputs(1.0) - outputs(0.0)
    expected = 1 - float((change - tangent).square().sum() / change.square().sum())
    assert linear_share(model, inputs, model, other) == pytest.approx(expected, rel=1e-5)
    assert linear_share(model, inputs, model, other, at_once=4) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(Error, match="at least one example"):
        linear_share(model, inputs[:0], model, other)
    assert math.isnan(linear_share(model, inputs, model, copy.deepcopy(model)))


def test_change_by_hand():
    model, inputs, other = network(), data(), network(seed=1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    found = kernel_change(model, inputs, [model, other], labels=labels, by_layer=True)
    first, last = ntk(model, inputs, by_layer=True), ntk(other, inputs, by_layer=True)
    row = next(row for row in found.table if row["checkpoint"] == 1 and row["layer"] == "2")
    assert row["alignment"] == pytest.approx(kernel_alignment(first["2"], last["2"]))
    assert row["distance"] == pytest.approx(1 - kernel_alignment(first["2"], last["2"], centred=False))
    assert row["label alignment"] == pytest.approx(label_alignment(last["2"], labels))
    assert row["effective rank"] == pytest.approx(kernel_rank(last["2"]))
    assert row["trace"] == pytest.approx(float(last["2"].trace() / first["2"].trace()))
    before = torch.cat([model[2].weight.flatten(), model[2].bias]).detach()
    after = torch.cat([other[2].weight.flatten(), other[2].bias]).detach()
    assert row["moved"] == pytest.approx(float((after - before).norm() / before.norm()))
    assert found["label alignment, last"] == pytest.approx(label_alignment(last["all"], labels))

    def first_output(asked, batch):
        return asked(batch)[:, :1]

    part = kernel_change(model, inputs, [model, other], forward=first_output)
    first, last = (ntk(one, inputs, forward=first_output)["all"] for one in (model, other))
    assert part["alignment with the first"] == pytest.approx(kernel_alignment(first, last))
    assert part["linear share"] == pytest.approx(linear_share(model, inputs, model, other, forward=first_output))
    with pytest.raises(Error, match="2 checkpoints"):
        kernel_change(model, inputs, [model])
    with pytest.raises(Error, match="do not fit"):
        kernel_change(model, inputs, [model, other], labels=labels[:2])


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    moved = {name: value + 1 if value.is_floating_point() else value for name, value in before.items()}
    inputs = data().float()
    kernel_change(model, inputs, [before, moved], by_layer=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_what_cannot_be_asked():
    model = network()
    with pytest.raises(Error, match="at least one example"):
        ntk(model, data()[:0])
    with pytest.raises(Error, match="fits"):
        ntk(model, data(), pattern="nothing")
    with pytest.raises(Error, match="dim"):
        ntk(model, data(), dim=0)
    half = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    found = ntk(half, torch.ones(2, 2, dtype=torch.bfloat16))["all"]
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0, 2.0], [2.0, 2.0]]
