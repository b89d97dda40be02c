"""Scores from derivatives of the loss, against the loss itself with one weight set to zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.prune._gradients import obd, snip, taylor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(scale: float = 1.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for parameter in made.parameters():
        parameter.data *= scale
    return made


DATA = (normal(20, 4, seed=1), torch.arange(20) % 3)


def without(model: nn.Module, name: str, place: int, share: float) -> float:
    """The mean loss in float64 when a share of one weight is gone."""
    other = copy.deepcopy(model).double()
    other.get_parameter(name).data.view(-1)[place] *= 1 - share
    with torch.no_grad():
        return float(functional.cross_entropy(other(DATA[0].double()), DATA[1]))


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_taylor_and_snip_are_finite_differences_of_the_loss(name):
    model = network()
    stats = ws.stats.gradients(model, [DATA])
    weight = model.get_parameter(name).detach()
    signed = taylor(weight, stats[name]).flatten()
    for place in range(weight.numel()):
        slope = (without(model, name, place, 1e-4) - without(model, name, place, -1e-4)) / 2e-4
        assert float(signed[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert (signed < 0).any()
    assert (signed > 0).any()
    torch.testing.assert_close(snip(weight, stats[name]).flatten(), signed.abs())
    torch.testing.assert_close(taylor(weight, stats[name], squared=True).flatten(), signed**2)


def test_taylor_foretells_the_loss_without_a_small_weight():
    """All of a weight gone, in a network of small weights: the rest of the series is of higher order."""
    model = network(0.05)
    stats = ws.stats.gradients(model, [DATA])
    now = without(model, "0.weight", 0, 0.0)
    score = taylor(model[2].weight.detach(), stats["2.weight"]).flatten()
    rises = torch.tensor([without(model, "2.weight", place, 1.0) - now for place in range(15)])
    assert float((score - rises).abs().max()) < 0.05 * float(rises.abs().max())


def test_obd_is_exact_for_a_sum_of_squares_at_its_minimum():
    curvature, minimum = normal(6).abs() + 0.1, normal(6, seed=1)
    loss = lambda w: 0.5 * (curvature * (w - minimum) ** 2).sum()  # noqa: E731
    score = obd(minimum, curvature)
    for place in range(6):
        gone = minimum.clone()
        gone[place] = 0
        assert float(score[place]) == pytest.approx(float(loss(gone)), rel=1e-5)


def test_weights_on_a_ridge_go_first():
    pruned = ws.prune.obd({"w": torch.tensor([[1.0, 2.0, 0.1]])}, 1 / 3, stats={"w": torch.tensor([[1.0, -1.0, 1.0]])})
    assert pruned["w"].tolist() == [[1.0, 0.0, pytest.approx(0.1)]]


def test_with_equal_curvature_obd_is_magnitude():
    weights = {"w": normal(6, 8)}
    assert torch.equal(
        ws.prune.obd(weights, 0.5, stats={"w": torch.full((6, 8), 3.0)})["w"], ws.prune.magnitude(weights, 0.5)["w"]
    )


def test_from_data_all_of_them_prune():
    model = network()
    first, second = ws.stats.gradients(model, [DATA]), ws.stats.fisher(model, [DATA])
    for method, stats in ((ws.prune.snip, first), (ws.prune.taylor, first), (ws.prune.obd, second)):
        pruned = method(model, 0.4, stats=stats, scope="global")
        assert sum(int((pruned[name] == 0).sum()) for name in ("0.weight", "2.weight")) == 14


@pytest.mark.parametrize("method", [ws.prune.snip, ws.prune.taylor, ws.prune.obd], ids=lambda m: m.__name__)
@pytest.mark.parametrize("structure", ["element", "row", "column", "2x4"])
def test_structures(method, structure):
    weight, stats = normal(4, 8), normal(4, 8, seed=1)
    mask = method({"w": weight}, 0.5, stats={"w": stats}, structure=structure, action="mask")["w"]
    score = method.kernel(weight, stats)
    height, width = {"element": (1, 1), "row": (1, 8), "column": (4, 1), "2x4": (2, 4)}[structure]
    means = score.reshape(4 // height, height, 8 // width, width).mean((1, 3))
    kept = means >= means.flatten().sort(descending=True).values[means.numel() // 2 - 1]
    assert torch.equal(mask, kept.repeat_interleave(height, 0).repeat_interleave(width, 1))


@pytest.mark.parametrize("method", [ws.prune.snip, ws.prune.taylor, ws.prune.obd], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("pattern", "keep", "group"), [("2:4", 2, 4), ("1:8", 1, 8), ("0:2", 0, 2)])
def test_patterns(method, pattern, keep, group):
    weight, stats = normal(4, 8), normal(4, 8, seed=1)
    mask = method({"w": weight}, pattern, stats={"w": stats}, action="mask")["w"].reshape(4, -1, group)
    score = method.kernel(weight, stats).reshape(4, -1, group)
    assert (mask.sum(-1) == keep).all()
    assert (score.masked_fill(~mask, 9e9).amin(-1) >= score.masked_fill(mask, -9e9).amax(-1)).all()


@pytest.mark.parametrize("kernel", [snip, taylor, obd])
def test_half_precision_is_computed_in_float32(kernel):
    weight, stats = torch.full((3,), 300.0, dtype=torch.float16), torch.full((3,), 300.0, dtype=torch.float16)
    found = kernel(weight, stats)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
