"""The mean of the moments of a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightsmith.average._swa import swa


def by_hand(moments: Tensor) -> Tensor:
    """The paper's running formula, number by number."""
    mean = [float(x) for x in moments[0].flatten()]
    for n, moment in enumerate(moments[1:], start=1):
        mean = [m + (float(w) - m) / (n + 1) for m, w in zip(mean, moment.flatten(), strict=True)]
    return torch.tensor(mean).reshape(moments.shape[1:])


def along(moments: Tensor) -> Tensor:
    mean = moments[0]
    for count, moment in enumerate(moments[1:], start=1):
        mean = swa(mean, moment, count)
    return mean


@pytest.mark.parametrize("shape", [(), (1,), (0,), (4, 3)])
@pytest.mark.parametrize("moments", [1, 2, 7])
def test_the_formula(moments: int, shape: tuple[int, ...]):
    run = torch.randn(moments, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(along(run), by_hand(run))
    torch.testing.assert_close(along(run), run.mean(0))


def test_a_step_by_hand():
    assert swa(torch.tensor([2.0]), torch.tensor([5.0]), 2).tolist() == [3]
    assert swa(torch.tensor([2.0]), torch.tensor([5.0]), 1).tolist() == [3.5]


def test_moments_of_another_dtype_take_that_of_the_mean():
    mean = torch.tensor([1.0])
    assert swa(mean, torch.tensor([2.0], dtype=torch.bfloat16), 1).dtype == torch.float32
    assert swa(mean.double(), torch.tensor([2.0]), 1).dtype == torch.float64


def test_a_long_run_does_not_drift():
    run = 1 + 1e-3 * torch.randn(3000, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(along(run), run.double().mean(0).float(), rtol=0, atol=5e-6)
