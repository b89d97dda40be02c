"""Naive Bayes and logistic heads: posteriors by hand and optimality."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import head_curves, logistic_head, naive_bayes_head


def data(seed: int = 0, n: int = 60, d: int = 5, c: int = 3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    centres = torch.randn(c, d, generator=generator)
    spread = torch.rand(d, generator=generator) + 0.5
    return centres[labels] + spread * torch.randn(n, d, generator=generator), labels


def test_posterior_by_hand():
    features, labels = data()
    labels[:5] = 2  # classes of different sizes
    head = naive_bayes_head(features, labels, smoothing=0.0)
    values = features.double()
    means = torch.stack([values[labels == k].mean(0) for k in range(3)])
    variance = sum(((values[labels == k] - means[k]) ** 2).sum(0) for k in range(3)) / len(labels)
    prior = torch.stack([(labels == k).double().mean() for k in range(3)])
    density = torch.distributions.Normal(means, variance.sqrt()).log_prob(values[:, None]).sum(2) + prior.log()
    torch.testing.assert_close(head(features).softmax(1).double(), density.softmax(1), atol=1e-5, rtol=1e-4)


def test_invariance_to_the_scale_of_single_features():
    features, labels = data(1)
    factor = torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0])
    one = naive_bayes_head(features, labels, smoothing=0)(features)
    other = naive_bayes_head(features * factor, labels, smoothing=0)(features * factor)
    torch.testing.assert_close(one.softmax(1), other.softmax(1), atol=1e-4, rtol=1e-3)


def test_edges_of_the_head():
    features, labels = data(2)
    single = naive_bayes_head(features[:3], labels[:3])  # one example a class
    assert single(features[:3]).argmax(1).tolist() == [0, 1, 2]
    absent = naive_bayes_head(features, labels, classes=5)
    assert absent.weight.shape == (5, 5)
    assert bool(torch.isfinite(absent.bias).all())
    assert naive_bayes_head(features.bfloat16(), labels).weight.dtype == torch.bfloat16
    for given, message in (
        ((features, labels[:4]), "do not fit"),
        ((features[:0], labels[:0]), "do not fit"),
        ((torch.ones(4, 2), torch.tensor([0, 1, 0, 1])), "same for every example"),
        ((features * torch.nan, labels), "finite"),
    ):
        with pytest.raises(Error, match=message):
            naive_bayes_head(*given)
    with pytest.raises(Error, match="from 0 to 1"):
        naive_bayes_head(features, labels, classes=2)


def test_logistic_head_is_at_the_optimum():
    features, labels = data(3)
    decay = 0.01
    head = logistic_head(features.double(), labels, decay=decay)
    weight, bias = head.weight, head.bias
    loss = torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, labels)
    (loss + decay / 2 * weight.square().sum()).backward()
    assert float(weight.grad.norm()) < 1e-5
    assert float(bias.grad.norm()) < 1e-5
    warm = logistic_head(features.double(), labels, decay=decay, start=naive_bayes_head(features.double(), labels))
    torch.testing.assert_close(warm.weight, head.weight, atol=1e-4, rtol=1e-3)


def test_curves_and_their_crossing():
    # Features that repeat one another: independence is wrong, and with many labels that costs.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 2
    sign = 2.0 * labels[:, None] - 1
    common = torch.randn(1200, 1, generator=generator)
    copies = 0.3 * sign + common + 0.05 * torch.randn(1200, 15, generator=generator)
    clue = 0.4 * sign + common + 0.05 * torch.randn(1200, 1, generator=generator) + 0.6 * sign
    features = torch.cat([copies, clue], dim=1)
    found = head_curves(features[:800], labels[:800], features[800:], labels[800:], shots=(1, 2, 300), draws=3)
    assert found["shots"] == [1, 2, 300]
    assert found["logistic"][-1] > found["naive bayes"][-1] + 0.1
    assert found["crossing"] is not None
    with pytest.raises(Error, match="shots="):
        head_curves(features[:800], labels[:800], features[800:], labels[800:], shots=(900,))
    with pytest.raises(Error, match="test features"):
        head_curves(features, labels, features[:, :2], labels)


def test_heads_leave_the_global_generator_alone_and_refuse():
    features, labels = data(4)
    state = torch.get_rng_state()
    start = naive_bayes_head(features, labels)
    logistic_head(features, labels, start=start)
    assert torch.equal(state, torch.get_rng_state())
    flat = torch.cat([features, torch.ones(60, 1)], dim=1)
    assert bool(torch.isfinite(naive_bayes_head(flat, labels).weight).all())
    with pytest.raises(Error, match="1 features never vary"):
        naive_bayes_head(flat, labels, smoothing=0.0)
    with pytest.raises(Error, match="smoothing="):
        naive_bayes_head(features, labels, smoothing=-1.0)
    with pytest.raises(Error, match="from 0 to 1"):
        logistic_head(features, labels, classes=2)
    with pytest.raises(Error, match="finite"):
        logistic_head(features * torch.nan, labels)
    with pytest.raises(Error, match="start="):
        logistic_head(features, labels, classes=4, start=start)
    with pytest.raises(Error, match="test features"):
        head_curves(features, labels, features[:0], labels[:0], shots=(1,))
