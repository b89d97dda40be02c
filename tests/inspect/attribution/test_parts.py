"""Quadrature, ranks and the choice of an output, against what they mean."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect._parts import ranked
from weightsmith.inspect.attribution import Attribution
from weightsmith.inspect.attribution._parts import (
    chosen,
    correlation,
    frozen,
    interval_of_mean,
    layer_of,
    like,
    one_each,
    quadrature,
    slope_at,
)


@pytest.mark.parametrize(
    ("rule", "steps", "degree"),
    [("gauss-legendre", 4, 7), ("trapezoid", 5, 1), ("middle", 5, 1), ("left", 5, 0), ("right", 5, 0)],
)
def test_a_rule_is_exact_up_to_its_degree(rule, steps, degree):
    places, weights = quadrature(rule, steps)
    for power in range(degree + 2):
        found = sum(w * a**power for a, w in zip(places, weights, strict=True))
        assert (abs(found - 1 / (power + 1)) < 1e-12) == (power <= degree)


def test_left_and_right_differ():
    assert quadrature("left", 2)[0] == [0.0, 0.5]
    assert quadrature("right", 2)[0] == [0.5, 1.0]
    with pytest.raises(Error, match="at least 2 for trapezoid, got 1"):
        quadrature("trapezoid", 1)
    with pytest.raises(Error, match="rule is one of"):
        quadrature("simpson", 3)  # type: ignore[arg-type]


def test_chosen_outputs():
    outputs = torch.arange(6.0).reshape(2, 3)
    assert chosen(outputs, 1).tolist() == [1, 4]
    assert chosen(outputs, torch.tensor([2, 0])).tolist() == [2, 3]
    assert chosen(outputs, torch.tensor([9, 2, 0]), torch.tensor([1, 2])).tolist() == [2, 3]
    assert chosen(outputs, lambda o: o.sum(1)).tolist() == [3, 12]
    assert chosen(outputs[:, :1], None).tolist() == [0, 3]
    assert chosen(outputs[:, 0], None).tolist() == [0, 3]
    assert chosen(outputs.reshape(2, 3, 1), (2, 0)).tolist() == [2, 5]
    for wrong in (None, (0, 0), lambda o: o):
        with pytest.raises(Error):
            chosen(outputs, wrong)


def test_ranks_of_equals_are_shared_and_correlations_of_constants_unknown():
    from scipy.stats import rankdata, spearmanr

    values = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 1.0, 1.0, -2.0]])
    torch.testing.assert_close(ranked(values), torch.tensor(rankdata(values.numpy(), axis=1)))
    expected = spearmanr(values[0].numpy(), values[1].numpy()).statistic
    assert float(correlation(ranked(values[:1]), ranked(values[1:]))) == pytest.approx(expected)
    assert correlation(torch.ones(1, 3), torch.rand(1, 3)).isnan().all()


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 5
    low, high = interval_of_mean(values, 0)
    assert low < float(values.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval_of_mean(values[:1], 0) == (None, None)


def test_references():
    inputs = torch.zeros(4, 2)
    assert like(inputs, 1.5, "b").shape == (1, 4, 2)
    assert like(inputs, torch.ones(2), "b").shape == (1, 4, 2)
    assert like(inputs, torch.ones(4, 2), "b").shape == (1, 4, 2)
    assert like(inputs, torch.ones(3, 4, 2), "b").shape == (3, 4, 2)
    assert torch.equal(like(inputs, torch.arange(6.0).reshape(3, 2), "b")[2, 3], torch.tensor([4.0, 5.0]))
    with pytest.raises(Error, match=r"b \[3\] do not fit inputs \[4, 2\]"):
        like(inputs, torch.ones(3), "b")


def test_frozen_puts_everything_back_also_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 2).requires_grad_(False))

    def failing() -> None:
        with frozen(model):
            assert not model[0].weight.requires_grad
            assert not model[1].training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert model[0].weight.requires_grad
    assert not model[2].weight.requires_grad
    assert model[1].training
    with pytest.raises(Error, match="no layer '3'"):
        layer_of(model, "3")


def test_a_slope_or_an_error():
    at = torch.ones(2, requires_grad=True)
    assert slope_at(at * torch.tensor([2.0, 3.0]), at).tolist() == [2.0, 3.0]
    for found in (torch.ones(2), torch.ones(2, requires_grad=True) * 2):
        with pytest.raises(Error, match="does not depend on layer a"):
            slope_at(found, at, "layer a")


def test_an_attribution_reports_its_gap():
    found = Attribution("test", torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([3.0, 2.0]))
    assert found.gap.tolist() == [0.0, -1.0]
    report = found.report()
    assert report["largest gap"] == 1.0
    assert report["largest gap over largest change"] == pytest.approx(1 / 3)
    assert report["gap"] == [0.0, -1.0]
    assert report.to_json()


def test_an_interval_of_many_values_is_drawn_in_parts():
    values = torch.rand(9000, generator=torch.Generator().manual_seed(0))
    rows = torch.randint(9000, (2000, 9000), generator=torch.Generator().manual_seed(3))
    means = values.double()[rows].mean(dim=1)
    assert interval_of_mean(values, 3) == pytest.approx(
        tuple(means.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
    )


def test_a_target_for_each_example_is_one_for_each():
    one_each(torch.zeros(3), 3)
    one_each(5, 3)
    with pytest.raises(Error, match=r"each of 3 examples is \[3\], got \[4\]"):
        one_each(torch.zeros(4), 3)
