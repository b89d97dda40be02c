"""Groups of opposing signals: found again where they were planted, with numbers by hand."""

from __future__ import annotations

import copy
import math
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.training import (
    OpposingSignals,
    example_losses,
    loss_oscillation,
    opposing_groups,
    opposing_signals,
)


def planted(n: int = 200, outliers: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes by the first feature; a few examples have a huge second feature, and half of them each label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    inputs = torch.randn(n, 6, generator=generator) * 0.3
    inputs[:, 0] += 2.0 * labels - 1
    inputs[: 2 * outliers, 0] = 0.0
    inputs[: 2 * outliers, 1] = 12.0
    return inputs, labels


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def test_groups_are_those_of_a_sort():
    generator = torch.Generator().manual_seed(1)
    before, after = torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    up, down = opposing_groups(before, after, share=0.1)
    order = sorted(range(50), key=lambda i: float(after[i] - before[i]))
    assert down.tolist() == order[:5]
    assert up.tolist() == order[::-1][:5]


def test_groups_never_overlap_and_hold_at_least_one():
    up, down = opposing_groups(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), share=0.5)
    assert (up.tolist(), down.tolist()) == ([2], [0])
    up, down = opposing_groups(torch.zeros(9), torch.zeros(9), share=0.01)
    assert len(up) == len(down) == 1
    assert up.tolist() != down.tolist()


@pytest.mark.parametrize(
    ("before", "after", "share", "word"),
    [
        (torch.zeros(3), torch.zeros(4), 0.1, "same n"),
        (torch.zeros(1), torch.zeros(1), 0.1, "n >= 2"),
        (torch.zeros(4), torch.zeros(4), 0.6, "share"),
        (torch.zeros(4), torch.tensor([0.0, math.nan, 0.0, 0.0]), 0.1, "finite"),
    ],
)
def test_groups_refuse(before, after, share, word):
    with pytest.raises(Error, match=word):
        opposing_groups(before, after, share=share)


def test_oscillation_by_a_slow_loop():
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(6, 40, generator=generator)
    found = loss_oscillation(losses, share=0.1)
    for t in range(1, 6):
        row = found.table[t - 1]
        change = [float(losses[t, i]) - float(losses[t - 1, i]) for i in range(40)]
        order = sorted(range(40), key=lambda i: change[i])
        down, up = set(order[:4]), set(order[-4:])
        total = sum(map(abs, change))
        assert row["loss"] == pytest.approx(float(losses[t].mean()))
        assert row["change"] == pytest.approx(sum(change) / 40, abs=1e-7)
        assert row["share of change"] == pytest.approx(sum(abs(change[i]) for i in up | down) / total, rel=1e-5)
        if t > 1:
            old = [float(losses[t - 1, i]) - float(losses[t - 2, i]) for i in range(40)]
            dot = sum(a * b for a, b in zip(change, old, strict=True))
            scale = math.sqrt(sum(a * a for a in change) * sum(b * b for b in old))
            assert row["alternation"] == pytest.approx(-dot / scale, rel=1e-4)
            ranked = sorted(range(40), key=lambda i: old[i])
            before_down, before_up = set(ranked[:4]), set(ranked[-4:])
            assert row["swapped"] == pytest.approx((len(up & before_down) + len(down & before_up)) / 8)
    assert math.isnan(found.table[0]["alternation"])


def test_recorder_is_the_function_and_refuses_other_examples():
    losses = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    watch = OpposingSignals(share=0.2)
    for row in losses:
        watch.step(row)
    assert watch.report().to_json() == loss_oscillation(losses, share=0.2).to_json()
    assert watch.groups()[0].tolist() == opposing_groups(losses[2], losses[3], share=0.2)[0].tolist()
    assert watch.groups(1)[1].tolist() == opposing_groups(losses[0], losses[1], share=0.2)[1].tolist()
    with pytest.raises(Error, match="as before"):
        watch.step(torch.zeros(9))
    assert watch.groups(-3)[1].tolist() == watch.groups(1)[1].tolist()
    for wrong in (4, 0, -4):
        with pytest.raises(Error, match="one of 1 to 3"):
            watch.groups(wrong)
    with pytest.raises(Error, match="at least 2 steps"):
        OpposingSignals().report()


def test_one_change_alone_has_no_oscillation():
    found = loss_oscillation(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), share=0.5)
    assert found["step of most oscillation"] is None
    assert math.isnan(found["mean alternation"])
    still = loss_oscillation(torch.ones(3, 4), share=0.25)
    assert still["step of most oscillation"] is None
    assert still["share of change"] == [0.0, 0.0]
    with pytest.raises(Error, match="at least 2 steps"):
        loss_oscillation(torch.ones(1, 4))


def test_noted_losses_do_not_change_with_the_tensor():
    watch, losses = OpposingSignals(share=0.5), torch.zeros(2)
    watch.step(losses)
    losses += 5
    assert watch.losses[0].tolist() == [0.0, 0.0]


def test_gradients_and_curvature_by_hand():
    inputs, labels = planted()
    model = network().double()
    inputs = inputs.double()
    generator = torch.Generator().manual_seed(5)
    before, after = torch.rand(200, generator=generator), torch.rand(200, generator=generator)
    found = opposing_signals(model, (inputs, labels), before, after, share=0.05)
    up, down = opposing_groups(before, after, share=0.05)
    slopes = []
    for group in (up, down):
        copied = copy.deepcopy(model)
        functional.cross_entropy(copied(inputs[group]), labels[group]).backward()
        slopes.append(torch.cat([value.grad.flatten() for value in copied.parameters()]))
    cosine = float(functional.cosine_similarity(slopes[0], slopes[1], dim=0))
    assert found["gradient cosine"] == pytest.approx(cosine, abs=1e-6)
    assert found["gradient"][0] == pytest.approx(float(slopes[0].norm()), rel=1e-5)
    direction = (slopes[0] - slopes[1]) / (slopes[0] - slopes[1]).norm()

    def at(amount: float) -> float:
        moved = copy.deepcopy(model)
        place = 0
        with torch.no_grad():
            for value in moved.parameters():
                value += amount * direction[place : place + value.numel()].view_as(value)
                place += value.numel()
            return float(functional.cross_entropy(moved(inputs), labels))

    step = 1e-3
    assert found["curvature"] == pytest.approx((at(step) - 2 * at(0) + at(-step)) / step**2, rel=1e-3)
    offset = inputs[up].mean(dim=0) - inputs.mean(dim=0)
    other = inputs[down].mean(dim=0) - inputs.mean(dim=0)
    assert found["input cosine"] == pytest.approx(float(functional.cosine_similarity(offset, other, dim=0)))
    assert found["share of examples"] == pytest.approx(20 / 200)
    expected = math.sqrt(float(inputs.var(dim=0, unbiased=False).sum()) / len(up))
    assert found["input offset"][0] == pytest.approx(float(offset.norm()) / expected)
    change = (after - before).abs()
    share = float(change[torch.cat([up, down])].sum() / change.sum())
    assert found["share of change"] == pytest.approx(share, rel=1e-5)


def test_mappings_of_any_kind_and_tokens():
    """A batch as tokenizers make it is a mapping and no dictionary; tokens have no mean."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids).mean(dim=1))

    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 5, (12, 6), generator=generator), torch.arange(12) % 3
    before, after = torch.rand(2, 12, generator=generator)
    batch = UserDict(input_ids=ids, labels=labels)
    found = opposing_signals(Tokens(), batch, before, after, share=0.25)
    assert math.isnan(found["input cosine"])
    assert math.isfinite(found["gradient cosine"])


def test_attention_has_a_curvature():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 2)

        def forward(self, inputs):
            tokens = self.out.weight.sum() * inputs[:, None]
            return self.out(functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(dim=1))

    generator = torch.Generator().manual_seed(0)
    inputs, (before, after) = torch.randn(6, 4, 3, generator=generator), torch.rand(2, 6, generator=generator)
    found = opposing_signals(Attention(), (inputs, torch.arange(6) % 2), before, after, share=0.5)
    assert math.isfinite(found["curvature"])
    assert found["curvature"] != 0


def test_planted_groups_oppose_and_random_ones_do_not():
    inputs, labels = planted()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    watch = OpposingSignals(share=0.02)
    states = []
    for _ in range(60):
        watch.step(example_losses(model, [(inputs, labels)]))
        states.append(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    found = watch.report()
    step = found["step of most oscillation"]
    model.load_state_dict(states[step])
    told = opposing_signals(model, (inputs, labels), watch.losses[step - 1], watch.losses[step], share=0.02)
    assert told["gradient cosine"] < -0.3
    assert told["share of change"] > 3 * told["share of examples"]
    assert told["input offset"][0] > 3 * told["input offset"][2]
    assert told["curvature"] > 10 * told["curvature along a random direction"]
    assert set(found["examples most often in a group"][:8]) == set(range(8))


def test_the_model_is_left_as_it_was():
    inputs, labels = planted()
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    losses = example_losses(model, [(inputs, labels)])
    opposing_signals(model, (inputs, labels), losses, losses.flip(0), share=0.05)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_example_losses_sum_to_the_mean_and_refuse():
    inputs, labels = planted()
    model = network()
    found = example_losses(model, [(inputs[:150], labels[:150]), (inputs[150:], labels[150:])])
    assert float(found.mean()) == pytest.approx(functional.cross_entropy(model(inputs), labels).item(), rel=1e-5)
    with pytest.raises(Error, match="at least one batch"):
        example_losses(model, [])
    with pytest.raises(Error, match="one number an example"):
        example_losses(model, [(inputs, labels)], losses=lambda m, b: m(b[0]))
    with pytest.raises(Error, match="losses but a batch"):
        opposing_signals(model, (inputs[:9], labels[:9]), found, found)
