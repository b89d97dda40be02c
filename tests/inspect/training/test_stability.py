"""Learning rates, attention logits, z-loss and monitors, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.training import (
    StabilityMonitor,
    largest_attention_logit,
    learning_rate_sensitivity,
    learning_rate_sweep,
    logit_growth,
    z_loss,
)


def test_sensitivity_by_hand():
    losses = {1e-3: 2.5, 1e-2: 2.0, 1e-1: 9.0, 1.0: math.inf}
    assert learning_rate_sensitivity(losses, 4.0) == pytest.approx((2.5 + 2 + 4 + 4) / 4 - 2)
    assert learning_rate_sensitivity({1.0: 3.0, 2.0: 3.0}, 5.0) == 0
    assert learning_rate_sensitivity({1.0: math.nan, 2.0: 7.0}, 5.0) == 0  # all diverged
    for wrong in ({1.0: 2.0}, {0.0: 1.0, 1.0: 1.0}):
        with pytest.raises(Error, match="at least 2 learning rates"):
            learning_rate_sensitivity(wrong, 1.0)
    with pytest.raises(Error, match="initial"):
        learning_rate_sensitivity({1.0: 1.0, 2.0: 1.0}, math.nan)


def test_sweep_by_hand():
    table = {0.1: [1.0, 1.2], 0.01: [1.05, 1.15], 1.0: [math.nan, 9.0], 0.001: [2.0, 2.2]}
    found = learning_rate_sweep(lambda rate, seed: table[rate][seed], list(table), initial=3.0, seeds=(0, 1))
    assert found["rate"] == [0.001, 0.01, 0.1, 1.0]
    assert found["loss"] == pytest.approx([2.1, 1.1, 1.1, 3.0])
    assert found["diverged"] == [0, 0, 0, 2]
    single = [learning_rate_sensitivity({r: table[r][s] for r in table}, 3.0) for s in (0, 1)]
    assert found["sensitivity"] == pytest.approx(sum(single) / 2)
    assert found["spread"] == pytest.approx(abs(single[0] - single[1]))
    assert found["good span"] == pytest.approx(10.0)
    losses = [2.0, 2.0, 1.05, 1.0, 1.02, 2.0, 1.0]  # neighbours of the best, not all that are good
    wide = learning_rate_sweep(lambda rate, seed: losses[round(math.log2(rate))], [2.0**i for i in range(7)], 3.0)
    assert wide["good span"] == 4.0
    twice = learning_rate_sweep(lambda rate, seed: table[rate][seed], [*table, 0.1], initial=3.0, seeds=(0, 1))
    assert twice.to_json() == found.to_json()
    with pytest.raises(Error, match="seed"):
        learning_rate_sweep(lambda rate, seed: 0.0, [0.1, 1.0], 1.0, seeds=())


def test_z_loss_by_hand_and_its_gradient_is_a_pull_towards_one():
    logits = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    sums = [math.log(math.exp(1) + math.exp(2)), math.log(1 + math.exp(-1))]
    found = z_loss(logits, coefficient=0.1)
    assert found.item() == pytest.approx(0.1 * (sums[0] ** 2 + sums[1] ** 2) / 2)
    found.backward()
    assert (logits.grad > 0).all()
    assert float(z_loss(torch.zeros(3, 1))) == 0
    assert z_loss(torch.zeros(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_largest_attention_logit_by_a_slow_loop(causal, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 4, 5, 3, generator=generator), torch.randn(2, 2, 6, 3, generator=generator)
    mask = torch.rand(2, 1, 5, 6, generator=generator) > 0.4
    best = -math.inf
    for b in range(2):
        for h in range(4):
            for i in range(5):
                for j in range(6):
                    if mask[b, 0, i, j] and not (causal and j > i):
                        dot = sum(float(query[b, h, i, d] * key[b, h // 2, j, d]) for d in range(3))
                        best = max(best, dot / math.sqrt(3))
    assert largest_attention_logit(query, key, mask=mask, causal=causal) == pytest.approx(best, rel=1e-5)
    bias = torch.zeros(2, 1, 5, 6).masked_fill(~mask, -math.inf)
    assert largest_attention_logit(query, key, mask=bias, causal=causal) == pytest.approx(best, rel=1e-5)


def test_a_position_sees_itself_and_heads_share_neighbours_keys():
    ones = torch.ones(2, 1)
    assert largest_attention_logit(ones, torch.tensor([[1.0], [9.0]]), causal=True) == 9.0
    assert largest_attention_logit(torch.tensor([[5.0], [1.0]]), torch.tensor([[1.0], [9.0]]), causal=True) == 9.0
    query = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(4, 1, 1)
    assert largest_attention_logit(query, torch.tensor([1.0, 9.0]).view(2, 1, 1)) == 1.0


def test_largest_attention_logit_in_pieces_and_at_its_ends(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(3, 4, 5, 2, generator=generator), torch.randn(3, 4, 5, 2, generator=generator)
    whole = largest_attention_logit(query, key)
    monkeypatch.setattr("weightsmith.inspect.training._stability._LOGITS", 30)
    assert largest_attention_logit(query, key) == whole
    assert largest_attention_logit(query, key, scale=1.0) == pytest.approx(whole * math.sqrt(2))
    assert math.isnan(largest_attention_logit(query * math.nan, key))
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    assert largest_attention_logit(query, key, mask=hidden) == -math.inf
    one = largest_attention_logit(query[:1], key[:1], mask=~hidden)  # heads share a key without heads
    assert largest_attention_logit(query[0], key[0]) == one
    assert largest_attention_logit(query[0], key[0, 0]) == max(
        largest_attention_logit(head, key[0, 0]) for head in query[0]
    )
    assert largest_attention_logit(query.bfloat16(), key.bfloat16()) == pytest.approx(whole, rel=0.02)
    with pytest.raises(Error, match="cannot share"):
        largest_attention_logit(query, key[:, :3])
    with pytest.raises(Error, match="do not fit"):
        largest_attention_logit(query, key[..., :1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, ids):
        query, key, value = (
            part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(self.embed(ids)).chunk(3, 2)
        )
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(found.transpose(1, 2).flatten(2))


def test_monitor_sees_attention_outputs_and_gradients():
    torch.manual_seed(0)
    model = Block()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    ids = torch.randint(0, 11, (3, 6))
    with torch.no_grad():
        query, key, _ = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in model.qkv(model.embed(ids)).chunk(3, 2))
        expected = largest_attention_logit(query, key, causal=True)
    plain = model(ids)
    monitor = StabilityMonitor(model, epsilon=1e-3)
    with monitor.watching():
        logits = model(ids)
    assert torch.equal(logits, plain)
    loss = functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    monitor.step(loss=loss, logits=logits)
    found = monitor.report()
    row = found.table[0]
    assert row["attention logit"] == pytest.approx(expected)
    assert found["in layer"] == ""  # the attention is called by the model itself
    assert row["log Z"] == pytest.approx(float(logits.detach().logsumexp(dim=-1).mean()), rel=1e-5)
    means = {name: float(p.grad.square().mean().sqrt()) for name, p in model.named_parameters() if p.grad is not None}
    assert row["smallest gradient"] == pytest.approx(min(means.values()), rel=1e-5)
    assert row["over epsilon"] == pytest.approx(min(means.values()) / 1e-3, rel=1e-5)
    assert found["gradients near epsilon"] == sorted(name for name, value in means.items() if value < 1e-2)
    assert row["below epsilon"] == sum(value < 1e-3 for value in means.values())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_monitor_names_layers_also_after_an_error_and_of_peers():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    model["b"].qkv.weight.data *= 50

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model

        def forward(self, ids):
            return self.blocks["a"](ids) + self.blocks["b"](ids)

    both = Both()
    monitor = StabilityMonitor(both)
    ids = torch.arange(10)[None]
    with pytest.raises(IndexError), monitor.watching():
        both(ids + 99)
    with monitor.watching():
        both(ids)
        both(ids)
    monitor.step()
    assert list(monitor.layers) == ["blocks.a", "blocks.b"]
    assert monitor.report(limit=1.0)["in layer"] == "blocks.b"
    assert "normalise queries" in " ".join(monitor.report(limit=1.0).notes)
    assert math.isnan(monitor.report().table[0]["loss"])
    with pytest.raises(Error, match="at least one step"):
        StabilityMonitor(both).report()


def test_monitor_keeps_the_largest_of_a_step_and_shows_nan():
    monitor = StabilityMonitor(nn.Linear(1, 1))
    monitor.attention("x", 3.0)
    monitor.attention("x", 1.0)
    monitor.step()
    monitor.attention("x", math.nan)
    monitor.attention("x", 1.0)
    monitor.step()
    rows = monitor.report().table
    assert rows[0]["attention logit"] == 3.0
    assert math.isnan(rows[1]["attention logit"])
    assert math.isnan(monitor.report()["largest attention logit"])
    assert "not numbers" in " ".join(monitor.report().notes)
    monitor.attention("y", 7.0)
    monitor.attention("x", math.nan)
    monitor.step()
    assert math.isnan(monitor.report().table[-1]["attention logit"])
    assert monitor.report()["in layer"] == "x"


def test_steps_without_attention_or_logits_are_passed_over():
    monitor = StabilityMonitor(nn.Linear(1, 1))
    assert monitor.step() is None
    monitor.step(logits=torch.zeros(2, 4))
    monitor.attention("x", 2.0)
    monitor.step(logits=torch.ones(2, 4))
    monitor.step()
    found = monitor.report()
    assert found["attention logit"] == [None, None, 2.0, None]
    assert (found["largest attention logit"], found["last attention logit"]) == (2.0, 2.0)
    assert found["drift of log Z"] == pytest.approx(1.0)
    assert found.notes == []


def test_a_gradient_that_is_not_a_number_is_the_smallest():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    monitor = StabilityMonitor(model)
    for value, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, math.nan if value == 2 else value + 1e-24)
    monitor.step()
    assert math.isnan(monitor.report()["last smallest gradient"])
    model[1].weight.grad = torch.full((1, 1), 3e-24)  # its square is no float32 any more
    model[0].weight.grad = None
    monitor.step()
    assert monitor.report()["last smallest gradient"] == pytest.approx(3e-24)


def test_drift_is_the_change_of_log_z():
    monitor = StabilityMonitor(nn.Linear(1, 1))
    monitor.step(logits=torch.zeros(2, 4))
    monitor.step(logits=torch.full((2, 4), -30.0))
    found = monitor.report()
    assert found["drift of log Z"] == pytest.approx(-30.0)
    assert "z-loss" in " ".join(found.notes)


def test_growth_finds_a_planted_power_law():
    rates = [1e-4, 3e-4, 1e-3, 1e-2]
    found = logit_growth(rates, [5e3 * rate**0.7 for rate in rates], at=[1.0, 10.0], limit=1e4)
    assert found["exponent"] == pytest.approx(0.7)
    assert found["factor"] == pytest.approx(5e3)
    assert found["reaches the limit at"] == pytest.approx((1e4 / 5e3) ** (1 / 0.7))
    assert found["largest error"] == pytest.approx(1.0)
    assert found["fails"] == [False, False, False, False, False, True]
    assert len(found.notes) == 1
    assert math.isinf(logit_growth([1.0, 1.01], [1.0, 1e6], at=[1e9])["fitted"][-1])


def test_growth_is_least_squares_of_logarithms_and_may_fall():
    found = logit_growth([1.0, 10.0, 100.0], [1.0, 100.0, 100.0])
    assert found["exponent"] == pytest.approx(1.0)
    assert logit_growth([1.0, 2.0], [2.0, 1.0])["reaches the limit at"] is None
    for scales, logits in (([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, -1.0], [1.0, 2.0]), ([1, 2], [0.0, 2.0])):
        with pytest.raises(Error, match="logit_growth"):
            logit_growth(scales, logits)
