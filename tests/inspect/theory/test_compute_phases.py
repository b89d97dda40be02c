"""Phases of compute-optimal scaling: closed forms, exact losses against a slow recursion and real descent."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import compute_optimal, compute_phase, random_features

CLOSED = {
    "Ia": lambda a, b: (1 / (2 * a + 1), (2 * a + 2 * b - 1) / (2 * a + 1)),
    "Ib": lambda a, b: (0.5, a + b - 0.5),
    "Ic": lambda a, b: (
        (1 - 2 * (a + b)) / (2 * (2 * a * b - 3 * a - 2 * b + 1)),
        -a * (2 * a + 2 * b - 1) / (a * (2 * b - 3) - 2 * b + 1),
    ),
    "II": lambda a, b: (b / (a + b), (2 * a + 2 * b - 1) / (2 * (a + b))),
    "III": lambda a, b: (0.5, (4 * a - 1) / (4 * a)),
    "IVa": lambda a, b: (0.5, a),
    "IVb": lambda a, b: (
        (a - b) / (2 * a * b + a - 2 * b),
        -(1 - 2 * a) * (2 * a + 2 * b - 1) / (2 * (2 * a * b + a - 2 * b)),
    ),
}


@pytest.mark.parametrize(
    ("alpha", "beta", "name"),
    [(1, 0.25, "Ia"), (0.7, 0.1, "Ia"), (0.4, 0.3, "Ib"), (0.2, 0.8, "Ic"), (0.1, 1.3, "Ic"), (1, 0.7, "II"),
     (0.8, 0.6, "II"), (0.7, 1.2, "III"), (1.0, 1.5, "III"), (0.4, 0.8, "IVa"), (0.27, 0.8, "IVb"), (0.28, 1.5, "IVb")],
)  # fmt: skip
def test_exponents_are_the_papers(alpha: float, beta: float, name: str):
    found = compute_phase(alpha, beta)
    assert found["phase"] == name
    assert (found["size exponent"], found["loss exponent"]) == pytest.approx(CLOSED[name](alpha, beta))


def test_exponents_join_at_the_boundaries():
    edge = 1 - math.sqrt(0.5)
    for inside, outside in (((0.501, 0.3), (0.499, 0.3)), ((0.8, 0.499), (0.8, 0.501)), ((0.8, 0.799), (0.8, 0.801)),
                            ((0.499, 0.9), (0.501, 0.9)), ((0.2499, 0.8), (0.2501, 0.8))):  # fmt: skip
        one, other = compute_phase(*inside), compute_phase(*outside)
        assert one["phase"] != other["phase"]
        assert one["loss exponent"] == pytest.approx(other["loss exponent"], abs=0.01)
    assert compute_phase(edge + 1e-4, 0.8)["loss exponent"] == pytest.approx(
        compute_phase(edge - 1e-4, 0.8)["loss exponent"], abs=1e-3
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_against_the_recursion_step_by_step(batch: int):
    drawn = random_features(0.8, 0.6, 12, seed=2)
    rate = 0.4 * drawn.largest_rate / batch
    errors, value = drawn.start.clone(), drawn.eigenvalues
    expected = []
    for _ in range(60):
        loss = errors.sum() + drawn.rest
        expected.append(float(loss))
        # E[(w - rate K A w)_j^2] for A the sum of z z' over the batch, z Gaussian.
        errors = (
            errors - 2 * rate * batch * value * errors
            + rate**2 * value**2 * (batch * loss + batch * (batch + 1) * errors)
        )  # fmt: skip
    torch.testing.assert_close(drawn.losses(torch.arange(60), rate, batch), torch.tensor(expected).double())


def test_losses_against_averaged_descent():
    alpha, beta, size, inputs, runs, batch = 0.9, 0.5, 8, 24, 6000, 2
    drawn = random_features(alpha, beta, size, inputs=inputs, seed=3)
    rate = 0.4 * drawn.largest_rate / batch
    index = torch.arange(1, inputs + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(inputs, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
    scale, goal = index.pow(-alpha), index.pow(-beta)
    weights = torch.zeros(runs, size, dtype=torch.float64)
    noise = torch.Generator().manual_seed(9)
    for step in range(41):
        if step % 10 == 0:
            loss = ((weights @ mixed.T - goal) * scale).square().sum(dim=1)
            error = float(loss.std()) / math.sqrt(runs)
            assert float(drawn.losses(torch.tensor([step]), rate, batch)) == pytest.approx(
                float(loss.mean()), abs=4 * error + 1e-12
            )
        x = torch.randn(runs, batch, inputs, generator=noise, dtype=torch.float64) * scale
        features = x @ mixed
        left = torch.einsum("rbd,rd->rb", features, weights) - x @ goal
        weights -= rate * torch.einsum("rb,rbd->rd", left, features)


def test_largest_rate_is_the_edge():
    drawn = random_features(0.8, 0.6, 10)
    far = torch.tensor([200_000])
    assert float(drawn.losses(far, 0.95 * drawn.largest_rate)) < float(drawn.losses(torch.tensor([0]), 0.1))
    assert float(drawn.losses(far, 1.05 * drawn.largest_rate)) > float(drawn.losses(torch.tensor([0]), 0.1))


def test_compute_optimal_in_phase_one():
    found = compute_optimal(1.0, 0.25, [32, 64, 128, 256, 512])
    assert found["loss exponent, measured"] == pytest.approx(found["loss exponent"], rel=0.1)
    assert found["size exponent, measured"] == pytest.approx(found["size exponent"], rel=0.3)
    assert sorted(found["best size"]) == found["best size"]
    assert found.plots[0].lines[0].label == "size 32"


def test_refusals():
    with pytest.raises(Error, match="nothing can be learnt"):
        compute_phase(0.2, 0.2)
    drawn = random_features(1.0, 1.0, 5)
    for steps, rate, batch in ((0.5, 0.1, 1), (-1, 0.1, 1), (1, 0.0, 1), (1, 0.1, 0)):
        with pytest.raises(Error, match="whole steps"):
            drawn.losses(torch.tensor([steps]), rate, batch)
    assert drawn.losses(torch.tensor([10**7]), 50 * drawn.largest_rate).tolist() == [math.inf]
    with pytest.raises(Error, match="size between"):
        random_features(1.0, 1.0, 5, inputs=4)
    with pytest.raises(Error, match="3 sizes"):
        compute_optimal(1.0, 1.0, [4, 8])
