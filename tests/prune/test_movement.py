"""Movement scores, against the sum written out, and against where training takes the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune import _movement


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(steps: int, rate: float) -> tuple[nn.Linear, Tensor, ws.prune.Movement, list[tuple[Tensor, Tensor]]]:
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = normal(3, 4)
    start, recorder, seen = layer.weight.detach().clone(), ws.prune.movement(layer), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    for turn in range(steps):
        optimizer.zero_grad()
        (layer(normal(8, 4, seed=turn)) - normal(8, 3, seed=100 + turn)).square().mean().backward()
        seen.append((layer.weight.grad.clone(), layer.weight.detach().clone()))
        recorder.update()
        optimizer.step()
    return layer, start, recorder, seen


def test_it_is_the_sum_over_steps():
    _, _, recorder, seen = trained(5, 0.1)
    torch.testing.assert_close(recorder.scores()["weight"], -sum(g * w for g, w in seen))
    assert recorder.state.count == 5


def test_with_small_steps_it_is_how_far_the_squares_have_moved():
    """A step of gradient descent changes w^2 / 2 by -rate * g * w, to first order."""
    layer, start, recorder, _ = trained(10, 1e-4)
    moved = (layer.weight.detach().double() ** 2 - start.double() ** 2) / 2 / 1e-4
    torch.testing.assert_close(recorder.scores()["weight"].double(), moved, rtol=0.02, atol=0.01)


def test_what_shrinks_goes_first_and_masks_of_a_threshold():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, -2.0, 1.0]])
    recorder = ws.prune.movement(layer)
    layer.weight.grad = torch.tensor([[1.0, 1.0, 0.0]])
    info = recorder.update()
    assert (info.count, info.shrinking) == (1, pytest.approx(1 / 3))
    assert recorder.scores()["weight"].tolist() == [[-2.0, 2.0, 0.0]]
    assert ws.prune.by_score(layer, recorder.scores(), 1 / 3)["weight"].tolist() == [[0.0, -2.0, 1.0]]
    assert recorder.above(0.5)["weight"].tolist() == [[False, True, False]]
    assert recorder.above(0.1)["weight"].tolist() == [[True, True, True]]  # sigmoid(-2) = 0.119


def test_the_state_that_goes_in_stays_and_can_be_saved():
    layer = nn.Linear(2, 2, bias=False)
    state = _movement.init(layer, ["weight"])
    after, _ = _movement.step(state, {"weight": torch.ones(2, 2)}, {"weight": torch.ones(2, 2)})
    assert not state.totals["weight"].any()
    assert state.count == 0
    assert (after.totals["weight"] == -1).all()
    one, other = ws.prune.movement(layer), ws.prune.movement(layer)
    layer.weight.grad = torch.ones(2, 2)
    one.update()
    other.load_state_dict(one.state_dict())
    one.update()
    other.update()
    assert torch.equal(one.scores()["weight"], other.scores()["weight"])
    with pytest.raises(Error, match="other parameters"):
        ws.prune.movement(nn.Sequential(layer)).load_state_dict(one.state_dict())


def test_a_parameter_without_a_gradient_stands_still():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    recorder = ws.prune.movement(model)
    model[1].weight.grad = torch.sign(model[1].weight.detach())  # all six of ten shrink
    assert recorder.update().shrinking == pytest.approx(0.6)
    assert not recorder.scores()["0.weight"].any()
    torch.testing.assert_close(recorder.scores()["1.weight"], -model[1].weight.detach().abs())


def test_half_precision_is_added_up_in_float32():
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    layer.weight.data.fill_(1.0)
    recorder = ws.prune.movement(layer)
    for _ in range(300):
        layer.weight.grad = torch.ones_like(layer.weight)
        recorder.update()
    assert recorder.scores()["weight"].item() == -300  # bfloat16 stops at 256


def test_refusals():
    layer = nn.Linear(2, 2)
    recorder = ws.prune.movement(layer)
    with pytest.raises(Error, match="no scores yet"):
        recorder.scores()
    with pytest.raises(Error, match="no gradient"):
        recorder.update()
    with pytest.raises(Error, match="between 0 and 1"):
        recorder.above(0.0)
    layer.weight.grad = torch.ones(2, 2)
    recorder.update()
    before = recorder.scores()["weight"]
    layer.weight.grad = torch.full((2, 2), float("nan"))
    with pytest.raises(Error, match="gradients of weight are not finite"):
        recorder.update()
    assert recorder.state.count == 1
    assert torch.equal(recorder.scores()["weight"], before)
    layer.weight.data[0, 0] = float("inf")
    layer.weight.grad = torch.ones(2, 2)
    recorder.update()
    with pytest.raises(Error, match="scores of weight are not finite"):
        recorder.scores()
    with pytest.raises(Error, match="other parameters"):
        ws.prune.movement(nn.Linear(2, 3)).load_state_dict(recorder.state_dict())
    with pytest.raises(Error, match="no matrix to prune"):
        ws.prune.movement(nn.BatchNorm1d(3))
