"""Decay of the weights that the loss does not feel, against plain weight decay; and how far a threshold goes."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.prune.sparse import exponential_gate, irrelevant_decay, linear_gate, threshold_within, weights_of
from weightsmith.prune.sparse._irrelevant import decayed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def stepped(model, optimizer, steps=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(9, 5, generator=generator)
        nn.functional.cross_entropy(model(x), torch.arange(9) % 3).backward()
        optimizer.step()
    return model


def everything(gradient):
    return torch.ones_like(gradient)


def groups(model, decay):
    matrices = list(weights_of(model).values())
    others = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]


@pytest.mark.parametrize("foreach", [False, True])
def test_with_a_gate_of_one_it_is_adamw(foreach):
    plain, ours = network(), network()
    stepped(plain, torch.optim.AdamW(groups(plain, 0.3), lr=0.05, foreach=foreach))
    optimizer = torch.optim.AdamW(groups(ours, 0.0), lr=0.05, foreach=foreach)
    irrelevant_decay(optimizer, weights_of(ours).values(), 0.3, gate=everything)
    stepped(ours, optimizer)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_with_a_gate_of_one_it_is_the_decay_of_sgd():
    plain, ours = network().double(), network().double()
    for model, decay in ((plain, 0.3), (ours, 0.0)):
        optimizer = torch.optim.SGD(groups(model, decay), lr=0.05)
        if model is ours:
            irrelevant_decay(optimizer, weights_of(ours).values(), 0.3, gate=everything)
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            optimizer.zero_grad()
            x = torch.randn(9, 5, generator=generator).double()
            nn.functional.cross_entropy(model(x), torch.arange(9) % 3).backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_rate_is_the_group_s_own_and_others_do_not_decay():
    w, v, free = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [w, free], "lr": 0.5}, {"params": [v], "lr": 0.25}])
    handle = irrelevant_decay(optimizer, [w, v], 0.2, gate=everything)
    for p in (w, v, free):
        p.grad = torch.zeros(2)
    optimizer.step()
    assert w.tolist() == pytest.approx([0.9, 0.9])
    assert v.tolist() == pytest.approx([0.95, 0.95])
    assert free.tolist() == [1.0, 1.0]
    handle.remove()
    optimizer.step()
    assert w.tolist() == pytest.approx([0.9, 0.9])


def test_weights_without_a_gradient_stay_and_frozen_ones_too():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.5)
    irrelevant_decay(optimizer, [w], 0.2)
    optimizer.step()
    assert w.tolist() == [1.0, 1.0]


def test_gates_by_hand():
    g = torch.tensor([0.0, 3.0, -4.0, 1.0])
    unit = math.sqrt((9 + 16 + 1) / 4)
    for scale, by in ((None, unit), (2.0, 2.0)):
        expected = [math.exp(-abs(x) / by) for x in g.tolist()]
        assert exponential_gate(g, scale).tolist() == pytest.approx(expected)
        expected = [max(0.0, 1 - abs(x) / by) for x in g.tolist()]
        assert linear_gate(g, scale).tolist() == pytest.approx(expected)
    for gate in (exponential_gate, linear_gate):
        assert gate(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert g.tolist() == [0.0, 3.0, -4.0, 1.0]
    assert exponential_gate(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gates_of_gradients_whose_squares_leave_the_range(size):
    for gate in (exponential_gate, linear_gate):
        shares = gate(torch.tensor([0.0, 0.1, 1.0]) * size)
        torch.testing.assert_close(shares, gate(torch.tensor([0.0, 0.1, 1.0]), 1.0))


def test_one_step_by_hand_and_in_bfloat16():
    w = torch.tensor([2.0, -1.0, 4.0])
    g = torch.tensor([0.0, 1.0, -2.0])
    expected = [x * (1 - 0.5 * math.exp(-abs(y))) for x, y in zip(w.tolist(), g.tolist(), strict=True)]
    narrow = w.bfloat16()
    decayed([w, narrow], [g, g.bfloat16()], 0.5, lambda gradient: exponential_gate(gradient, 1.0))
    assert w.tolist() == pytest.approx(expected)
    assert narrow.dtype == torch.bfloat16
    assert narrow.tolist() == torch.tensor(expected).bfloat16().tolist()
    seen = []
    decayed([w, narrow], [None, g.bfloat16()], 0.5, lambda gradient: seen.append(gradient.dtype) or gradient)
    assert seen == [torch.float32]
    again = torch.tensor([2.0])
    decayed([again], [torch.zeros(1)], torch.tensor(0.5))
    assert again.tolist() == [1.0]


def test_foreign_weights_are_refused():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.5)
    with pytest.raises(Error, match="none of the optimizer's"):
        irrelevant_decay(optimizer, [nn.Parameter(torch.ones(2))])
    with pytest.raises(Error, match="got none"):
        irrelevant_decay(optimizer, [])
    with pytest.raises(Error, match="below 0"):
        irrelevant_decay(optimizer, [w], -1.0)


@pytest.mark.parametrize("tolerance", [0.0, 0.35, 1.0, 1e9])
def test_the_threshold_is_the_largest_that_keeps_the_score(tolerance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    size = torch.cat([model[i].weight.detach().flatten() for i in (0, 1)]).abs().sort().values
    whole = float(size.sum())
    calls = []

    def score(module):
        calls.append(1)
        return float(sum(module[i].weight.detach().abs().sum() for i in (0, 1)))

    found = threshold_within(model, score, tolerance)
    by_hand = int((size.double().cumsum(0) <= tolerance + 1e-6).sum())
    assert found.sparsity == by_hand / 50
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 1)) == by_hand
    assert found.score == pytest.approx(score(model))
    assert found.score >= whole - tolerance - 1e-5
    assert len(calls) <= 10
    for name, mask in found.masks.items():
        assert torch.equal(mask, model.get_parameter(name) != 0)


def test_a_reference_a_resolution_and_a_failing_evaluation():
    model = nn.Linear(10, 10)
    before = model.weight.detach().clone()
    assert threshold_within(model, lambda module: 0.0, 0.1, reference=1.0).sparsity == 0.0
    assert torch.equal(model.weight, before)
    calls = []
    threshold_within(model, lambda module: calls.append(1) or 0.0, 0.1, resolution=0.25)
    assert len(calls) <= 5
    model = nn.Linear(10, 10)
    before = model.weight.detach().clone()

    def score(module):
        if (module.weight == 0).any():
            raise RuntimeError("no data")
        return 1.0

    with pytest.raises(RuntimeError):
        threshold_within(model, score)
    assert torch.equal(model.weight, before)
    for tolerance in (-0.1, math.nan):
        with pytest.raises(Error, match="tolerance"):
            threshold_within(model, score, tolerance)
