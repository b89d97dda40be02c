"""The same averages as ema-pytorch's KarrasEMA and PostHocEMA, and better ones where theirs lose a sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.average import ema_coefficients
from weightsmith.average._power_ema import power_of

theirs: Any = pytest.importorskip("ema_pytorch.post_hoc_ema", reason="ema-pytorch is not installed")

SIGMAS = (0.05, 0.1)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2, 0.28])
def test_the_power_of_a_length(sigma_rel: float):
    assert power_of(sigma_rel) == pytest.approx(theirs.sigma_rel_to_gamma(sigma_rel), rel=1e-9)


@pytest.mark.parametrize("wanted", [(400.0, 0.15), (300.0, 0.07), (400.0, 0.25)])
def test_the_coefficients(wanted: tuple[float, float]):
    profiles = [(40.0 * k, sigma) for k in range(1, 11) for sigma in SIGMAS]
    steps, gammas = (torch.tensor(column, dtype=torch.float64) for column in zip(*profiles, strict=True))
    gammas = torch.tensor([theirs.sigma_rel_to_gamma(float(sigma)) for sigma in gammas], dtype=torch.float64)
    expected = theirs.solve_weights(
        steps, gammas, torch.tensor([wanted[0]]), torch.tensor([theirs.sigma_rel_to_gamma(wanted[1])])
    )
    found, _ = ema_coefficients(profiles, *wanted, normalize=False)
    torch.testing.assert_close(found, expected.squeeze(-1), rtol=1e-6, atol=1e-8)


def walk(steps: int) -> list[nn.Module]:
    torch.manual_seed(0)
    modules, module = [], nn.Linear(4, 3)
    for _ in range(steps):
        following = nn.Linear(4, 3)
        with torch.no_grad():
            for new, old in zip(following.parameters(), module.parameters(), strict=True):
                new.copy_(old + 0.02 * torch.randn_like(old))
        modules.append(module := following)
    return modules


def test_an_average_along_a_run():
    """Theirs counts the first moment twice, so ours is shown it twice."""
    modules = walk(60)
    mirror = nn.Linear(4, 3)
    mirror.load_state_dict(modules[0].state_dict())
    peer = theirs.KarrasEMA(mirror, sigma_rel=0.1, update_every=1)
    ours = ws.average.power_ema(sigma_rel=0.1)
    ours.update(modules[0])
    for module in modules:
        mirror.load_state_dict(module.state_dict())
        peer.update()
        ours.update(module)
    for name, value in peer.ema_model.state_dict().items():
        torch.testing.assert_close(ours.weights()[name], value, rtol=1e-5, atol=1e-6)


def test_a_length_made_afterwards(tmp_path: Path):
    modules = walk(200)
    mirror = nn.Linear(4, 3)
    mirror.load_state_dict(modules[0].state_dict())
    peer = theirs.PostHocEMA(
        mirror, sigma_rels=SIGMAS, update_every=1, checkpoint_every_num_steps=20,
        checkpoint_folder=str(tmp_path), checkpoint_dtype=torch.float32,
    )  # fmt: skip
    averages = {sigma: ws.average.power_ema(sigma_rel=sigma) for sigma in (*SIGMAS, 0.15)}
    snapshots, profiles = [], []
    for average in averages.values():
        average.update(modules[0])
    for step, module in enumerate(modules, start=1):
        mirror.load_state_dict(module.state_dict())
        peer.update()
        for sigma, average in averages.items():
            average.update(module)
            if step % 20 == 0 and sigma in SIGMAS:
                snapshots.append(average.weights())
                profiles.append((step, sigma))
    made = peer.synthesize_ema_model(sigma_rel=0.15).ema_model.state_dict()
    loose = ws.average.post_hoc_ema(snapshots, 0.15, profiles=profiles, normalize=False)
    ours = ws.average.post_hoc_ema(snapshots, 0.15)
    errors = [0.0, 0.0]
    for name, value in made.items():
        torch.testing.assert_close(loose[name], value, rtol=1e-4, atol=1e-5)
        true = averages[0.15].weights()[name]
        errors[0] += float((ours[name] - true).norm())
        errors[1] += float((value - true).norm())
    assert errors[0] < 0.5 * errors[1]
