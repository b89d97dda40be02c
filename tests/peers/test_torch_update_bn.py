"""The same running statistics as torch.optim.swa_utils.update_bn where batches are of one size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from weightsmith.stats import batch_norm


class Residual(nn.Module):
    """Convolutions with batch norm around which the input goes as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.one, self.two = nn.BatchNorm2d(width), nn.BatchNorm2d(width, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.second(torch.relu(self.one(self.first(x)))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Residual(6), nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5)
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [1, 7])
def test_equal_batches(count: int, training: bool):
    torch.manual_seed(1)
    data = [torch.randn(16, 3, 8, 8) * 2 + 1 for _ in range(count)]
    ours, theirs = network().train(training), network().train(training)
    found = batch_norm(ours, data)
    update_bn(data, theirs)
    names = {name for name, _ in theirs.named_buffers()}
    assert set(found) == names
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_unequal_batches_are_where_we_differ():
    """Theirs is the plain mean of the batches: the last, of two examples, counts as much as the first, of thirty."""
    data = [torch.zeros(30, 1), torch.full((2, 1), 16.0)]
    theirs = nn.BatchNorm1d(1)
    update_bn(data, theirs)
    assert theirs.running_mean is not None
    assert theirs.running_mean.item() == pytest.approx(8)
    assert batch_norm(nn.BatchNorm1d(1), data)["running_mean"].item() == pytest.approx(1)


def test_their_update_changes_the_model_and_ours_does_not():
    data = [torch.randn(8, 3, 8, 8)]
    model = network()
    before = copy.deepcopy(model.state_dict())
    batch_norm(model, data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
