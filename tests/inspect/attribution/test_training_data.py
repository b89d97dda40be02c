"""Scores of training examples, against ridge regressions fitted anew without them, and rank correlations by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import dtrak, gradient_cosines, kernel_scores, lds, trak
from weightsmith.inspect.attribution._training_data import margin
from weightsmith.stats import example_gradients


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ridge_regression_without_each_example():
    """``f(x) - f_without_i(x)`` exactly, for any penalty."""
    x, y, asked = normal(30, 4), normal(30, seed=1), normal(5, 4, seed=2)
    for damping in (0.0, 0.3):
        penalty = damping * float(x.square().sum()) / 4

        def fitted(rows: Tensor, penalty: float = penalty) -> Tensor:
            return torch.linalg.solve(x[rows].T @ x[rows] + penalty * torch.eye(4), x[rows].T @ y[rows])

        every = torch.arange(30)
        whole = fitted(every)
        expected = torch.stack([asked @ (whole - fitted(every[every != i])) for i in range(30)], dim=1)
        found = kernel_scores(x, asked, damping=damping, residuals=y - x @ whole, leave_one_out=True)
        torch.testing.assert_close(found, expected)
        plain = kernel_scores(x, asked, damping=damping, residuals=y - x @ whole)
        inverse = torch.linalg.inv(x.T @ x + penalty * torch.eye(4))
        torch.testing.assert_close(plain, asked @ inverse @ x.T * (y - x @ whole))


def test_more_numbers_than_examples_and_rank_that_lacks():
    x, asked = normal(6, 20), normal(3, 20, seed=1)
    x[5] = x[4]
    inverse = torch.linalg.inv(x.T @ x + 0.1 * float(x.square().sum()) / 20 * torch.eye(20))
    torch.testing.assert_close(kernel_scores(x, asked, damping=0.1), asked @ inverse @ x.T)
    torch.testing.assert_close(kernel_scores(x, asked, damping=0.0), asked @ torch.linalg.pinv(x))
    assert kernel_scores(torch.zeros(2, 3), torch.ones(1, 3)).abs().max() == 0


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def data(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    return [(normal(count, 3, seed=seed), torch.arange(count) % 4)]


def test_margins_are_log_odds():
    model, (batch,) = network(), data(5, 1)
    chances = model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    torch.testing.assert_close(margin(model, batch), (chances / (1 - chances)).log().sum())
    with pytest.raises(Error, match=r"\(inputs, labels\)"):
        margin(model, batch[0])


def test_trak_is_its_formula_averaged_over_checkpoints():
    model, others, seen, asked = network(), [network(1), network(2)], data(9, 1), data(4, 2)
    kernels, residuals = [], []
    for index, other in enumerate(others):
        train, query = (
            example_gradients(other, part, loss=margin, dim=16, seed=5 + index).double() for part in (seen, asked)
        )
        penalty = 0.1 * float(train.square().sum()) / 16
        kernels.append(query @ torch.linalg.inv(train.T @ train + penalty * torch.eye(16)) @ train.T)
        residuals.append(1 - other(seen[0][0]).softmax(1).gather(1, seen[0][1][:, None])[:, 0].detach())
    expected = (kernels[0] + kernels[1]) / 2 * (residuals[0] + residuals[1]) / 2
    found = trak(model, seen, asked, checkpoints=others, dim=16, damping=0.1, seed=5)
    assert found.shape == (4, 9)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        dtrak(model, seen, asked, output=margin, checkpoints=others, dim=16, damping=0.1, seed=5),
        (kernels[0] + kernels[1]) / 2,
    )
    alone = trak(others[0], iter(seen), iter(asked), dim=16, damping=0.1, seed=5)
    torch.testing.assert_close(alone, kernels[0] * residuals[0])


def test_dtrak_takes_squared_norms():
    model, seen, asked = network(), data(9, 1), data(4, 2)
    norms = dtrak(model, seen, asked, dim=64, damping=0.1)
    same = dtrak(model, seen, asked, dim=64, damping=0.1, output=lambda m, b: m(b[0]).pow(2).sum())
    torch.testing.assert_close(norms, same)


def test_cosines_of_gradients():
    model, seen, asked = network(), data(9, 1), data(4, 2)
    one, other = example_gradients(model, asked), example_gradients(model, seen)
    expected = nn.functional.cosine_similarity(one[:, None], other[None], dim=2)
    torch.testing.assert_close(gradient_cosines(model, seen, asked, dim=None), expected)
    assert (gradient_cosines(model, seen, asked, dim=4000) - expected).abs().max() < 0.1
    layer = nn.Linear(3, 4)
    nothing = gradient_cosines(layer, [seen[0][0].float()], [asked[0][0].float()], loss=lambda m, b: 0 * m(b).sum())
    assert nothing.abs().max() == 0


def test_the_datamodeling_score_by_hand():
    scores, outputs = normal(5, 20), normal(12, 5, seed=3)
    subsets = torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs[3] = outputs[4]
    found = lds(scores, subsets, outputs)
    expected = [
        spearmanr([float(scores[q][subsets[s]].sum()) for s in range(12)], outputs[:, q].numpy()).statistic
        for q in range(5)
    ]
    assert [row["lds"] for row in found.rows()] == pytest.approx(expected)
    assert found.figures["lds"] == pytest.approx(sum(expected) / 5)
    assert found["low"] <= sum(expected) / 5 <= found["high"]
    perfect = lds(scores, subsets, (scores @ subsets.double().T).T)
    assert perfect["high"] == pytest.approx(1.0)


def test_queries_that_do_not_vary_do_not_count():
    subsets = torch.eye(4, dtype=torch.bool)
    outputs = torch.stack([torch.arange(4.0), torch.ones(4)], dim=1)
    found = lds(torch.arange(4.0).expand(2, 4), subsets, outputs)
    assert found["queries"] == 1
    assert found.table[1]["lds"] is None
    assert found.figures["lds"] == 1.0
    assert found.figures["low"] is None
    assert lds(torch.ones(1, 4), subsets, outputs[:, :1]).figures["lds"] is None


def test_the_model_is_left_as_it_was():
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trak(model, data(5, 1), data(2, 2), checkpoints=[network(3)], dim=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_it_refuses():
    with pytest.raises(Error, match=r"got \[3, 2\] and \[1, 3\]"):
        kernel_scores(torch.ones(3, 2), torch.ones(1, 3))
    with pytest.raises(Error, match="damping is at least 0, got -1"):
        kernel_scores(torch.ones(3, 2), torch.ones(1, 2), damping=-1)
    with pytest.raises(Error, match="not finite"):
        kernel_scores(torch.tensor([[torch.nan]]), torch.ones(1, 1))
    for function in (trak, dtrak, gradient_cosines):
        with pytest.raises(Error, match="at least 1 checkpoint"):
            function(network(), data(2, 1), data(2, 2), checkpoints=[])
        with pytest.raises(Error, match="at least one example"):
            function(network(), [], data(2, 2))
    with pytest.raises(Error, match="do not fit"):
        lds(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.bool), torch.ones(2, 4))
    with pytest.raises(Error, match="at least 3 subsets"):
        lds(torch.ones(1, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 1))


def test_what_has_no_rank_or_no_rest_is_refused():
    x = normal(4, 6)
    with pytest.raises(Error, match="alone decides what is said of it"):
        kernel_scores(x, x, damping=0.0, leave_one_out=True)
    assert kernel_scores(x, x, damping=0.1, leave_one_out=True).isfinite().all()
    with pytest.raises(Error, match=r"one for each of 4 examples; got \[1\]"):
        kernel_scores(x, x, residuals=torch.ones(1))
    outputs = normal(3, 1)
    outputs[1] = torch.nan
    with pytest.raises(Error, match="not finite, which have no rank"):
        lds(torch.ones(1, 3), torch.eye(3, dtype=torch.bool), outputs)
