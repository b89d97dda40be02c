"""The same merges of task vectors as PEFT's, with its dialect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weightsmith as ws

peers = pytest.importorskip(
    "peft.utils.merge_utils", reason='needs peft: pip install "weightsmith[peers]"', exc_type=ImportError
)

WEIGHTS = [[1.0, 1.0, 1.0], [0.2, 1.5, 0.7], [1.0, -0.3, 0.5]]


def vectors(shape: tuple[int, ...]) -> list[Tensor]:
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(len(shape))))


@pytest.mark.parametrize("shape", [(9,), (6, 7), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_ties(weight: list[float], density: float, shape: tuple[int, ...]):
    deltas = vectors(shape)
    theirs = peers.ties(deltas, torch.tensor(weight), density)
    models, base = [{"w": delta} for delta in deltas], {"w": torch.zeros(shape)}
    ours = ws.merge.ties(models, base, weight=weight, density=density, dialect="peft")["w"]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weight", WEIGHTS[:2], ids=str)
def test_votes_by_number(weight: list[float]):
    """Their frequency votes: ours count the same, but average by weight."""
    deltas = vectors((6, 7))
    theirs = peers.ties(deltas, torch.ones(3), 0.5, majority_sign_method="frequency")
    models, base = [{"w": delta} for delta in deltas], {"w": torch.zeros(6, 7)}
    ours = ws.merge.ties(models, base, density=0.5, dialect="count")["w"]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_ones_on_average(method: str):
    """Means over draws, element by element, within five standard errors of their difference."""
    draws, deltas, weight = 400, vectors((4, 6)), [0.5, 1.0, 0.7]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([getattr(peers, method)(deltas, torch.tensor(weight), 0.6) for _ in range(draws)])
    kernel = getattr(ws.merge, method).kernel
    mean = {} if method == "dare_linear" else {"normalize": True}
    models, base = torch.stack(deltas), torch.zeros(4, 6)
    found = torch.stack(
        [kernel(models, base, weight=weight, density=0.6, dialect="peft", seed=seed, **mean) for seed in range(draws)]
    )
    error = ((found.var(0) + theirs.var(0)) / draws).sqrt()
    assert ((found.mean(0) - theirs.mean(0)).abs() <= 5 * error).all()
