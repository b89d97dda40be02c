"""The penalty that is zero and presses small weights, against its formula by hand; and when the pressing stops."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.prune.sparse import Press, adaptive_training, hypersparse, press_step
from weightsmith.prune.sparse._hypersparse import BEND, Candidate
from weightsmith.weights import Weights


def by_autograd(weights, sparsity):
    """The definition, with its stopped gradient, and the magnitude found by sorting."""
    flat = torch.cat([w.flatten() for w in weights]).abs()
    s = 0.65847895 / flat.detach().sort().values[math.floor(sparsity * len(flat))]
    bent = torch.tanh(s * flat).sum()
    return (flat * bent / bent.detach()).sum() - flat.sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_value_and_gradient_are_those_of_the_definition(sparsity):
    torch.manual_seed(0)
    weights = [torch.randn(4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64) * 10]
    ours = [w.clone().requires_grad_() for w in weights]
    theirs = [w.clone().requires_grad_() for w in weights]
    value = hypersparse(ours, sparsity)
    value.backward()
    by_autograd(theirs, sparsity).backward()
    assert value.item() == 0.0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_gradient_by_hand():
    w = torch.tensor([0.1, -0.2, 3.0], requires_grad=True)
    hypersparse([w], 0.5).backward()
    s = BEND / 0.2
    bent = [math.tanh(s * x) for x in (0.1, 0.2, 3.0)]
    ratio = 3.3 / sum(bent)
    expected = [sign * s * (1 - t * t) * ratio for sign, t in zip((1, -1, 1), bent, strict=True)]
    torch.testing.assert_close(w.grad, torch.tensor(expected))
    # At the magnitude of the cut the slope of tanh is two thirds.
    assert w.grad[1].item() == pytest.approx(-s * 2 / 3 * ratio)


def test_large_weights_are_free_and_small_ones_are_not():
    torch.manual_seed(0)
    w = torch.randn(1000, requires_grad=True)
    hypersparse([w], 0.9).backward()
    order = w.detach().abs().argsort()
    size = w.grad.abs()[order]
    assert (size.diff() <= 1e-6).all()
    assert size[-1] < 0.2 * size[0]
    assert torch.equal(w.grad.sign(), w.detach().sign())


def test_where_everything_is_gone_already_nothing_is_pressed():
    w = torch.tensor([0.0, 0.0, 0.0, 2.0], requires_grad=True)
    value = hypersparse([w], 0.5)
    value.backward()
    assert value.item() == 0.0
    assert w.grad.tolist() == [0.0, 0.0, 0.0, 0.0]
    zeros = torch.zeros(3, requires_grad=True)
    hypersparse([zeros], 0.5).backward()
    assert zeros.grad.tolist() == [0.0, 0.0, 0.0]


def test_weights_almost_zero_give_no_nan():
    w = torch.tensor([1e-40, 1e-40, 10.0, 20.0], requires_grad=True)
    value = hypersparse([w], 0.25)
    value.backward()
    assert value.item() == 0.0
    assert w.grad.isfinite().all()
    assert w.grad[2:].tolist() == [0.0, 0.0]


def test_bfloat16_gets_bfloat16_gradients_of_a_float32_computation():
    w = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    wide = w.detach().float().requires_grad_()
    hypersparse([w], 0.5).backward()
    hypersparse([wide], 0.5).backward()
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad, wide.grad.bfloat16())


def test_refusals():
    with pytest.raises(Error, match="needs weights"):
        hypersparse([], 0.5)
    with pytest.raises(Error, match="share in"):
        hypersparse([torch.ones(2)], 1.0)
    with pytest.raises(Error, match="empty"):
        hypersparse([torch.ones(0)], 0.5)


def candidate(accuracy, epoch):
    return Candidate(accuracy, Weights.of({"w": torch.tensor([float(epoch)])}), Weights.of({}), epoch)


def test_it_stops_when_the_mean_of_a_window_exceeds_the_dense_accuracy_and_keeps_the_middle():
    state, seen = Press(), []
    for epoch, accuracy in enumerate((0.5, 0.6, 0.5, 0.9, 0.9, 0.9)):
        before = state
        state = press_step(state, candidate(accuracy, epoch), dense=0.8, window=3)
        assert before.epoch == epoch
        assert len(before.recent) == min(epoch, 3)
        seen.append((round(state.best_mean, 4), state.best.epoch, state.done))
    assert seen == [
        (0.5, 0, False),
        (0.55, 1, False),
        (0.55, 1, False),
        (0.6667, 2, False),
        (0.7667, 3, False),
        (0.9, 4, True),
    ]


def test_the_penalty_grows_every_epoch_and_the_module_ends_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    strengths, pruned = [], iter((0.1, 0.2, 0.3, 0.9, 0.9, 0.9))

    def train(module, penalty):
        module.zero_grad()
        penalty().backward()
        gradient = module[0].weight.grad.clone()
        module.zero_grad()
        hypersparse([module[0].weight, module[2].weight], 0.75).backward()
        strengths.append((gradient / module[0].weight.grad).mean().item())

    def accuracy(module):
        return next(pruned) if (module[0].weight == 0).any() else 0.5

    state = adaptive_training(model, train, accuracy, 0.75, amount=0.01, growth=2.0)
    assert strengths == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
    assert state.done
    assert state.best.epoch == 3
    assert state.best.accuracy == 0.9
    zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 2))
    assert zeros == round(0.75 * 64)
    for name, mask in state.best.masks.items():
        assert torch.equal(mask, model.get_parameter(name) != 0)


def test_it_ends_after_the_last_epoch_and_a_failing_evaluation_leaves_the_module():
    model = nn.Linear(4, 2)
    state = adaptive_training(model, lambda module, penalty: None, lambda module: 0.5, 0.5, epochs=2)
    assert state.epoch == 2
    assert not state.done
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()

    def accuracy(module):
        if (module.weight == 0).any():
            raise RuntimeError("no data")
        return 0.5

    with pytest.raises(RuntimeError, match="no data"):
        adaptive_training(model, lambda module, penalty: None, accuracy, 0.5)
    assert torch.equal(model.weight, before)
    with pytest.raises(Error, match="was NaN"):
        adaptive_training(model, lambda module, penalty: None, lambda module: math.nan, 0.5, epochs=2)
    assert torch.equal(model.weight, before)
    for wrong in ({"sparsity": 1.0}, {"window": 2}, {"epochs": 0}, {"amount": 0.0}, {"growth": math.nan}):
        with pytest.raises(Error, match="adaptive_training"):
            adaptive_training(model, lambda module, penalty: None, accuracy, **wrong)
