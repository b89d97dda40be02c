"""Averages of other lengths from stored ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.average import ema_coefficients, post_hoc_ema, profile_of
from weightsmith.average._post_hoc import _cosines, _lengths
from weightsmith.average._power_ema import power_of
from weightsmith.errors import Error
from weightsmith.weights import Weights

PROFILES = [(50.0 * k, sigma) for k in range(1, 9) for sigma in (0.05, 0.1)]


def profile(step: float, sigma_rel: float, times: Tensor) -> Tensor:
    """The paper's p, from its text."""
    power = power_of(sigma_rel)
    return torch.where(times <= step, (power + 1) * (times / step) ** power / step, torch.zeros_like(times))


def inner(a: tuple[float, float], b: tuple[float, float], points: int = 100_000) -> float:
    """The inner product of two profiles by the midpoint rule, up to where the earlier ends."""
    end = min(a[0], b[0])
    times = (torch.arange(points, dtype=torch.float64) + 0.5) * end / points
    return float((profile(*a, times) * profile(*b, times)).sum() * end / points)


@pytest.mark.parametrize("a", [(100.0, 0.05), (400.0, 0.1), (250.0, 0.2), (3.0, 12**-0.5)])
@pytest.mark.parametrize("b", [(100.0, 0.1), (40.0, 0.05), (399.0, 0.28)])
def test_inner_products_are_the_integrals(a: tuple[float, float], b: tuple[float, float]):
    times = torch.tensor([a[0], b[0]], dtype=torch.float64)
    powers = torch.tensor([power_of(a[1]), power_of(b[1])], dtype=torch.float64)
    lengths, cosines = _lengths(times, powers), _cosines(times, powers)
    assert float(lengths[0]) ** 2 == pytest.approx(inner(a, a), rel=1e-6)
    assert float(lengths[0] * lengths[1] * cosines[0, 1]) == pytest.approx(inner(a, b), rel=1e-6)
    assert torch.equal(cosines, cosines.T)
    assert cosines.diagonal().tolist() == [1, 1]


@pytest.mark.parametrize(("step", "sigma_rel"), [(400, 0.15), (400, 0.07), (400, 0.2), (310, 0.12), (400, 0.03)])
def test_coefficients_are_the_least_squares_of_sampled_profiles(step: float, sigma_rel: float):
    """Against numpy on the profiles themselves, with and without the sum of one."""
    times = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 200
    columns = torch.stack([profile(*stored, times) for stored in PROFILES], dim=1).numpy()
    wanted = profile(step, sigma_rel, times).numpy()
    plain = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    found, error = ema_coefficients(PROFILES, step, sigma_rel, normalize=False)
    np.testing.assert_allclose(found, plain, rtol=1e-3, atol=1e-4)
    left = np.linalg.norm(wanted - columns @ plain) / np.linalg.norm(wanted)
    assert error == pytest.approx(left, rel=1e-3)
    # With the constraint: the last coefficient is what the others leave.
    free = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1], rcond=None)[0]
    found, error = ema_coefficients(PROFILES, step, sigma_rel)
    np.testing.assert_allclose(found[:-1], free, rtol=1e-3, atol=1e-4)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    assert error >= left - 1e-6


def test_one_that_is_stored_is_itself():
    for index, (step, sigma_rel) in enumerate(PROFILES):
        for normalize in (True, False):
            found, error = ema_coefficients(PROFILES, step, sigma_rel, normalize=normalize)
            assert error < 1e-5
            torch.testing.assert_close(found, torch.eye(len(PROFILES), dtype=torch.float64)[index], rtol=0, atol=1e-6)


def test_the_order_and_the_unit_of_steps_do_not_matter():
    found, error = ema_coefficients(PROFILES, 400, 0.15)
    turned, same = ema_coefficients(PROFILES[::-1], 400, 0.15)
    torch.testing.assert_close(turned.flip(0), found, rtol=0, atol=1e-9)
    scaled, also = ema_coefficients([(1e4 * step, sigma) for step, sigma in PROFILES], 4e6, 0.15)
    torch.testing.assert_close(scaled, found, rtol=0, atol=1e-9)
    assert error == pytest.approx(same) == pytest.approx(also)


def test_a_snapshot_twice_counts_once():
    once, error = ema_coefficients(PROFILES, 400, 0.15)
    twice, again = ema_coefficients([*PROFILES, PROFILES[-1]], 400, 0.15)
    assert again == pytest.approx(error, rel=1e-6)
    assert float(twice[-1] + twice[-2]) == pytest.approx(float(once[-1]), abs=1e-6)
    assert float(twice[-1]) == pytest.approx(float(twice[-2]), abs=1e-6)


def test_more_snapshots_leave_less():
    errors = [
        ema_coefficients([(400 * k / n, s) for k in range(1, n + 1) for s in (0.05, 0.1)], 400, 0.15)[1]
        for n in (2, 4, 8, 16, 32, 64, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-4 < 0.1 < errors[0]


def test_one_snapshot_is_all_there_is():
    found, error = ema_coefficients([(10, 0.1)], 10, 0.2)
    assert found.tolist() == [1]
    assert 0.3 < error < 1


@pytest.mark.parametrize(
    ("profiles", "step", "sigma_rel", "message"),
    [
        ([], 1, 0.1, "at least 1 stored average, got 0"),
        ([(10, 0.1)], 11, 0.1, "last stored average is of step 10, so none of step 11 can be made"),
        ([(0, 0.1)], 1, 0.1, "steps of averages are counted from 1, got 0"),
        ([(10, 0.1)], float("nan"), 0.1, "counted from 1, got nan"),
        ([(10, 0.1)], 10, 0.3, "sigma_rel is the length"),
        ([(10, 0.9)], 10, 0.1, "sigma_rel is the length"),
    ],
)
def test_what_cannot_be_solved(profiles: list, step: float, sigma_rel: float, message: str):
    with pytest.raises(Error, match=message):
        ema_coefficients(profiles, step, sigma_rel)


# Whole runs


def walk(steps: int, size: int = 12) -> Tensor:
    """A random walk far away from zero, as weights are."""
    return 10 + torch.randn(steps, size, generator=torch.Generator().manual_seed(3)).cumsum(0) / steps**0.5


def stored(run: Tensor, every: int, sigmas: tuple[float, ...] = (0.05, 0.1)) -> list[Weights]:
    averages = [ws.average.power_ema(sigma_rel=sigma) for sigma in sigmas]
    snapshots = []
    for step, moment in enumerate(run, start=1):
        for average in averages:
            average.update({"w": moment, "n": torch.tensor(step)})
            if step % every == 0:
                snapshots.append(average.weights())
    return snapshots


def true(run: Tensor, sigma_rel: float) -> Tensor:
    average = ws.average.power_ema(sigma_rel=sigma_rel)
    for moment in run:
        average.update({"w": moment.double()})
    return average.weights()["w"]


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15, 0.2])
def test_it_is_the_average_of_training(sigma_rel: float):
    run = walk(400)
    expected = true(run, sigma_rel)
    moved = float((run[-1] - expected).norm())
    found = post_hoc_ema(stored(run, every=20), sigma_rel)
    error = float((found["w"] - expected).norm())
    assert error < 0.005 * moved
    assert found["n"] == post_hoc_ema(stored(run, every=20)[::-1], sigma_rel)["n"] == 400
    rough = post_hoc_ema(stored(run, every=100), sigma_rel)
    assert error < 0.2 * float((rough["w"] - expected).norm())
    # What the sum of one is worth.
    loose = post_hoc_ema(stored(run, every=20), sigma_rel, normalize=False)
    assert float((loose["w"] - expected).norm()) > 3 * error


def test_a_run_that_stands_still_stays_where_it_is():
    still = torch.full((40, 3), 1000.0)
    torch.testing.assert_close(post_hoc_ema(stored(still, every=10), 0.2)["w"], still[0], rtol=1e-5, atol=0)


def test_earlier_in_the_run():
    run = walk(400)
    found = post_hoc_ema(stored(run, every=20), 0.15, step=300)
    torch.testing.assert_close(found["w"], true(run[:300], 0.15).float(), rtol=0, atol=0.003)


def test_through_files_in_any_order(tmp_path: Path):
    run = walk(200)
    snapshots = stored(run, every=20)
    for number, snapshot in enumerate(snapshots):
        snapshot.save(tmp_path / f"{number}{('.safetensors', '.pt', '')[number % 3]}")
    (tmp_path / "again").mkdir()
    ws.open(tmp_path / "4.pt").cast("float64").save(
        tmp_path / "again" / "4.safetensors"
    )  # one step more in its history
    paths = [path for path in sorted(tmp_path.iterdir()) if path.name not in ("4.pt", "again")]
    found = post_hoc_ema([*paths, tmp_path / "again" / "4.safetensors"], sigma_rel=0.15)
    torch.testing.assert_close(found["w"].float(), post_hoc_ema(snapshots, 0.15)["w"])
    options = found.lineage.options
    assert (options["sigma_rel"], options["step"], len(options["coefficients"])) == (0.15, 200, 20)
    assert sum(options["coefficients"]) == pytest.approx(1)
    assert options["error"] == pytest.approx(ema_coefficients([profile_of(s) for s in snapshots], 200, 0.15)[1])  # type: ignore[misc]


def test_profiles_may_be_told():
    snapshots = stored(walk(100), every=25)
    bare = [snapshot.to_dict() for snapshot in snapshots]
    told = [(step, sigma) for step in (25, 50, 75, 100) for sigma in (0.05, 0.1)]
    found = post_hoc_ema(bare, 0.15, profiles=told)
    torch.testing.assert_close(found["w"], post_hoc_ema(snapshots, 0.15)["w"])
    with pytest.raises(Error, match="a step and a sigma_rel for each of 8 snapshots, got 7"):
        post_hoc_ema(bare, 0.15, profiles=told[1:])


def test_what_does_not_say_what_it_is(tmp_path: Path):
    Weights.of({"w": torch.ones(2)}).save(tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"model\.safetensors does not say that it is a snapshot of power_ema"):
        post_hoc_ema([tmp_path / "model.safetensors"], 0.1)
    with pytest.raises(Error, match="snapshot 2 does not say"):
        post_hoc_ema([stored(walk(4), every=4)[0], {"w": torch.ones(12)}], 0.1)
    with pytest.raises(Error, match="post_hoc_ema needs at least 1 snapshot, got 0"):
        post_hoc_ema([], 0.1)


def test_profile_of():
    average = ws.average.power_ema()
    average.update({"w": torch.ones(1)})
    assert profile_of(average.weights()) == (1, 0.1)
    assert profile_of(average.weights().cast("bfloat16").select("w")) == (1, 0.1)
    assert profile_of(average.weights() + average.weights()) is None
    plain = ws.average.swa()
    plain.update({"w": torch.ones(1)})
    assert profile_of(plain.weights()) is None
