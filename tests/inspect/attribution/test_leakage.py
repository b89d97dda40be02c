"""Shares of what is known of an answer, against divergences and Shapley values written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import masked_predictor, masked_score, shap_kl, shapley


def predict(inputs: Tensor, seen: Tensor) -> Tensor:
    weights = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.5, -1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).to(inputs)
    return torch.log_softmax((inputs * seen).tanh() @ weights, dim=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_by_hand():
    inputs = normal(5, 4).double()
    found = shap_kl(predict, inputs)
    for x, shares in zip(inputs, found, strict=True):
        full = predict(x[None], torch.ones(1, 4, dtype=torch.bool))[0].exp()

        def value(s: Tensor, x: Tensor = x, full: Tensor = full) -> Tensor:
            return torch.stack([-(full * (full / predict(x[None], row[None])[0].exp()).log()).sum() for row in s])

        torch.testing.assert_close(shares, shapley(value, 4).values)
        everything, nothing = torch.tensor([[True] * 4]), torch.tensor([[False] * 4])
        assert float(shares.sum()) == pytest.approx(float(value(everything) - value(nothing)), abs=1e-8)
        assert shares[3] == 0


def test_classes_as_shap_has_them():
    inputs = normal(5, 4)
    wanted = torch.tensor([0, 2, 1, 0, 2])
    found = shap_kl(predict, inputs, value="class", classes=wanted)
    for x, label, shares in zip(inputs, wanted, found, strict=True):
        value = lambda s, x=x, label=label: predict(x.expand(len(s), -1), s)[:, label].exp()  # noqa: E731
        torch.testing.assert_close(shares, shapley(value, 4).values)
    likeliest = predict(inputs, torch.ones(5, 4, dtype=torch.bool)).argmax(1)
    torch.testing.assert_close(
        shap_kl(predict, inputs, value="class"), shap_kl(predict, inputs, value="class", classes=likeliest)
    )


def test_sampling_is_near():
    inputs = normal(3, 4)
    exact, drawn = (shap_kl(predict, inputs, method=m, samples=2000) for m in ("exact", "permutation"))
    assert (exact - drawn).abs().max() < 0.05


def test_a_masked_predictor_learns_every_conditional():
    """``y`` is the first of three bits, and the second agrees with it in three of four cases."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(4000, generator=generator) < 0.5
    second = torch.where(torch.rand(4000, generator=generator) < 0.75, first, ~first)
    third = torch.rand(4000, generator=generator) < 0.5
    inputs, labels = torch.stack([first, second, third], dim=1).float() * 2 - 1, first.long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = masked_predictor(net, inputs, labels, steps=800, rate=0.01)
    ones = torch.ones(4, 3)
    seen = torch.tensor([[True, False, False], [False, True, False], [False, False, True], [False, False, False]])
    chances = found(ones, seen)[:, 1].exp()
    assert chances.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.5], abs=0.06)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not found(ones, seen).requires_grad
    again = masked_predictor(net, inputs, labels, steps=30, seed=1)(ones, seen)
    assert torch.equal(again, masked_predictor(net, inputs, labels, steps=30, seed=1)(ones, seen))
    soft = torch.stack([1 - labels * 0.9, labels * 0.9], dim=1)
    surrogate = masked_predictor(net, inputs, soft, steps=800, rate=0.01)
    assert float(surrogate(ones, seen)[0, 1].exp()) == pytest.approx(0.9, abs=0.06)


def test_scores_by_hand():
    inputs, labels, scores = normal(40, 4), torch.arange(40) % 3, normal(40, 4, seed=1)
    found = masked_score(predict, scores, inputs, labels, shares=[0.25, 0.75])
    for row, count in zip(found.rows(), (1, 3), strict=True):
        seen = torch.zeros(40, 4, dtype=torch.bool)
        for i in range(40):
            seen[i, scores[i].topk(count).indices] = True
        for word, mask in (("kept", seen), ("removed", ~seen)):
            guess = predict(inputs, mask)
            likelihood = sum(float(guess[i, labels[i]]) for i in range(40)) / 40
            assert row[f"log-likelihood, {word}"] == pytest.approx(likelihood, rel=1e-5)
            assert row[f"accuracy, {word}"] == pytest.approx(float((guess.argmax(1) == labels).float().mean()))
    assert found["kept"] == pytest.approx(sum(row["log-likelihood, kept"] for row in found.rows()) / 2)


def test_what_it_refuses():
    inputs, labels = normal(4, 3), torch.arange(4) % 2
    with pytest.raises(Error, match=r"inputs are \[n, p\]"):
        shap_kl(predict, normal(3))
    with pytest.raises(Error, match="value is kl or class"):
        shap_kl(predict, normal(3, 4), value="both")  # type: ignore[arg-type]
    with pytest.raises(Error, match=r"targets \[n\] or \[n, c\]"):
        masked_predictor(nn.Linear(6, 2), inputs, labels[:2])
    with pytest.raises(Error, match="do not fit"):
        masked_score(predict, inputs[:2], inputs, labels)
    with pytest.raises(Error, match="there is no share"):
        masked_score(predict, inputs, inputs, labels, shares=[])


def test_dropout_goes_by_the_seed_and_what_is_missing_may_be_nan():
    inputs, labels = normal(64, 3), torch.arange(64) % 2
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    state = torch.get_rng_state()
    ones, seen = torch.ones(1, 3), torch.tensor([[True, False, True]])
    found = []
    for seed in (0, 0, 1):
        found.append(masked_predictor(net, inputs, labels, steps=20, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        state = torch.get_rng_state()
    first, again, other = (one(ones, seen) for one in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(found[0](torch.tensor([[1.0, torch.nan, 1.0]]), seen), first)
    with pytest.raises(Error, match="steps and batch are at least 1, got 0"):
        masked_predictor(net, inputs, labels, steps=0)
