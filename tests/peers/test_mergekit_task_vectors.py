"""The same merges of task vectors as mergekit, in float32 and without ties that its sort would break at will."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws

mergekit = pytest.importorskip(
    "mergekit.merge_methods", reason='needs mergekit: pip install "weightsmith[peers]"', exc_type=ImportError
)

SHAPES = [(5,), (6, 7), (2, 3, 3)]
WEIGHTS = [[1.0, 1.0, 1.0], [0.2, 1.5, 0.7], [1.0, -0.3, 0.5]]


def tensors(shape: tuple[int, ...]) -> list[Tensor]:
    """A base and three fine-tunes of it."""
    return list(torch.randn(4, *shape, generator=torch.Generator().manual_seed(len(shape))))


def theirs(method: str, inputs: list[Tensor], options: dict[str, Any]) -> Tensor:
    named = {"lambda" if name == "amount" else name: value for name, value in options.items()}
    return mergekit.merge_tensors(inputs, method, base_index=0, parameters=named)


def ours(method: str, inputs: list[Tensor], options: dict[str, Any]) -> Tensor:
    base, *models = ({"w": tensor} for tensor in inputs)
    return getattr(ws.merge, method)(models, base, **options)["w"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"])
def test_deterministic_ones(method: str, normalize: bool, weight: list[float], shape: tuple[int, ...]):
    plain: dict[str, Any] = {"weight": weight, "amount": 0.7, "normalize": normalize}
    sets = [plain]
    if method != "task_arithmetic":
        sets = [plain | {"density": d, "rescale": r} for d in (0.01, [0.2, 0.5, 1.0]) for r in (True, False)]
    if method.startswith("breadcrumbs"):
        sets = [options | {"gamma": gamma} for options in sets for gamma in (0.2, [0.0, 0.3, 0.9])]
    for options in sets:
        torch.testing.assert_close(ours(method, tensors(shape), options), theirs(method, tensors(shape), options))


def test_ties_among_equal_magnitudes_as_their_sort_would_have_it_if_it_were_stable(monkeypatch: pytest.MonkeyPatch):
    argsort = torch.argsort

    def stable(values: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
        return argsort(values, dim=dim, descending=descending, stable=True)

    monkeypatch.setattr(torch, "argsort", stable)
    inputs = list(torch.randint(-3, 4, (4, 40, 50), generator=torch.Generator().manual_seed(0)).float())
    for density in (0.1, 0.5, 0.9):
        options: dict[str, Any] = {"weight": [1.0, 0.5, 0.25], "density": density}
        assert torch.equal(ours("ties", inputs, options), theirs("ties", inputs, options))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("normalize", [True, False])
def test_random_ones_where_nothing_is_dropped(normalize: bool, method: str):
    options: dict[str, Any] = {"weight": [0.2, 1.5, 0.7], "density": 1.0, "normalize": normalize}
    torch.testing.assert_close(ours(method, tensors((6, 7)), options), theirs(method, tensors((6, 7)), options))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_ones_on_average(method: str, rescale: bool):
    """Means over draws, element by element, within five standard errors of their difference."""
    draws, inputs = 400, tensors((4, 6))
    base, models = inputs[0], torch.stack(inputs[1:])
    options: dict[str, Any] = {"weight": [0.5, 1.0, 0.7], "density": 0.6, "rescale": rescale}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peers = torch.stack([theirs(method, inputs, options) for _ in range(draws)])
    kernel = getattr(ws.merge, method).kernel
    found = torch.stack([kernel(models, base, seed=seed, **options) for seed in range(draws)])
    error = ((found.var(0) + peers.var(0)) / draws).sqrt()
    assert ((found.mean(0) - peers.mean(0)).abs() <= 5 * error).all()
    assert (found.std(0) - peers.std(0)).abs().max() < 0.2 * peers.std(0).max()
