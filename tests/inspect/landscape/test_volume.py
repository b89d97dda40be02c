"""Local volume: regions whose prior mass is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.landscape import diagonal, local_log_volume
from weightsmith.inspect.landscape._volume import _legendre, _log_ray


class Point(nn.Module):
    """A few numbers around a minimum."""

    def __init__(self, *at: float):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=torch.float64))
        self.register_buffer("minimum", self.at.detach().clone())


def ball(model: Point) -> torch.Tensor:
    return (model.at - model.minimum).square().sum() / 2


def chance(dimension: int, radius: float, deviation: float = 1.0, away: float = 0.0, count: int = 4_000_000) -> float:
    generator = torch.Generator().manual_seed(0)
    drawn = deviation * torch.randn(count, dimension, generator=generator)
    drawn[:, 0] -= away
    return math.log(float((drawn.square().sum(dim=1) <= radius**2).double().mean()))


def test_legendre_is_exact_for_polynomials():
    places, weights = _legendre()
    for degree in (0, 1, 2, 10, 100):
        expected = 0 if degree % 2 else 2 / (degree + 1)
        assert float(weights @ places**degree) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "along"), [(1, 0.0), (2, 0.7), (5, -2.0), (1000, 3.0), (30000, -40.0)])
def test_a_ray_against_fine_sums(size: int, along: float):
    peak = (-along + math.sqrt(along**2 + 4 * (size - 1))) / 2
    for radius in (0.5 * peak + 0.1, peak + 0.5, math.inf):
        end = min(radius, peak + 30)
        r = torch.linspace(max(0.0, min(end, peak) - 30), end, 2_000_001, dtype=torch.float64)[1:]
        logs = (size - 1) * r.log() - r * r / 2 - along * r
        expected = float(torch.logsumexp(logs, 0)) + math.log(float(r[1] - r[0]))
        assert _log_ray(radius, along, size) == pytest.approx(expected, abs=2e-3)


def test_a_ball_in_the_middle_of_the_prior():
    for size, eps in ((2, 0.5), (3, 0.1), (4, 2.0)):
        found = local_log_volume(Point(*[0.0] * size), ball, eps=eps, rays=8, precision=1e-6)
        a, y = size / 2, eps
        expected = float(torch.special.gammainc(torch.tensor(a).double(), torch.tensor(y).double()).log())
        assert found["log volume"] == pytest.approx(expected, abs=1e-5)
        assert found["effective rays"] == pytest.approx(8)
        assert found["standard error"] == pytest.approx(0, abs=1e-5)
        assert found["radius"] == pytest.approx([math.sqrt(2 * eps)] * 8, rel=1e-5)
        assert found["weights"] == size
    large = local_log_volume(Point(*[0.0] * 500), ball, eps=1.0, rays=2)
    series = sum(math.exp(i * math.log(1.0) - math.lgamma(251 + i) + math.lgamma(251)) for i in range(20))
    assert large["log volume"] == pytest.approx(-math.lgamma(251) - 1.0 + math.log(series), abs=0.02)


def test_a_ball_away_from_the_middle_and_other_priors():
    found = local_log_volume(Point(1.5, 0.0, 0.0), ball, eps=0.5, rays=1500, prior=2.0)
    assert found["log volume"] == pytest.approx(chance(3, 1.0, 2.0, 1.5), abs=0.03)
    assert found["standard error"] < 0.03
    assert found["nats by the distance from 0"] == pytest.approx(1.5**2 / 2**2 / 2)


def test_an_ellipse_with_rays_of_its_shape():
    bends = torch.tensor([100.0, 1.0, 4.0], dtype=torch.float64)

    def loss(model: Point) -> torch.Tensor:
        return (bends * (model.at - model.minimum).square()).sum() / 2

    net = Point(0.3, -0.5, 0.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4_000_000, 3, generator=generator).double() - net.minimum
    truth = math.log(float(((bends * drawn.square()).sum(dim=1) <= 1.0).double().mean()))
    round_rays = local_log_volume(net, loss, eps=0.5, rays=1500, precision=1e-3)
    assert round_rays["log volume"] == pytest.approx(truth, abs=0.15)
    curvature = diagonal(net, loss, probes=1)
    shaped = local_log_volume(net, loss, eps=0.5, rays=400, precision=1e-3, shape={"at": curvature["at"].rsqrt()})
    assert shaped["log volume"] == pytest.approx(truth, abs=0.02)
    assert shaped["effective rays"] / 400 > 3 * round_rays["effective rays"] / 1500
    assert shaped["standard error"] < round_rays["standard error"]


def test_shapes_are_up_to_a_factor_and_priors_by_name():
    net = nn.Linear(2, 1).double()
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)

    def loss(model: nn.Linear) -> torch.Tensor:
        return (model.weight.square().sum() / 4 + model.bias.square().sum() * 9) / 2

    prior = {"weight": 2.0, "bias": 1 / 3}  # in whose units it is a ball
    found = local_log_volume(net, loss, eps=0.5, rays=4, prior=prior, precision=1e-6)
    truth = float(torch.special.gammainc(torch.tensor(1.5).double(), torch.tensor(0.5).double()).log())
    assert found["log volume"] == pytest.approx(truth, abs=1e-5)
    shape = {"weight": torch.full((1, 2), 10.0), "bias": torch.full((1,), 10 / 6)}
    shaped = local_log_volume(net, loss, eps=0.5, rays=4, prior=prior, shape=shape, precision=1e-6)
    assert shaped["log volume"] == pytest.approx(truth, abs=1e-5)


def test_a_flat_loss_has_the_whole_prior_and_a_part_of_the_weights_less():
    flat = local_log_volume(Point(0.2, 0.1), lambda m: m.at.sum() * 0, rays=500)
    assert flat["log volume"] == pytest.approx(0, abs=0.05)
    assert flat["radius"][0] == math.inf
    str(flat)
    net = nn.Linear(2, 1).double()
    nn.init.zeros_(net.bias)
    some = local_log_volume(net, lambda m: m.bias.square().sum() / 2, eps=0.5, pattern="bias", rays=2, precision=1e-6)
    assert some["log volume"] == pytest.approx(math.log(math.erf(1 / math.sqrt(2))), abs=1e-5)


def test_the_first_crossing_counts_and_a_wall_is_one():
    net = Point(0.0)
    wall = local_log_volume(net, lambda m: torch.where(m.at.abs() > 0.5, math.inf, 0.0).sum(), rays=4, precision=1e-5)
    assert wall["radius"] == pytest.approx([0.5] * 4, rel=1e-4)
    assert net.at.tolist() == [0.0]


def test_what_is_refused():
    for option in ({"eps": 0}, {"rays": 0}, {"precision": 0.0}):
        with pytest.raises(Error, match="is above 0"):
            local_log_volume(Point(0.0), ball, **option)
    with pytest.raises(Error, match="prior is above 0"):
        local_log_volume(Point(0.0), ball, prior=0.0)
    with pytest.raises(Error, match="shape= needs finite"):
        local_log_volume(Point(0.0), ball, shape={"at": torch.zeros(1)})
    with pytest.raises(Error, match="loss of the model is nan"):
        local_log_volume(Point(0.0), lambda m: m.at.sum() * math.nan)
    with pytest.raises(Error, match="no weight"):
        local_log_volume(Point(0.0), ball, pattern="x")


def test_a_region_that_reaches_further_to_one_side():
    def loss(model: Point) -> torch.Tensor:
        step = model.at - model.minimum
        return torch.where(step > 0, step, 5 * step).square().sum()

    found = local_log_volume(Point(1.0), loss, eps=1.0, rays=400, precision=1e-6)  # from 0.8 to 2
    truth = math.log((math.erf(2 / 2**0.5) - math.erf(0.8 / 2**0.5)) / 2)
    assert abs(found["log volume"] - truth) < 4 * found["standard error"]
    assert found["standard error"] < 0.05


def test_the_standard_error_is_the_spread_over_seeds():
    bends = torch.tensor([9.0, 1.0], dtype=torch.float64)
    found = [
        local_log_volume(
            Point(0.0, 0.0), lambda m: (bends * m.at.square()).sum() / 2, eps=0.5, rays=30, seed=s, precision=0.1
        )
        for s in range(30)
    ]
    spread = float(torch.tensor([one["log volume"] for one in found]).std())
    assert sum(one["standard error"] for one in found) / 30 == pytest.approx(spread, rel=0.4)
